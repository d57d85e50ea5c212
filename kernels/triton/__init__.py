"""Triton kernels, one op family per file; imported when a CUDA tensor (or the interpreter) needs them."""
