"""A small typed program: what a problem asks for, before any language writes it down.

An expression is a `Name`, a `Number`, a `Text` literal or an `Operation`; a body is a `Choice`, a `Fold`, a `Loop` or a `Reorder`.
`evaluate` runs a function on Python values: it is the reference that every language's rendering is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Name:
    name: str


@dataclass(frozen=True)
class Number:
    value: int


@dataclass(frozen=True)
class Text:
    value: str


@dataclass(frozen=True)
class Operation:
    """An operator of `OPERATORS` on its arguments; "if" takes (condition, yes, no)."""

    operator: str
    arguments: tuple[Expression, ...]


Expression = Name | Number | Text | Operation


@dataclass(frozen=True)
class Range:
    """The integers from `low` to `high`, both included; high >= low always holds in a case."""

    low: Expression
    high: Expression


@dataclass(frozen=True)
class Choice:
    """Return the value of the first branch whose condition holds, else `otherwise`."""

    otherwise: Expression
    branches: tuple[tuple[Expression, Expression], ...] = ()


@dataclass(frozen=True)
class Fold:
    """Go through `source` (a list parameter or a range), keep the items that pass `kept`, map each by `mapped`, gather by `kind`.

    kind: "sum", "product", "count", "max", "min" (no `kept`), "any", "all" (need `kept`, no `mapped`), "collect" (a list).
    `after` turns the gathered number, called by `result`, into what is returned.
    """

    kind: str
    source: Name | Range
    item: str
    item_type: str
    kept: Expression | None = None
    mapped: Expression | None = None
    after: Expression | None = None

    @property
    def result(self) -> str:
        return RESULT_NAMES[self.kind]


RESULT_NAMES = {
    "sum": "total",
    "product": "product",
    "count": "count",
    "max": "largest",
    "min": "smallest",
    "any": "found",
    "all": "every",
    "collect": "result",
}


@dataclass(frozen=True)
class Loop:
    """Start the `variables`, repeat the `updates` (all from the old values) over `source` or while it holds, return `result`."""

    variables: tuple[tuple[str, Expression], ...]
    source: Range | Operation
    updates: tuple[tuple[str, Expression], ...]
    result: Expression


@dataclass(frozen=True)
class Reorder:
    """A list made of the items of another: kind "reverse", "sort", "take" or "drop" (the first `number` items)."""

    kind: str
    source: str
    item_type: str
    number: int = 0


Body = Choice | Fold | Loop | Reorder


@dataclass(frozen=True)
class Function:
    name: str
    parameters: tuple[tuple[str, str], ...]  # (name, type) in order
    returns: str
    body: Body


OPERATORS: dict[str, Callable[..., Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,  # of non-negative numbers only: languages differ below zero
    "%": lambda a, b: a % b,  # of non-negative numbers, or compared with 0
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "if": lambda condition, yes, no: yes if condition else no,
    "even": lambda a: a % 2 == 0,
    "odd": lambda a: a % 2 != 0,
    "abs": abs,
    "min": min,
    "max": max,
    "length": len,  # of a text
    "size": len,  # of a list
    "first": lambda items: items[0],
    "last": lambda items: items[-1],
    "upper": str.upper,
    "lower": str.lower,
    "reverse": lambda text: text[::-1],
    "repeat": lambda text, number: text * number,
    "concat": lambda *texts: "".join(texts),
    "same_text": lambda a, b: a == b,
    "count_letter": str.count,
    "starts_with": str.startswith,
    "ends_with": str.endswith,
    "contains": lambda text, part: part in text,
    "replace": str.replace,
    "first_letters": lambda text, number: text[:number],
    "last_letters": lambda text, number: text[len(text) - number :],  # of a text at least that long
    "join": lambda texts, separator: separator.join(texts),
}

OPPOSITES = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">", "even": "odd", "odd": "even"}


def operation(operator: str, *arguments: Expression | int | str) -> Operation:
    """An `Operation`; plain ints become numbers, plain strings become names (write `Text(…)` for a literal)."""
    plain = {int: Number, str: Name}
    return Operation(operator, tuple(plain[type(a)](a) if type(a) in plain else a for a in arguments))


def opposite(condition: Expression) -> Expression:
    """The condition that holds where this one does not."""
    if condition.operator in ("and", "or"):
        return Operation("or" if condition.operator == "and" else "and", tuple(opposite(a) for a in condition.arguments))
    return Operation(OPPOSITES[condition.operator], condition.arguments)


def names_in(expression: Expression) -> set[str]:
    """The variables an expression reads."""
    if isinstance(expression, Operation):
        return set().union(*(names_in(a) for a in expression.arguments))
    return {expression.name} if isinstance(expression, Name) else set()


def in_sequence(loop: Loop) -> bool:
    """Whether the updates give the same values one after another as all at once."""
    return all(name not in names_in(later) for i, (name, _) in enumerate(loop.updates) for _, later in loop.updates[i + 1 :])


def evaluate(function: Function, arguments: Iterable[Any]) -> Any:
    """What the function returns for these Python values."""
    variables = dict(zip((name for name, _ in function.parameters), arguments, strict=True))
    body = function.body
    if isinstance(body, Choice):
        for condition, value in body.branches:
            if value_of(condition, variables):
                return value_of(value, variables)
        return value_of(body.otherwise, variables)
    if isinstance(body, Fold):
        return _fold(body, variables)
    if isinstance(body, Loop):
        return _loop(body, variables)
    items = list(variables[body.source])
    return {
        "reverse": items[::-1],
        "sort": sorted(items),
        "take": items[: body.number],
        "drop": items[body.number :],
    }[body.kind]


def value_of(expression: Expression, variables: Mapping[str, Any]) -> Any:
    if isinstance(expression, Name):
        return variables[expression.name]
    if isinstance(expression, Operation):
        return OPERATORS[expression.operator](*(value_of(a, variables) for a in expression.arguments))
    return expression.value


def _items(source: Expression | Range, variables: Mapping[str, Any]) -> Iterator[Any]:
    if isinstance(source, Range):
        return iter(range(value_of(source.low, variables), value_of(source.high, variables) + 1))
    return iter(variables[source.name])


def _fold(fold: Fold, variables: dict[str, Any]) -> Any:
    scopes = [{**variables, fold.item: item} for item in _items(fold.source, variables)]
    if fold.kind in ("any", "all"):
        return {"any": any, "all": all}[fold.kind](value_of(fold.kept, scope) for scope in scopes)
    kept = [scope for scope in scopes if fold.kept is None or value_of(fold.kept, scope)]
    gathered = [value_of(fold.mapped or Name(fold.item), scope) for scope in kept]
    if fold.kind == "product":
        value = 1
        for factor in gathered:
            value *= factor
    else:
        value = {"sum": sum, "count": len, "max": max, "min": min, "collect": list}[fold.kind](gathered)
    return value if fold.after is None else value_of(fold.after, {**variables, fold.result: value})


def _loop(loop: Loop, variables: dict[str, Any]) -> Any:
    scope = {**variables, **{name: value_of(start, variables) for name, start in loop.variables}}
    if isinstance(loop.source, Range):
        for i in _items(loop.source, variables):
            scope.update({name: value_of(update, {**scope, "i": i}) for name, update in loop.updates})
    else:
        while value_of(loop.source, scope):
            scope.update({name: value_of(update, scope) for name, update in loop.updates})
    return value_of(loop.result, scope)
