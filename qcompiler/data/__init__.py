"""Text that ships with the package for evaluation and calibration."""
