"""Ternary weights for qcompiler: a method, a storage format and its op."""
