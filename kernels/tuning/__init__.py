"""Measured kernel configurations, one JSON file per GPU model."""
