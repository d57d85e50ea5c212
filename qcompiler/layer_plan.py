"""Which linear gets which bits: patterns from the user over the method's defaults.

Patterns are shell patterns over the fully qualified name of the linear, and
match a trailing part too: `o_proj` and `*.o_proj` both mean every o_proj.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.options import CompileOptions

# A router decides which expert sees a token: tiny, and a flipped choice costs a whole expert.
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)(\.classifier|\.linear)?$")


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern means the linear `name`, whole or by its trailing components."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


class LayerPlan:
    """Bits for a linear, or the reason why it is left alone; remembers which patterns were of use."""

    def __init__(self, options: CompileOptions, head_names: frozenset[str] = frozenset()):
        self._options = options
        self._heads = head_names
        self._table_bits: int | None = None
        self._unused: set[str] = {*options.skip, *(pattern for pattern, _ in options.bits_overrides)}

    def bits_for(self, name: str) -> int | str:
        """Bits per code of the linear `name`, or why it is skipped."""
        for pattern in self._options.skip:
            if matches(pattern, name):
                self._unused.discard(pattern)
                return f"--skip {pattern}"
        override = self._override(name)
        if name in self._heads:
            if override is not None:
                return override
            if self._options.lm_head_bits is not None:
                return self._options.lm_head_bits
            return "output head (quantize it with --lm-head-bits)"
        if override is not None:
            return override
        if _ROUTER.search(name):
            return "expert router"
        return self._options.bits

    def embedding_bits_for(self, name: str) -> int | str:
        """Bits per code of the embedding table `name`, or why it is left alone."""
        for pattern in self._options.skip:
            if matches(pattern, name):
                self._unused.discard(pattern)
                return f"--skip {pattern}"
        override = self._override(name)
        self._table_bits = self._options.embedding_bits if override is None else override
        return self._table_bits or "embedding (quantize it with --embedding-bits)"

    def shares_embedding(self, name: str) -> str | None:
        """None if the linear `name`, tied to the embedding asked about last, reads its tensors; else why not.

        Raises:
            InvalidInputError: Other bits were asked for it than for the embedding.
        """
        for pattern in self._options.skip:
            if matches(pattern, name):
                self._unused.discard(pattern)
                return f"--skip {pattern}"
        override = self._override(name)
        wanted = override if override is not None else self._options.lm_head_bits
        if wanted is not None and wanted != self._table_bits:
            raise InvalidInputError(
                f"{name} is tied to the embedding: it cannot have {wanted} bits and the embedding "
                f"{self._table_bits}",
                hint="One table is stored for both: give one width, or --skip one of them.",
            )
        return None

    def check_all_used(self, names: list[str]) -> None:
        """Refuse patterns that matched no linear: a typo would otherwise pass in silence.

        Raises:
            InvalidInputError: Names the pattern and the nearest linear names.
        """
        if not self._unused:
            return
        from difflib import get_close_matches

        pattern = sorted(self._unused)[0]
        tails = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = get_close_matches(pattern.strip("*."), tails, n=3, cutoff=0.3) or tails[:8]
        raise InvalidInputError(
            f"the pattern {pattern!r} matches no linear of this model",
            hint=f"Its linears end in: {', '.join(near)}.",
        )

    def _override(self, name: str) -> int | None:
        bits: int | None = None
        for pattern, value in self._options.bits_overrides:
            if matches(pattern, name):
                self._unused.discard(pattern)
                bits = value
        return bits
