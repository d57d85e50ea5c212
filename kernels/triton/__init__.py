"""Triton kernels, one op family per file; imported only when a CUDA tensor or the interpreter needs them."""
