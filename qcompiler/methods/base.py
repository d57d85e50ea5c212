"""What a quantization method is, and the registry of methods by name.

A method decides the numbers of one weight at a time, on plain tensors; a storage format
(`qcompiler.kernels.formats`) keeps them. A method is one class in one file: subclass `Method`
and either list it in `_BUILT_IN` or, from another package, declare an entry point in the group
`qcompiler.methods` whose name is the method's and whose object is the class.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from qcompiler.kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

ENTRY_POINT_GROUP = "qcompiler.methods"

# name -> module and class; imported at first use, so that listing methods stays light.
_BUILT_IN = {
    "aqlm": ("qcompiler.methods.aqlm", "AQLM"),
    "auto": ("qcompiler.allocation.method", "Auto"),
    "bnb": ("qcompiler.methods.bnb", "BitsAndBytes"),
    "eetq": ("qcompiler.methods.eetq", "Eetq"),
    "gptq": ("qcompiler.methods.gptq", "GPTQ"),
    "hqq": ("qcompiler.methods.hqq", "HQQ"),
    "none": ("qcompiler.methods.none", "Unquantized"),
    "rtn": ("qcompiler.methods.rtn", "RoundToNearest"),
}


@dataclass(frozen=True)
class MethodOption:
    """One option of a method.

    Attributes:
        default: Value when the user gives none; its type is the option's type.
        choices: Allowed values, or None when every value of the type will do.
        help: One line for the command line's help.
    """

    default: bool | int | float | str
    choices: tuple[bool | int | float | str, ...] | None = None
    help: str = ""


class Method(ABC):
    """Decides the numbers of quantized weights.

    Class attributes:
        name: What the user types after `--method`.
        summary: One line for listings.
        format_name: Storage format that the tensors are in.
        bits: Bit widths on offer.
        default_group_size: Group size when the user names none.
        options: Options by name.
        quantizes: False for the baseline that leaves weights as they are.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    format_name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    default_group_size: ClassVar[int] = 64
    options: ClassVar[Mapping[str, MethodOption]] = {}
    quantizes: ClassVar[bool] = True

    @property
    def default_bits(self) -> int:
        """Width when the user names none: 4 where the method has it, else its first."""
        return 4 if 4 in self.bits else self.bits[0]

    @abstractmethod
    def resolve_spec(
        self, bits: int, group_size: int | None = None, options: Mapping[str, Any] | None = None
    ) -> Any:
        """The format's settings for a weight stored in `bits` bits.

        Args:
            bits: Bits per code.
            group_size: Input features per scale; 0 = one group per row; None = the method's default.
            options: The method's options, some of which decide the format's settings; see `validate`.

        Raises:
            InvalidInputError: The method or its format has no such width or group size.
        """

    @abstractmethod
    def quantize(
        self, weight: Tensor, spec: Any, options: Mapping[str, Any] | None = None, *, name: str = "weight"
    ) -> dict[str, Tensor]:
        """Quantize one weight; the same input gives the same tensors, bit for bit.

        Args:
            weight: [out_features, in_features], floating point, on the device to work on.
            spec: What `resolve_spec` gave.
            options: The method's options; see `validate`.
            name: The tensor's name, for error messages.

        Returns:
            The format's tensors by name, on the weight's device.

        Raises:
            InvalidInputError: Wrong options, or a weight that is not a finite float matrix.
        """

    def settle(
        self,
        bits: int,
        group_size: int | None,
        options: Mapping[str, Any],
        samples: Callable[[], list[Tensor]],
    ) -> dict[str, Any]:
        """Options with what depends on the model's weights decided; most methods have nothing to decide.

        Args:
            bits: Bits per code of most weights.
            group_size: As for `resolve_spec`.
            options: The method's options, complete.
            samples: Reads rows of some of the weights to quantize, each [rows, in_features], when called.
        """
        return dict(options)

    def plain(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options for weights that only `format_name` has ops for: experts and embeddings."""
        return dict(options)

    def validate(self, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Check options and fill in the defaults.

        Raises:
            InvalidInputError: An option that the method does not have, or a value of the wrong type or
                outside of the choices.
        """
        resolved: dict[str, Any] = {key: option.default for key, option in self.options.items()}
        for key, value in (options or {}).items():
            option = self.options.get(key)
            if option is None:
                known = ", ".join(sorted(self.options)) or "none"
                raise InvalidInputError(
                    f"method {self.name!r} has no option {key!r}", hint=f"Its options: {known}."
                )
            if type(value) is not type(option.default):
                raise InvalidInputError(
                    f"option {key!r} of method {self.name!r} takes {type(option.default).__name__}, "
                    f"not {value!r}"
                )
            if option.choices is not None and value not in option.choices:
                raise InvalidInputError(
                    f"option {key!r} of method {self.name!r} cannot be {value!r}",
                    hint=f"Choose from {', '.join(map(str, option.choices))}.",
                )
            resolved[key] = value
        return resolved

    def check_bits(self, bits: int) -> None:
        """Refuse a width that the method does not offer.

        Raises:
            InvalidInputError: Names the widths on offer.
        """
        if bits not in self.bits:
            raise InvalidInputError(
                f"method {self.name!r} has no {bits}-bit weights",
                hint=f"Choose bits from {', '.join(map(str, self.bits))}.",
            )


_registered: dict[str, type[Method]] = {}


def register_method(cls: type[Method]) -> type[Method]:
    """Make a method known under its name; usable as a class decorator.

    Raises:
        InvalidInputError: The name is taken by another method.
    """
    if cls.name in _BUILT_IN or _registered.setdefault(cls.name, cls) is not cls:
        raise InvalidInputError(f"a method named {cls.name!r} is already registered")
    return cls


def method_names() -> list[str]:
    """Names of all methods: built in, registered, and from installed plug-ins."""
    plugins = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return sorted({*_BUILT_IN, *_registered, *plugins})


def get_method(name: str) -> Method:
    """The method of a name; built-in ones win over plug-ins of the same name.

    Raises:
        InvalidInputError: No such method, or a plug-in that does not load.
    """
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        method: Method = getattr(importlib.import_module(module), attribute)()
        return method
    if name in _registered:
        return _registered[name]()
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return _load_plugin(entry)
    raise InvalidInputError(
        f"there is no quantization method {name!r}", hint=f"Known methods: {', '.join(method_names())}."
    )


def _load_plugin(entry: Any) -> Method:
    try:
        cls = entry.load()
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(
            f"the plug-in {entry.value!r} of method {entry.name!r} does not load: {error}",
            hint="Reinstall or remove the package that brought it.",
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise InvalidInputError(
            f"the plug-in {entry.value!r} of method {entry.name!r} is not a Method class",
            hint="The entry point must name a subclass of qcompiler.methods.base.Method.",
        )
    return cls()
