"""A safe expression over the fields of a sample, such as `view == "PA" and labels["Edema"] == 1`. It is never run as code.

Python's parser reads it, and only the nodes named here are taken. A field that a sample lacks is unknown, as NULL is in SQL. So
is a comparison with it, and the `not` of that; a sample matches only if the whole is true. `x is None` asks whether x is lacking.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType
from typing import Any, NamedTuple

LABELS = "labels"
_KINDS = {
    "key": "text", "report": "text", "view": "text", "patient": "text", "dataset": "text", "source": "text",
    "width": "number", "height": "number", "age": "number", LABELS: "labels", "boxes": "list",
}  # fmt: skip
FIELDS = tuple(_KINDS)
"""The fields that an expression may name: those of `schema.sample_document`, and the sample's key."""

_CONSTANTS: dict[type, str] = {str: "text", int: "number", float: "number", NoneType: "nothing"}  # no bool
_LONGEST = 10_000  # characters
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}  # fmt: skip
_CONTAINS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.In: lambda item, whole: item in whole, ast.NotIn: lambda item, whole: item not in whole,
}  # fmt: skip

Values = Mapping[str, Any]
"""A sample's fields (`document.named_fields`): None, or no entry, for one that it lacks."""


@dataclass(frozen=True)
class Expression:
    """A checked expression. text: as it was given."""

    text: str
    _truth: Callable[[Values], bool | None]

    def matches(self, values: Values) -> bool:
        """Whether a sample with these fields is meant. False if a field that decides it is lacking."""
        return self._truth(values) is True


class _Term(NamedTuple):
    """A part of an expression. kind: text, number, list, labels, truth, nothing (None), or `[text]` and `[number]` for those that
    are listed; value: of a sample, None if unknown."""

    kind: str
    value: Callable[[Values], Any]
    source: str


def parse_expression(text: str, label_names: Collection[str]) -> Expression:
    """The expression in `text`, for samples with these labels. ValueError in one line, which names the place, and for an unknown
    field or label the nearest one."""
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST:,} characters; name samples in a list (--leave-out) instead")
        term = _Parser(label_names).term(_tree(text))
        if term.kind != "truth":
            raise ValueError(f"{term.source} is a {term.kind}, and nothing is asked of it: compare it, as in {_EXAMPLE}")
    except RecursionError as error:
        raise ValueError("the expression is nested too deeply") from error
    except ValueError as error:
        shown = text if len(text) <= 100 else f"{text[:100]}..."
        raise ValueError(f"expression `{' '.join(shown.split())}`: {error}") from error
    return Expression(text, term.value)


_EXAMPLE = """`view == "PA" and labels["Edema"] == 1`"""


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{error.msg} at character {error.offset}; write for example {_EXAMPLE}") from error
    except MemoryError as error:  # what Python's parser raises for deep nesting
        raise RecursionError from error


