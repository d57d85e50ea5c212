"""Chat templates: rendered as transformers renders them, in a sandbox with bounds on size and time.

A template is part of the artifact, never of a request, but it is still a
program that somebody else wrote. Loops and macros get a check of the clock,
and repetition and concatenation one of the size, woven into the parsed
template, so that neither an endless loop nor a doubling string goes far.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import do_format
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from qcompiler.kernels.errors import ArtifactError, InvalidInputError

MAX_TEMPLATE = 1 << 20
MAX_OUTPUT = 16 << 20
MAX_SECONDS = 5.0
MAX_MESSAGES = 10_000
MAX_WIDTH = 10_000
_WIDE = re.compile(r"\d{5,}")
_PADDING = ("ljust", "rjust", "center", "zfill", "expandtabs")
_TICK, _JOIN = "__qc_tick", "__qc_join"


class _LimitError(Exception):
    """A template went beyond a bound."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source, from tokenizer_config.json or chat_template.jinja.
        special_tokens: bos_token, eos_token ... as the template sees them.
        max_seconds: Time that one rendering may take.

    Raises:
        ArtifactError: too large, or not a template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        *,
        max_seconds: float = MAX_SECONDS,
    ):
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE:
            raise ArtifactError(f"chat template: larger than {MAX_TEMPLATE} characters, or not text")
        self.special_tokens = dict(special_tokens or {})
        self._max_seconds = max_seconds
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError) as e:
            raise ArtifactError(f"chat template: {type(e).__name__}: {str(e)[:200]}") from e

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: Objects with role and content, in order.
            add_generation_prompt: End with what introduces the assistant's turn.
            tools: Tools as JSON schemas.
            documents: Documents with title and text.
            variables: Further variables that the template reads.

        Raises:
            InvalidInputError: no messages, a malformed one, the template's own `raise_exception`, or a bound.
        """
        if not isinstance(messages, (list, tuple)) or not messages or len(messages) > MAX_MESSAGES:
            raise InvalidInputError(f"messages must be a list of 1 to {MAX_MESSAGES}")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidInputError("each message must be an object with a role")
        context = {
            **self.special_tokens,
            **variables,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        self._environment.start(self._max_seconds)
        try:
            pieces, size = [], 0
            for piece in self._template.generate(**context):
                size += len(piece)
                if size > MAX_OUTPUT:
                    raise _LimitError(f"gives more than {MAX_OUTPUT} characters")
                pieces.append(piece)
        except _LimitError as e:
            raise InvalidInputError(f"chat template {e}") from None
        except TemplateError as e:
            raise InvalidInputError(f"chat template: {str(e)[:500]}") from e
        except RecursionError:
            raise InvalidInputError("chat template recurses without end") from None
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            raise InvalidInputError(f"chat template: {type(e).__name__}: {str(e)[:200]}") from e
        return "".join(pieces)


def find_template(
    config: Mapping[str, Any] | None, jinja: str | None, *, name: str = "default"
) -> str | None:
    """A model's template: chat_template.jinja, else `chat_template` of tokenizer_config.json, else None."""
    if jinja is not None:
        return jinja
    entry = (config or {}).get("chat_template")
    if isinstance(entry, list):  # several by name
        named = {e.get("name"): e.get("template") for e in entry if isinstance(e, dict)}
        entry = named.get(name)
    return entry if isinstance(entry, str) else None


# Older names for a message's reasoning; templates read `reasoning_content` or `thinking`.
_REASONING = ("reasoning_content", "reasoning", "thinking")


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as the call block that transformers makes of it has.
        return nodes.Scope(body).set_lineno(line)


class _SafeNamespace(Namespace):
    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"{name!r}: names that begin with an underscore are refused")
        super().__setitem__(name, value)


class _Weave(NodeTransformer):
    """Puts the clock into loops and macros and the size check into `~`."""

    def _ticked(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = nodes.Output([nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)])
        node.body.insert(0, tick.set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticked  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_JOIN, "load"), node.nodes, [], None, None).set_lineno(node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._clock = threading.local()
        self.filters.update(tojson=_tojson)
        for name in ("center", "indent"):  # widths out of nothing
            self.filters[name] = _narrow(self.filters[name])
        self.filters["format"] = _format
        self.globals.update(
            {
                "raise_exception": _raise,
                "strftime_now": lambda format: datetime.now().strftime(format),
                "namespace": _SafeNamespace,
                _TICK: self._tick,
                _JOIN: self._join,
            }
        )

    def start(self, seconds: float) -> None:
        self._clock.end = time.monotonic() + seconds

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Weave().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 1 << 16 and abs(right) <= 64):
            raise _LimitError("raises a large number to a power")
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise _LimitError("formats a very wide string")
        size = _length(left) + _length(right)
        if operator == "*":
            number = left if isinstance(left, int) else right if isinstance(right, int) else 0
            size = max(size, size * max(0, number))
        if size > MAX_OUTPUT:
            raise _LimitError(f"makes a value longer than {MAX_OUTPUT}")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        method = getattr(obj, "__wrapped__", obj)
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            name = method.__name__
            wide = name in _PADDING and any(
                isinstance(a, int) and a > MAX_WIDTH for a in (*args, *kwargs.values())
            )
            grown = (
                name in ("replace", "join") and len(text) * max(map(_length, args), default=0) > MAX_OUTPUT
            )
            if wide or grown or (name in ("format", "format_map") and _WIDE.search(text)):
                raise _LimitError("makes a very long string")
        return super().call(context, obj, *args, **kwargs)

    def _tick(self) -> str:
        if time.monotonic() > self._clock.end:
            raise _LimitError("takes too long")
        return ""

    def _join(self, *parts: Any) -> str:
        texts = [str(p) for p in parts]
        if sum(map(len, texts)) > MAX_OUTPUT:
            raise _LimitError(f"makes a value longer than {MAX_OUTPUT}")
        return "".join(texts)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _narrow(filter_: Any) -> Any:
    def narrow(value: Any, width: Any = 4, *args: Any, **kwargs: Any) -> Any:
        amount = width if isinstance(width, int) else len(width)
        if amount > MAX_WIDTH:
            raise _LimitError(f"pads by more than {MAX_WIDTH}")
        return filter_(value, width, *args, **kwargs)

    return narrow


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    if _WIDE.search(value):
        raise _LimitError("formats a very wide string")
    return str(do_format(value, *args, **kwargs))


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; a prompt is not HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
