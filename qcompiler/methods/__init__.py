"""Quantization methods: each decides numbers on plain tensors and knows no graph."""
