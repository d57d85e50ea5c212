"""The `qcompiler::` ops. Importing this package registers them with torch."""

from __future__ import annotations

from qcompiler.kernels.ops import linear_affine as linear_affine
