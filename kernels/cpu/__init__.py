"""Providers built on torch's own low-bit CPU ops."""
