"""What the user asked for, validated once, before any work is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.kernels.errors import InvalidInputError

EMBEDDING_BITS = (8, 4)
DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class CompileOptions:
    """Options of one compilation; the command line's flags under the same names.

    Attributes:
        model: Local checkpoint folder, or a hub id "owner/name".
        method: Name of a registered quantization method.
        bits: Bits per weight code for every linear that no override names.
        output: Artifact folder; None means `<model>-<method>-<bits>bit` in the current folder.
        group_size: Input features per scale; 0 = one group per row; None = the method's own default.
        device: "auto", "cpu", "cuda" or "cuda:N": where quantization and evaluation run.
        dtype: Activation dtype of the artifact; "auto" keeps the checkpoint's.
        skip: Shell patterns of linears left in the activation dtype (`*.o_proj`, `model.layers.0.*`).
        bits_overrides: (pattern, bits) pairs; the last match wins.
        lm_head_bits: Quantize the output head too, at this width.
        embedding_bits: Quantize token embeddings too, at 8 or 4 bits; a tied head shares the table.
        method_options: Options of the method itself (for hqq: `solver`, `tail_fraction` …).
        eval_text: Text file for the quality figures; None means the text that ships.
        eval_tokens: Tokens of it to score; 0 skips the evaluation.
        eval_context: Window length in tokens.
        calib_text: Text file for methods that calibrate; None means the text that ships.
        calib_tokens: Tokens of it to use.
        max_kl: Fail when the mean KL divergence (nats per token) exceeds this.
        overwrite: Replace an existing artifact, or start an unfinished one anew.
        resume: Continue an unfinished compilation of the same configuration.
        dump_graphs: Folder for before/after listings of every pass.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        revision: Hub revision, when `model` is a hub id.
        max_context: Longest context to serve, for models whose rotary frequencies depend on it.
    """

    model: str
    method: str = "hqq"
    bits: int = 4
    output: Path | None = None
    group_size: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    skip: tuple[str, ...] = ()
    bits_overrides: tuple[tuple[str, int], ...] = ()
    lm_head_bits: int | None = None
    embedding_bits: int | None = None
    method_options: dict[str, Any] = field(default_factory=dict)
    eval_text: Path | None = None
    eval_tokens: int = 4096
    eval_context: int = 512
    calib_text: Path | None = None
    calib_tokens: int = 65536
    max_kl: float | None = None
    overwrite: bool = False
    resume: bool = False
    dump_graphs: Path | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    max_context: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidInputError(
                f"dtype {self.dtype!r} is not known", hint=f"Choose one of {', '.join(DTYPES)}."
            )
        if self.embedding_bits not in (None, *EMBEDDING_BITS):
            raise InvalidInputError(
                f"embeddings cannot have {self.embedding_bits} bits",
                hint=f"Choose from {', '.join(map(str, EMBEDDING_BITS))}.",
            )
        if self.eval_tokens < 0 or 0 < self.eval_tokens < 2:
            raise InvalidInputError(
                f"eval_tokens is {self.eval_tokens}; scoring needs at least 2 tokens",
                hint="Pass 0 to skip the evaluation.",
            )
        if self.eval_context < 2:
            raise InvalidInputError(f"eval_context is {self.eval_context}; a window needs at least 2 tokens")
        if self.max_kl is not None:
            if not self.max_kl >= 0:  # also catches NaN
                raise InvalidInputError(f"max_kl is {self.max_kl}; it must be zero or more")
            if self.eval_tokens == 0:
                raise InvalidInputError(
                    "max_kl was given, but the evaluation is switched off",
                    hint="Raise --eval-tokens above 0, or drop --max-kl.",
                )
        if self.calib_tokens < 2:
            raise InvalidInputError(f"calib_tokens is {self.calib_tokens}; calibration needs text")
        for use, path in (("evaluation", self.eval_text), ("calibration", self.calib_text)):
            if path is not None and not path.is_file():
                raise InvalidInputError(f"{use} text {path} does not exist or is not a file")
        if self.resume and self.overwrite:
            raise InvalidInputError(
                "resume and overwrite contradict each other",
                hint="--resume keeps what an interrupted run finished; --overwrite throws it away.",
            )

    @property
    def output_path(self) -> Path:
        """Where the artifact goes."""
        if self.output is not None:
            return self.output
        name = Path(self.model).name or Path(self.model).resolve().name
        return Path(f"{name}-{self.method}-{self.bits}bit" if self.method != "none" else f"{name}-none")

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide the bytes of the artifact: a resumed run must have the same."""
        same_bytes = {
            "output", "device", "overwrite", "resume", "dump_graphs", "max_kl", "model", "trust_remote_code",
        }  # fmt: skip
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in same_bytes}
        for key in ("eval_text", "calib_text"):
            values[key] = str(values[key].resolve()) if values[key] else None
        return values


def parse_bits(values: tuple[str, ...]) -> tuple[int | None, tuple[tuple[str, int], ...]]:
    """Split `--bits` values into the default width and the (pattern, bits) overrides.

    Raises:
        InvalidInputError: A value is neither a number nor PATTERN=NUMBER.
    """
    default: int | None = None
    overrides: list[tuple[str, int]] = []
    for value in values:
        pattern, equals, number = value.rpartition("=")
        try:
            bits = int(number)
        except ValueError:
            raise InvalidInputError(
                f"--bits {value!r} is not a number of bits",
                hint="Write --bits 4, or --bits 'PATTERN=8' for some layers.",
            ) from None
        if equals:
            overrides.append((pattern, bits))
        elif default is not None:
            raise InvalidInputError(f"--bits was given twice ({default} and {bits})")
        else:
            default = bits
    return default, tuple(overrides)
