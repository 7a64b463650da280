"""A jinja2 environment for templates from anywhere: no attribute of Python's own, and no value larger than a prompt may
be.

jinja2's sandbox guards attributes, not sizes: `'a'.center(10 ** 10)`, `'%9999999999d' % 1` or a doubling `~` in a loop
would take the process down with them. (Neither time is bounded, for a template may loop, nor how many values it keeps.)
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_CHARACTERS = 10_000_000
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "format", "format_map"})
_BINARY = frozenset({"encode", "to_bytes"})
"""Bytes have all of these too, and nothing else that makes them is in reach."""
_FILTERS = ("center", "format", "indent", "batch", "slice", "wordwrap", "urlize", "pprint")
MAX_ITEMS = 1_000_000
MAX_BITS = 4096


def joined(pieces: Iterable[Any]) -> str:
    """`"".join` of a bounded result."""
    texts = [str(piece) for piece in counted(list(pieces))]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise SecurityError(f"a text of over {MAX_CHARACTERS} characters")
    return "".join(texts)


def replaced(text: str, old: str, new: str, count: int | None = None) -> str:
    """`text.replace(old, new)` of a bounded result."""
    text, old, new = str(text), str(old), str(new)
    if text.count(old) * len(new) > MAX_CHARACTERS:
        raise SecurityError(f"replace could make a text of over {MAX_CHARACTERS} characters")
    return text.replace(old, new, -1 if count is None else count)


def _joined_with(values: Iterable[Any], between: str = "") -> str:
    pieces = [str(value) for value in counted(list(values))]
    joined([*pieces, *[between] * (len(pieces) - 1)])
    return between.join(pieces)


class _BoundedConcat(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_List, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        # The names that a loop or an assignment sets are a tuple too.
        visit = super().visit_Tuple
        visit(node, frame) if node.ctx == "store" else self._counted(visit, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._counted(super().visit_Dict, node, frame)

    def _counted(self, visit: Any, node: nodes.Node, frame: Frame) -> None:
        self.write("environment.counted(")
        visit(node, frame)
        self.write(")")


def counted(value: Any) -> Any:
    """The value, unless it is a nest of over MAX_ITEMS, or of over MAX_CHARACTERS in all its texts: shared parts are
    few in memory and many in text.
    """
    left, found, characters = [value], 0, 0
    while left:
        item = left.pop()
        if isinstance(item, str):
            characters += len(item)
            if characters > MAX_CHARACTERS:
                raise SecurityError(f"a value of over {MAX_CHARACTERS} characters")
        elif isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, KeysView, ValuesView, ItemsView)):
            left += item
        elif isinstance(item, Namespace):
            left.append(item._Namespace__attrs)
        found += 1
        if found + len(left) > MAX_ITEMS:
            raise SecurityError(f"a value of over {MAX_ITEMS} items")
    return value


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are counted."""

    @wraps(function)  # with what jinja2 is to pass to it
    def call(*arguments: Any, **named: Any) -> Any:
        return counted(function(*counted(arguments), **counted(named)))

    return call


class Sandbox(ImmutableSandboxedEnvironment):
    """Operators, methods and filters that could make a huge value out of a small one are refused or bounded."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})
    code_generator_class = _BoundedConcat
    concat = staticmethod(joined)
    counted = staticmethod(counted)

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=counted, **options)
        del self.globals["lipsum"]
        kept = {name: function for name, function in self.filters.items() if name not in _FILTERS}
        self.filters = {
            name: _bounded(function) for name, function in (kept | {"replace": replaced, "join": _joined_with}).items()
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if (isinstance(obj, str) and attr in _PADDING) or attr in _BINARY:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sequences = [value for value in (left, right) if isinstance(value, (str, list, tuple))]
        if operator == "**" or (operator == "*" and sequences) or (operator == "%" and isinstance(left, str)):
            raise SecurityError(f"the operator {operator} is not allowed on these values")
        if operator == "*" and all(isinstance(value, int) and value.bit_length() > MAX_BITS for value in (left, right)):
            raise SecurityError("the operator * is not allowed on numbers this large")
        if operator == "+" and sum(map(len, sequences)) > MAX_CHARACTERS:
            raise SecurityError(f"a value of over {MAX_CHARACTERS} items")
        return counted(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str) and name == "replace":
            return replaced(text, *args, **kwargs)
        if isinstance(text, str) and name == "join":
            return _joined_with(args[0], text)
        return counted(super().call(context, obj, *args, **kwargs))
