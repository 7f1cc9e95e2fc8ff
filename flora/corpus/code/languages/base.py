"""What all ten languages share: precedence, templates, and the plain imperative way to write a body."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from flora.corpus.code.nodes import (
    Choice,
    Expression,
    Fold,
    Function,
    Loop,
    Name,
    Number,
    Operation,
    Range,
    Reorder,
    Text,
    in_sequence,
    opposite,
)

ATOM = 9
PRECEDENCE = {"if": 0, "or": 1, "and": 2}
PRECEDENCE |= dict.fromkeys(("==", "!=", "<", "<=", ">", ">=", "even", "odd", "same_text"), 4)
PRECEDENCE |= {"concat": 5, "+": 5, "-": 5, "*": 6, "//": 6, "%": 6}
INFIX = frozenset(("or", "and", "==", "!=", "<", "<=", ">", ">=", "same_text", "+", "-", "*", "//", "%"))


class _Argument:
    """An argument in a template: {0} as a receiver or operand, {0:free} between delimiters.

    Of a text literal also {0:letter} as a character, {0:bare} without quotes, {0:count} for its length.
    """

    def __init__(self, language: Language, expression: Expression) -> None:
        self.language, self.expression = language, expression

    def __format__(self, form: str) -> str:
        if form == "letter":
            return self.language.letter(self.expression.value)
        if form == "bare":
            return str(self.expression.value)
        if form == "count":
            return str(len(self.expression.value))
        return self.language.write(self.expression, 0 if form == "free" else ATOM)


class Language(ABC):
    """One programming language: how it writes the functions of `nodes`, and how such a program is run and checked.

    A subclass gives the syntax as data (`types`, `symbols`, `templates`, …) and overrides what its idiom does differently.
    """

    tag: str
    name: str
    comment: str  # starts the line that describes the task
    suffix: str  # of a source file
    command: tuple[str, ...] = ()  # runs a source file, given as the last argument
    header = ""  # what a complete program has before the function
    indent = "    "
    end = ";"  # of a statement
    closing = "}"  # of a block
    true, false = "true", "false"
    types: Mapping[str, str] = {}
    symbols: Mapping[str, str] = {"and": "&&", "or": "||", "//": "/", "same_text": "=="}
    templates: Mapping[str, str] = {}
    looser: Mapping[str, int] = {}  # precedence where it is not an atom for a template, not the usual one for the rest

    # expressions

    def variable(self, name: str) -> str:
        return name

    def text(self, value: str) -> str:
        return json.dumps(value)

    def letter(self, value: str) -> str:
        return f"'{value}'"

    def write(self, expression: Expression, above: int = 0) -> str:
        """The expression as source, in parentheses where an operator of precedence `above` would tear it apart."""
        if isinstance(expression, Name):
            return self.variable(expression.name)
        if isinstance(expression, Number):
            return str(expression.value)
        if isinstance(expression, Text):
            return self.text(expression.value)
        source = self.write_operation(expression)
        return f"({source})" if self.precedence(expression.operator) < above else source

    def precedence(self, operator: str) -> int:
        if operator in self.templates:
            return self.looser.get(operator, ATOM)
        return self.looser.get(operator, PRECEDENCE.get(operator, ATOM))

    def write_operation(self, expression: Operation) -> str:
        operator, arguments = expression.operator, expression.arguments
        if operator in self.templates:
            return self.templates[operator].format(*(_Argument(self, a) for a in arguments))
        if operator in INFIX:
            level = PRECEDENCE[operator]
            left, right = self.write(arguments[0], level), self.write(arguments[1], level + 1)
            return f"{left} {self.symbols.get(operator, operator)} {right}"
        if operator in ("even", "odd"):
            return self.write(Operation("==" if operator == "even" else "!=", (Operation("%", (*arguments, Number(2))), Number(0))))
        if operator in ("min", "max"):
            return self.extreme(operator, [self.write(a) for a in arguments])
        if operator == "concat":
            return self.concat(arguments)
        if operator == "if":
            condition, yes, no = (self.write(a, 1) for a in arguments)
            return f"{condition} ? {yes} : {no}"
        raise KeyError(f"{self.name} has no way to write {operator!r}")

    def extreme(self, operator: str, arguments: list[str]) -> str:
        return f"{operator}({', '.join(arguments)})"

    def concat(self, arguments: tuple[Expression, ...]) -> str:
        return " + ".join(self.write(a, 5) for a in arguments)

    # statements; each gives lines without indentation

    @abstractmethod
    def signature(self, function: Function) -> str:
        """The line or lines that open the function."""

    def give(self, source: str) -> str:
        return f"return {source}{self.end}"

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"{self.variable(name)} = {source}{self.end}"

    def assign(self, name: str, value: Expression) -> str:
        if isinstance(value, Operation) and value.operator in ("+", "-", "*", "//") and value.arguments[0] == Name(name):
            if value.operator != "//" or "//" not in self.templates:
                symbol = self.symbols.get(value.operator, value.operator)
                return f"{self.variable(name)} {symbol}= {self.write(value.arguments[1])}{self.end}"
        return f"{self.variable(name)} = {self.write(value)}{self.end}"

    def assign_together(self, updates: tuple[tuple[str, Expression], ...]) -> list[str]:
        names, values = zip(*updates, strict=True)
        return [f"({', '.join(map(self.variable, names))}) = ({', '.join(self.write(v) for v in values)}){self.end}"]

    def block(self, opening: str, lines: list[str]) -> list[str]:
        return [opening, *(self.indent + line for line in lines), *([self.closing] if self.closing else [])]

    def when(self, condition: Expression, lines: list[str]) -> list[str]:
        """Run the lines where the condition holds."""
        raise KeyError(f"{self.name} has no way to write 'when'")

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        """Run the lines for every item of the source."""
        raise KeyError(f"{self.name} has no way to write 'each'")

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        """Run the lines as long as the condition holds."""
        raise KeyError(f"{self.name} has no way to write 'repeat_while'")

    # bodies

    def choice(self, choice: Choice) -> list[str]:
        lines = []
        for condition, value in choice.branches:
            lines += self.when(condition, [self.give(self.write(value))])
        return [*lines, self.give(self.write(choice.otherwise))]

    def fold(self, fold: Fold) -> list[str]:
        """With a plain loop; languages that say it in one expression override `gather`."""
        if fold.kind in ("any", "all"):
            test = fold.kept if fold.kind == "any" else opposite(fold.kept)
            early, late = (self.true, self.false) if fold.kind == "any" else (self.false, self.true)
            return [*self.each(fold.item, fold.source, self.when(test, [self.give(early)])), self.give(late)]
        item = fold.mapped or Name(fold.item)
        step = (
            [self.assign(fold.result, operation_of(fold.kind, fold.result, item))]
            if fold.kind != "collect"
            else [self.append(fold.result, item)]
        )
        inner = step if fold.kept is None else self.when(fold.kept, step)
        kind = ("texts" if is_text(item, fold) else "ints") if fold.kind == "collect" else "int"
        start = self.declare(fold.result, kind, self.starts[fold.kind], changes=True)
        return [
            start,
            *self.each(fold.item, fold.source, inner),
            self.give(self.write(fold.after or Name(fold.result))),
        ]

    starts: Mapping[str, str] = {"sum": "0", "product": "1", "count": "0", "collect": "[]"}

    def append(self, name: str, value: Expression) -> str:
        """Put a value at the end of the list of that name."""
        raise KeyError(f"{self.name} has no way to write 'append'")

    def one_expression(self, fold: Fold, source: str) -> list[str]:
        """Return a fold that is one expression, by way of a variable if something is done with it after."""
        if fold.after is None:
            return [self.give(source)]
        return [self.declare(fold.result, "int", source), self.give(self.write(fold.after))]

    def loop(self, loop: Loop) -> list[str]:
        lines = [self.declare(name, "int", self.write(start), changes=True) for name, start in loop.variables]
        inner = [self.assign(*u) for u in loop.updates] if in_sequence(loop) else self.assign_together(loop.updates)
        over = self.each("i", loop.source, inner) if isinstance(loop.source, Range) else self.repeat_while(loop.source, inner)
        return [*lines, *over, self.give(self.write(loop.result))]

    @abstractmethod
    def reorder(self, reorder: Reorder) -> list[str]:
        """The body of a function that reorders, takes or drops items."""

    def body(self, function: Function) -> list[str]:
        write = {Choice: self.choice, Fold: self.fold, Loop: self.loop, Reorder: self.reorder}
        return write[type(function.body)](function.body)

    def completion(self, function: Function) -> str:
        """The body and the end of the function, without a last newline."""
        lines = [self.indent + line for line in self.body(function)]
        return "\n".join([*lines, *([self.closing] if self.closing else [])])

    def prompt(self, function: Function, description: str) -> str:
        return f"{self.comment} {description}\n{self.signature(function)}\n"

    # running

    def literal(self, value: Any, kind: str) -> str:
        """A test value as source."""
        if kind == "bool":
            return self.true if value else self.false
        if kind in ("ints", "texts"):
            return self.list_literal([self.literal(item, kind[:-1]) for item in value], kind)
        return self.text(value) if kind == "text" else str(value)

    def list_literal(self, items: list[str], kind: str) -> str:
        return f"[{', '.join(items)}]"

    def call(self, function: Function, arguments: tuple[Any, ...]) -> str:
        written = (self.literal(a, kind) for a, (_, kind) in zip(arguments, function.parameters, strict=True))
        return f"{function.name}({', '.join(written)})"

    @abstractmethod
    def check(self, call: str, expected: Any, kind: str) -> str:
        """A statement that stops the program with an error unless the call gives the expected value."""

    def main(self, lines: list[str]) -> str:
        """The part of a program that runs the checks."""
        return "\n".join(lines) + "\n"

    def file(self, sources: list[str], tested: list[tuple[Function, list[tuple[tuple[Any, ...], Any]]]]) -> str:
        """A complete source file: the header, the functions, and a check for each case. It exits 0 only if all pass."""
        lines = [
            self.check(self.call(function, arguments), expected, function.returns)
            for function, cases in tested
            for arguments, expected in cases
        ]
        return self.header + "\n\n".join([*sources, self.main(lines)])


def operation_of(kind: str, result: str, item: Expression) -> Operation:
    """One step of a numeric fold: what the result becomes when an item comes."""
    if kind == "count":
        return Operation("+", (Name(result), Number(1)))
    return Operation({"sum": "+", "product": "*", "max": "max", "min": "min"}[kind], (Name(result), item))


TEXT_OPERATORS = frozenset(("upper", "lower", "reverse", "repeat", "concat", "replace", "first_letters", "last_letters", "join"))


def is_text(item: Expression, fold: Fold) -> bool:
    """Whether what a fold collects is text."""
    if isinstance(item, Operation):
        return item.operator in TEXT_OPERATORS
    return isinstance(item, Text) or (item == Name(fold.item) and fold.item_type == "text")
