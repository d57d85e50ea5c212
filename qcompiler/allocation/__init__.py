"""Allocation: a format for each linear, so that a target size is met at the least loss.

candidates → sensitivity → solve: what a linear may become, what each choice costs, and the exact optimum.
"""
