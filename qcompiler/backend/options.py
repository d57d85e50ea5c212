"""What `torch.compile(options=…)` may say to the backend, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from qcompiler.kernels.errors import InvalidInputError
from qcompiler.layer_plan import matches
from qcompiler.methods.base import Method, get_method
from qcompiler.methods.calibrated import CalibratedMethod

COMPILERS = ("inductor", "eager")
# Output heads, and the routers of experts as transformers names them: a flipped choice costs a whole expert.
DEFAULT_SKIP = ("lm_head", "mlp.gate", "block_sparse_moe.gate", "router", "router.*", "shared_expert_gate")


@dataclass(frozen=True)
class BackendOptions:
    """Options of the backend.

    Attributes:
        method: Name of a quantization method that needs no calibration text.
        bits: Bits per weight code; None means the method's default.
        group_size: Input features per scale; 0 = one group per row; None = the method's default.
        method_options: The method's own options (for hqq: `solver`).
        skip: Shell patterns of linears that stay as they are. A head tied to an embedding always does.
        fuse: Fuse norms, rotary embedding, gated activations and sibling linears into our ops; False leaves
            all of it to the compiler.
        compiler: "inductor" for what the passes leave, or "eager" to run it as it is.
        inductor: Options for inductor, as `torch.compile` takes them for its own backend.
        mode: One of inductor's modes; set by `torch.compile(mode=…)`.
        lean: On a CPU, keep no dense copy beside packed codes.
    """

    method: str = "hqq"
    bits: int | None = None
    group_size: int | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    skip: tuple[str, ...] = DEFAULT_SKIP
    fuse: bool = True
    compiler: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None
    lean: bool = False

    @classmethod
    def of(cls, **given: Any) -> BackendOptions:
        """Check names, types and values.

        Raises:
            InvalidInputError: Names the option and what it takes.
        """
        known = {item.name for item in fields(cls)}
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                raise InvalidInputError(
                    f"backend qcompiler has no option {name!r}",
                    hint=f"Did you mean {near[0]!r}?"
                    if near
                    else f"Its options: {', '.join(sorted(known))}.",
                )
            wanted = _TYPES[name]
            if not isinstance(given[name], wanted) or (isinstance(given[name], bool) and bool not in wanted):
                names = " or ".join("None" if t is type(None) else t.__name__ for t in wanted)
                raise InvalidInputError(
                    f"option {name!r} of backend qcompiler takes {names}, not {given[name]!r}"
                )
        if "skip" in given:
            given["skip"] = (given["skip"],) if isinstance(given["skip"], str) else tuple(given["skip"])
        return cls(**given)

    def __post_init__(self) -> None:
        if self.compiler not in COMPILERS:
            raise InvalidInputError(
                f"option 'compiler' of backend qcompiler cannot be {self.compiler!r}",
                hint=f"Choose from {', '.join(COMPILERS)}.",
            )
        if self.compiler == "eager" and (self.mode is not None or self.inductor):
            raise InvalidInputError(
                "inductor's mode and options mean nothing with compiler='eager'", hint="Drop one of them."
            )
        self.resolved()

    def resolved(self) -> tuple[Method, Any, dict[str, Any]]:
        """The method, the settings of its format (None: nothing is quantized) and its checked options.

        Raises:
            InvalidInputError: There is no such method, or it has no such width, group size or option.
        """
        method = get_method(self.method)
        if isinstance(method, CalibratedMethod):
            raise InvalidInputError(
                f"method {self.method!r} calibrates on text, which the backend does not have",
                hint="Compile an artifact with qcompile, or choose a method like hqq.",
            )
        options = method.validate(self.method_options)
        if not method.quantizes:
            return method, None, options
        bits = method.default_bits if self.bits is None else self.bits
        return method, method.resolve_spec(bits, self.group_size, options), options

    def skip_reason(self, name: str) -> str | None:
        """Why the user wants the linear `name` left alone, if so."""
        return next((f"skip {pattern}" for pattern in self.skip if matches(pattern, name)), None)


_NONE = type(None)
_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "bits": (int, _NONE),
    "group_size": (int, _NONE),
    "method_options": (Mapping,),
    "skip": (str, list, tuple),
    "fuse": (bool,),
    "compiler": (str,),
    "inductor": (Mapping,),
    "mode": (str, _NONE),
    "lean": (bool,),
}
