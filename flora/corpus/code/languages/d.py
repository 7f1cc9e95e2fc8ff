"""How D writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Expression, Function, Name, Range, Reorder


class D(Language):
    tag, name, comment, suffix, command = "d", "D", "//", ".d", ("rdmd", "--compiler=ldmd2")
    header = "import std.algorithm, std.array, std.conv, std.math, std.range, std.string;\n\n"
    types = {"int": "long", "bool": "bool", "text": "string", "ints": "long[]", "texts": "string[]"}
    templates = {
        "abs": "abs({0:free})",
        "length": "{0}.length",
        "size": "{0}.length",
        "first": "{0}[0]",
        "last": "{0}[$ - 1]",
        "upper": "{0}.toUpper",
        "lower": "{0}.toLower",
        "reverse": "{0}.retro.to!string",
        "repeat": "{0}.replicate({1:free})",
        "count_letter": "{0}.count({1:letter})",
        "starts_with": "{0}.startsWith({1})",
        "ends_with": "{0}.endsWith({1})",
        "contains": "{0}.canFind({1})",
        "replace": "{0}.replace({1}, {2})",
        "first_letters": "{0}[0 .. {1:free}]",
        "last_letters": "{0}[$ - {1} .. $]",
        "join": "{0}.join({1})",
    }
    starts = {**Language.starts, "max": "long.min", "min": "long.max"}

    def concat(self, arguments: tuple[Expression, ...]) -> str:
        return " ~ ".join(self.write(a, 5) for a in arguments)

    def signature(self, function: Function) -> str:
        parameters = ", ".join(f"{self.types[kind]} {name}" for name, kind in function.parameters)
        return f"{self.types[function.returns]} {function.name}({parameters}) {{"

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"{self.types[kind]} {name};" if source == "[]" else f"{self.types[kind]} {name} = {source};"

    def assign_together(self, updates: tuple[tuple[str, Expression], ...]) -> list[str]:
        (first, value), (second, other) = updates
        return [f"long next = {self.write(other)};", f"{first} = {self.write(value)};", f"{second} = next;"]

    def append(self, name: str, value: Expression) -> str:
        return f"{name} ~= {self.write(value)};"

    def when(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"if ({self.write(condition)}) {{", lines)

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        over = source.name if isinstance(source, Name) else f"{self.write(source.low)} .. {self.write(source.high, 5)} + 1"
        return self.block(f"foreach ({item}; {over}) {{", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while ({self.write(condition)}) {{", lines)

    def reorder(self, reorder: Reorder) -> list[str]:
        forms = {
            "reverse": "{0}.retro.array",
            "sort": "{0}.sort.array",
            "take": "{0}[0 .. {1}]",
            "drop": "{0}[{1} .. $]",
        }
        return [self.give(forms[reorder.kind].format(reorder.source, reorder.number))]

    def literal(self, value: Any, kind: str) -> str:
        return f"cast({self.types[kind]}) {super().literal(value, kind)}" if kind == "ints" else super().literal(value, kind)

    def check(self, call: str, expected: Any, kind: str) -> str:
        return f'    if ({call} != {self.literal(expected, kind)}) throw new Exception("wrong");'

    def main(self, lines: list[str]) -> str:
        return f"void main() {{\n{super().main(lines)}}}\n"
