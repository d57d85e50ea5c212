"""The qrun command line."""
