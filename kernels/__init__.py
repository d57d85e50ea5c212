"""Lowest floor: storage formats and `qcompiler::` ops with reference, fake and fast providers.

Imports nothing else of this project. `import qcompiler.kernels.ops` registers
the ops with torch; importing this package alone stays light.
"""
