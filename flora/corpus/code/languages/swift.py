"""How Swift writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Expression, Fold, Function, Name, Range, Reorder


class Swift(Language):
    tag, name, comment, suffix, command = "swift", "Swift", "///", ".swift", ("swift",)
    end = ""
    types = {"int": "Int", "bool": "Bool", "text": "String", "ints": "[Int]", "texts": "[String]"}
    templates = {
        "abs": "abs({0:free})",
        "length": "{0}.count",
        "size": "{0}.count",
        "first": "{0}[0]",
        "last": "{0}[{0}.count - 1]",
        "upper": "{0}.uppercased()",
        "lower": "{0}.lowercased()",
        "reverse": "String({0}.reversed())",
        "repeat": "String(repeating: {0:free}, count: {1:free})",
        "count_letter": "{0}.filter {{ $0 == {1} }}.count",
        "starts_with": "{0}.hasPrefix({1})",
        "ends_with": "{0}.hasSuffix({1})",
        "contains": "{0}.contains({1})",
        "replace": "String({0}.map {{ $0 == {1} ? {2} : $0 }})",
        "first_letters": "String({0}.prefix({1:free}))",
        "last_letters": "String({0}.suffix({1:free}))",
        "join": "{0}.joined(separator: {1})",
    }

    def __init__(self) -> None:
        self.item = ""  # the variable that a closure calls $0

    def variable(self, name: str) -> str:
        return "$0" if name == self.item else name

    def signature(self, function: Function) -> str:
        parameters = ", ".join(f"{name}: {self.types[kind]}" for name, kind in function.parameters)
        return f"func {function.name}({parameters}) -> {self.types[function.returns]} {{"

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"{'var' if changes else 'let'} {name} = {source}"

    def when(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"if {self.write(condition)} {{", lines)

    def items(self, source: Name | Range) -> str:
        if isinstance(source, Name):
            return source.name
        return f"({self.write(source.low)}...{self.write(source.high)})"

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        name = item if any(item in line for line in lines) else "_"
        return self.block(f"for {name} in {self.items(source).strip('()')} {{", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while {self.write(condition)} {{", lines)

    def fold(self, fold: Fold) -> list[str]:
        chain = self.items(fold.source)
        self.item = fold.item
        kept = f" {{ {self.write(fold.kept)} }}" if fold.kept else ""
        mapped = f" {{ {self.write(fold.mapped)} }}" if fold.mapped else ""
        self.item = ""
        if fold.kind in ("any", "all"):
            return [self.give(f"{chain}.{'contains' if fold.kind == 'any' else 'allSatisfy'}{kept}")]
        chain += f".filter{kept}" if kept else ""
        chain += f".map{mapped}" if mapped else ""
        gather = {
            "sum": ".reduce(0, +)",
            "product": ".reduce(1, *)",
            "count": ".count",
            "max": ".max()!",
            "min": ".min()!",
            "collect": "",
        }
        return self.one_expression(fold, chain + gather[fold.kind])

    def reorder(self, reorder: Reorder) -> list[str]:
        forms = {
            "reverse": "{0}.reversed()",
            "sort": "{0}.sorted()",
            "take": "Array({0}.prefix({1}))",
            "drop": "Array({0}.dropFirst({1}))",
        }
        return [self.give(forms[reorder.kind].format(reorder.source, reorder.number))]

    def call(self, function: Function, arguments: tuple[Any, ...]) -> str:
        pairs = zip(arguments, function.parameters, strict=True)
        return f"{function.name}({', '.join(f'{name}: {self.literal(a, kind)}' for a, (name, kind) in pairs)})"

    def check(self, call: str, expected: Any, kind: str) -> str:
        return f"precondition({call} == {self.literal(expected, kind)})"
