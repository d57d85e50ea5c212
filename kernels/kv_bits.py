"""What `--kv-bits` may say; apart from the formats, so that a command line needs no torch to know it."""

from __future__ import annotations

from qcompiler.kernels.errors import InvalidInputError

KV_BITS: dict[str, str | None] = {"16": None, "8": "int8", "4": "int4", "fp8": "fp8"}


def kv_format_of_bits(bits: str | int) -> str | None:
    """The format that `--kv-bits` names, None for the plain cache.

    Raises:
        InvalidInputError: it is none of 16, 8, 4 and fp8.
    """
    if str(bits) not in KV_BITS:
        raise InvalidInputError(
            f"the KV cache cannot have {bits} bits", hint=f"Choose from {', '.join(KV_BITS)}."
        )
    return KV_BITS[str(bits)]
