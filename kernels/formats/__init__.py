"""Storage formats: named tensors, pack, unpack, dequantize, exact bits."""
