"""What the user asked for, validated once, before any work is done."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.kernels.kv_bits import kv_format_of_bits

EMBEDDING_BITS = (8, 4)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
SENSITIVITIES = ("output", "weights")
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
        kv_bits: The KV cache: "16" as it is, "8" or "4" bits per value, or "fp8".
        method_options: Options of the method itself (for hqq: `solver`, `tail_fraction` …).
        eval_text: Text file for the quality figures; None means the text that ships.
        eval_tokens: Tokens of it to score; 0 skips the evaluation.
        eval_context: Window length in tokens.
        calib_text: Text file for methods that calibrate; None means the text that ships.
        calib_tokens: Tokens of it to use.
        max_kl: Fail when the mean KL divergence (nats per token) exceeds this.
        overwrite: Replace an existing artifact, or start an unfinished one anew.
        resume: Continue an unfinished compilation of the same configuration.
        fuse: Join ops of the lowered graph into fewer launches (`passes.lowering_passes`).
        dump_graphs: Folder for before/after listings of every pass.
        trust_remote_code: Let transformers run code that comes with the checkpoint.
        revision: Hub revision, when `model` is a hub id.
        max_context: Longest context to serve, for models whose rotary frequencies depend on it.
        emit: What to write, see `emit.targets`.
        target_bpw: Bits per weight of the quantized linears, met by a format for each of them.
        target_bytes: Size of the artifact, met in the same way.
        target_kl: KL divergence over the evaluation text, met at the smallest size found.
        sensitivity: How a target's choices are weighed: "output" on calibration text, "weights" without.
        report_plot: Where to draw the trade-off between size and loss of a target.
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
    kv_bits: str = "16"
    method_options: dict[str, Any] = field(default_factory=dict)
    eval_text: Path | None = None
    eval_tokens: int = 4096
    eval_context: int = 512
    calib_text: Path | None = None
    calib_tokens: int = 65536
    max_kl: float | None = None
    overwrite: bool = False
    resume: bool = False
    fuse: bool = True
    dump_graphs: Path | None = None
    trust_remote_code: bool = False
    revision: str | None = None
    max_context: int | None = None
    emit: tuple[str, ...] = ("artifact",)
    target_bpw: float | None = None
    target_bytes: int | None = None
    target_kl: float | None = None
    sensitivity: str = "output"
    report_plot: Path | None = None

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
        kv_format_of_bits(self.kv_bits)  # refuses what is not known
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
        self._check_target()
        if self.resume and self.overwrite:
            raise InvalidInputError(
                "resume and overwrite contradict each other",
                hint="--resume keeps what an interrupted run finished; --overwrite throws it away.",
            )

    def _check_target(self) -> None:
        targets = {"bits per weight": self.target_bpw, "bytes": self.target_bytes, "KL": self.target_kl}
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) > 1:
            raise InvalidInputError(
                f"two targets were given: {' and '.join(given)}", hint="Give --target-bpw, -size or -kl, one."
            )
        for name, value in given.items():
            if not 0 < value < float("inf"):
                raise InvalidInputError(f"a target of {value} {name} cannot be met")
        if self.method == "auto" and not given:
            raise InvalidInputError(
                "method auto needs a target",
                hint="Give --target-bpw, --target-size or --target-kl, or name a method.",
            )
        if self.target_kl is not None and self.eval_tokens == 0:
            raise InvalidInputError(
                "target_kl was given, but the evaluation is switched off", hint="Raise --eval-tokens above 0."
            )
        if self.sensitivity not in SENSITIVITIES:
            raise InvalidInputError(
                f"sensitivity {self.sensitivity!r} is not known", hint=f"Use {' or '.join(SENSITIVITIES)}."
            )
        if self.report_plot is not None and not given:
            raise InvalidInputError("a report plot was asked for, but there is no target to plot")

    @property
    def has_target(self) -> bool:
        """Whether formats are to be chosen for a target."""
        return any(target is not None for target in (self.target_bpw, self.target_bytes, self.target_kl))

    @property
    def output_path(self) -> Path:
        """Where the artifact goes."""
        if self.output is not None:
            return self.output
        name = Path(self.model).name or Path(self.model).resolve().name
        cache = "" if self.kv_format is None else f"-kv{self.kv_bits}"
        return Path(f"{name}-{self._weights_name}{cache}")

    @property
    def _weights_name(self) -> str:
        """How the weights are quantized, as it stands in the artifact's default name."""
        if self.target_bpw is not None:
            return f"{self.method}-{self.target_bpw:g}bpw"
        if self.target_bytes is not None:
            return f"{self.method}-{self.target_bytes / 1e6:g}MB"
        if self.target_kl is not None:
            return f"{self.method}-kl{self.target_kl:g}"
        return f"{self.method}-{self.bits}bit" if self.method != "none" else "none"

    @property
    def kv_format(self) -> str | None:
        """Format of the KV cache, None for a plain one."""
        return kv_format_of_bits(self.kv_bits)

    def fingerprint(self) -> dict[str, Any]:
        """The options that decide the bytes of the artifact: a resumed run must have the same."""
        same_bytes = {
            "output", "device", "overwrite", "resume", "dump_graphs", "max_kl", "model", "trust_remote_code",
            "emit", "report_plot",
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


def parse_size(text: str) -> int:
    """Bytes of a size such as "5GB" (decimal units), "4.5 GiB" (binary ones) or "300000".

    Raises:
        InvalidInputError: It is not of that form.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].upper())
    if not match or not unit:
        raise InvalidInputError(
            f"{text!r} is not a size", hint="Write 5GB, 4.5GiB, 800MB or a number of bytes."
        )
    return int(float(match[1]) * unit)
