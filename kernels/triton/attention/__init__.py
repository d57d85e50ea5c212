"""Attention, and what puts keys and values into its cache."""
