"""How Python writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Expression, Fold, Function, Name, Range, Reorder


class Python(Language):
    tag, name, comment, suffix, command = "py", "Python", "#", ".py", ("python3",)
    end, closing, true, false = "", "", "True", "False"
    symbols = {"same_text": "=="}
    templates = {
        "if": "{1} if {0} else {2}",
        "abs": "abs({0:free})",
        "length": "len({0:free})",
        "size": "len({0:free})",
        "first": "{0}[0]",
        "last": "{0}[-1]",
        "upper": "{0}.upper()",
        "lower": "{0}.lower()",
        "reverse": "{0}[::-1]",
        "repeat": "{0} * {1}",
        "count_letter": "{0}.count({1})",
        "starts_with": "{0}.startswith({1})",
        "ends_with": "{0}.endswith({1})",
        "contains": "{1} in {0}",
        "replace": "{0}.replace({1}, {2})",
        "first_letters": "{0}[:{1}]",
        "last_letters": "{0}[-{1}:]",
        "join": "{1}.join({0:free})",
    }
    looser = {"if": 0, "repeat": 6, "contains": 4}

    def signature(self, function: Function) -> str:
        return f"def {function.name}({', '.join(name for name, _ in function.parameters)}):"

    def assign_together(self, updates: tuple[tuple[str, Expression], ...]) -> list[str]:
        names, values = zip(*updates, strict=True)
        return [f"{', '.join(names)} = {', '.join(self.write(v) for v in values)}"]

    def when(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"if {self.write(condition)}:", lines)

    def range(self, source: Name | Range) -> str:
        if isinstance(source, Name):
            return source.name
        return f"range({self.write(source.low)}, {self.write(source.high, 5)} + 1)"

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        return self.block(f"for {item} in {self.range(source)}:", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while {self.write(condition)}:", lines)

    def fold(self, fold: Fold) -> list[str]:
        if fold.kind == "product":
            return super().fold(fold)
        item, source = fold.item, self.range(fold.source)
        kept = f" if {self.write(fold.kept)}" if fold.kept else ""
        if fold.kind in ("any", "all"):
            return [self.give(f"{fold.kind}({self.write(fold.kept)} for {item} in {source})")]
        mapped = "1" if fold.kind == "count" else self.write(fold.mapped or Name(item))
        through = f"{mapped} for {item} in {source}{kept}"
        if fold.kind == "collect":
            return [self.give(f"[{through}]")]
        gather = {"sum": "sum", "count": "sum", "max": "max", "min": "min"}[fold.kind]
        return self.one_expression(fold, f"{gather}({source if mapped == item and not kept else through})")

    def reorder(self, reorder: Reorder) -> list[str]:
        forms = {"reverse": "{0}[::-1]", "sort": "sorted({0})", "take": "{0}[:{1}]", "drop": "{0}[{1}:]"}
        return [self.give(forms[reorder.kind].format(reorder.source, reorder.number))]

    def check(self, call: str, expected: Any, kind: str) -> str:
        return f"assert {call} == {self.literal(expected, kind)}"
