"""How Julia writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Expression, Fold, Function, Name, Range, Reorder


class Julia(Language):
    tag, name, comment, suffix, command = "jl", "Julia", '"""', ".jl", ("julia",)
    end, closing = "", "end"
    types = {"int": "Int64", "bool": "Bool", "text": "String", "ints": "Vector{Int64}", "texts": "Vector{String}"}
    templates = {
        "//": "div({0:free}, {1:free})",
        "even": "iseven({0:free})",
        "odd": "isodd({0:free})",
        "abs": "abs({0:free})",
        "length": "length({0:free})",
        "size": "length({0:free})",
        "first": "{0}[1]",
        "last": "{0}[end]",
        "upper": "uppercase({0:free})",
        "lower": "lowercase({0:free})",
        "reverse": "reverse({0:free})",
        "repeat": "repeat({0:free}, {1:free})",
        "count_letter": "count(==({1:letter}), {0:free})",
        "starts_with": "startswith({0:free}, {1})",
        "ends_with": "endswith({0:free}, {1})",
        "contains": "occursin({1}, {0:free})",
        "replace": "replace({0:free}, {1} => {2})",
        "first_letters": "first({0:free}, {1:free})",
        "last_letters": "last({0:free}, {1:free})",
        "join": "join({0:free}, {1})",
    }
    looser = {"concat": 9}

    def text(self, value: str) -> str:
        return super().text(value).replace("$", "\\$")

    def concat(self, arguments: tuple[Expression, ...]) -> str:
        return f"string({', '.join(self.write(a) for a in arguments)})"

    def signature(self, function: Function) -> str:
        parameters = ", ".join(f"{name}::{self.types[kind]}" for name, kind in function.parameters)
        return f"function {function.name}({parameters})::{self.types[function.returns]}"

    def prompt(self, function: Function, description: str) -> str:
        return f'"""{description}"""\n{self.signature(function)}\n'

    def assign_together(self, updates: tuple[tuple[str, Expression], ...]) -> list[str]:
        names, values = zip(*updates, strict=True)
        return [f"{', '.join(names)} = {', '.join(self.write(v) for v in values)}"]

    def when(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"if {self.write(condition)}", lines)

    def items(self, source: Name | Range) -> str:
        return source.name if isinstance(source, Name) else f"{self.write(source.low)}:{self.write(source.high)}"

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        return self.block(f"for {item} in {self.items(source)}", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while {self.write(condition)}", lines)

    def fold(self, fold: Fold) -> list[str]:
        item, source = fold.item, self.items(fold.source)
        if fold.kind in ("any", "all", "count"):
            return self.one_expression(fold, f"{fold.kind}({item} -> {self.write(fold.kept)}, {source})")
        kept = f" if {self.write(fold.kept)}" if fold.kept else ""
        through = f"{self.write(fold.mapped or Name(item))} for {item} in {source}{kept}"
        if fold.kind == "collect":
            return [self.give(f"[{through}]")]
        plain = fold.mapped is None and fold.kept is None
        gather = {"sum": "sum", "product": "prod", "max": "maximum", "min": "minimum"}[fold.kind]
        start = {"sum": "; init=0", "product": "; init=1"}.get(fold.kind, "")
        return self.one_expression(fold, f"{gather}({source if plain else through}{start})")

    def reorder(self, reorder: Reorder) -> list[str]:
        forms = {"reverse": "reverse({0})", "sort": "sort({0})", "take": "{0}[1:{1}]", "drop": "{0}[{2}:end]"}
        return [self.give(forms[reorder.kind].format(reorder.source, reorder.number, reorder.number + 1))]

    def list_literal(self, items: list[str], kind: str) -> str:
        return f"{self.types[kind[:-1]]}[{', '.join(items)}]"

    def check(self, call: str, expected: Any, kind: str) -> str:
        return f"@assert {call} == {self.literal(expected, kind)}"
