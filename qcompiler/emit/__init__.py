"""Emitters: what a lowered graph is written as."""