class _Parser:
    def __init__(self, label_names: Collection[str]) -> None:
        self._labels = sorted(label_names)

    def term(self, node: ast.expr) -> _Term:
        """The meaning of a node. ValueError for every node that is not one of these."""
        source = f"`{ast.unparse(node)}`"
        match node:
            case ast.BoolOp(op=ast.And() | ast.Or(), values=parts):
                found = _joined([self._truth(part) for part in parts], isinstance(node.op, ast.Or), source)
            case ast.UnaryOp(op=ast.Not(), operand=part):
                truth = self._truth(part).value
                found = _Term("truth", lambda values: None if (true := truth(values)) is None else not true, source)
            case ast.Compare(left=left, ops=operators, comparators=others):
                sides = [self.term(side) for side in (left, *others)]
                pairs = zip(sides, operators, sides[1:], strict=False)
                found = _joined([_compared(one, op, other) for one, op, other in pairs], False, source)
            case ast.Name(id=name):
                found = self._field(name, source)
            case ast.Subscript(value=ast.Name(id="labels"), slice=ast.Constant(value=str(name))):
                found = self._label(name, source)
            case ast.Subscript(value=ast.Name(id=name)) if name not in _KINDS:
                found = self._field(name, source)  # which says so
            case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]):
                found = _length(self.term(argument), source)
            case ast.Constant(value=value) if type(value) in _CONSTANTS:
                found = _Term(_CONSTANTS[type(value)], lambda _: value, source)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value) | float(value))) if not isinstance(value, bool):
                found = _Term("number", lambda _: -value, source)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                found = _list([self.term(item) for item in items], source)
            case _:
                allowed = 'fields, labels["NAME"], len(...), texts, numbers, lists, comparisons, and, or, not'
                raise ValueError(f"{source} is not allowed: an expression may hold {allowed}")
        return found

    def _truth(self, node: ast.expr) -> _Term:
        term = self.term(node)
        if term.kind != "truth":
            raise ValueError(f"{term.source} is a {term.kind}: compare it, as in {_EXAMPLE}")
        return term

    def _field(self, name: str, source: str) -> _Term:
        if name not in _KINDS:
            raise ValueError(f"there is no field {name!r}; {_nearest(name, FIELDS)}")
        return _Term(_KINDS[name], lambda values: values.get(name), source)

    def _label(self, name: str, source: str) -> _Term:
        if name not in self._labels:
            raise ValueError(f"there is no label {name!r}; {_nearest(name, self._labels)}")
        return _Term("number", lambda values: (values.get(LABELS) or {}).get(name), source)


def _joined(parts: list[_Term], stop_at: bool, source: str) -> _Term:
    """Or (stop_at: True) and and (False) of three values: true, false, unknown."""

    def value(values: Values) -> bool | None:
        known: bool | None = not stop_at
        for part in parts:
            found = part.value(values)
            if found is stop_at:
                return found
            known = None if found is None else known
        return known

    return _Term("truth", value, source)


def _compared(left: _Term, op: ast.cmpop, right: _Term) -> _Term:
    if "nothing" in (left.kind, right.kind) or isinstance(op, ast.Is | ast.IsNot):
        if right.kind != "nothing" or left.kind == "nothing" or not isinstance(op, ast.Is | ast.IsNot):
            raise ValueError(f"{left.source} against {right.source}: ask for a lacking field by `is None` or `is not None`")
        lacking = isinstance(op, ast.Is)
        return _Term("truth", lambda values: (left.value(values) is None) == lacking, left.source)
    compare = _COMPARE.get(type(op))
    if compare is not None:
        fits = left.kind == right.kind and left.kind in ("text", "number")
    else:
        compare = _CONTAINS[type(op)]
        fits = right.kind == f"[{left.kind}]" or left.kind == right.kind == "text"
    if not fits:
        raise ValueError(f"{left.source} is a {left.kind}, {right.source} is a {right.kind}: they cannot be compared so")

    def value(values: Values) -> bool | None:
        one, other = left.value(values), right.value(values)
        return None if one is None or other is None else compare(one, other)

    return _Term("truth", value, left.source)


def _length(of: _Term, source: str) -> _Term:
    if of.kind not in ("text", "list"):
        raise ValueError(f"{of.source} is a {of.kind}: it has no len; take that of report or boxes")
    return _Term("number", lambda values: None if (found := of.value(values)) is None else len(found), source)


def _list(items: list[_Term], source: str) -> _Term:
    kinds = {item.kind for item in items}
    if len(kinds) != 1 or not kinds <= {"text", "number"}:
        raise ValueError(f"{source} must list texts, or numbers")
    constants = tuple(item.value({}) for item in items)
    if None in constants:
        raise ValueError(f"{source} may list texts and numbers, but no fields")
    return _Term(f"[{kinds.pop()}]", lambda _: constants, source)


def _nearest(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, known, n=3) or get_close_matches(name.lower(), known, n=3, cutoff=0.0)
    return f"nearest: {', '.join(map(repr, near))}" if near else "this set has none"
