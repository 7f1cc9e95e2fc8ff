"""How Ruby writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Choice, Expression, Fold, Function, Name, Range, Reorder


class Ruby(Language):
    tag, name, comment, suffix, command = "rb", "Ruby", "#", ".rb", ("ruby",)
    indent, end, closing = "  ", "", "end"
    templates = {
        "even": "{0}.even?",
        "odd": "{0}.odd?",
        "abs": "{0}.abs",
        "length": "{0}.length",
        "size": "{0}.size",
        "first": "{0}.first",
        "last": "{0}.last",
        "upper": "{0}.upcase",
        "lower": "{0}.downcase",
        "reverse": "{0}.reverse",
        "repeat": "{0} * {1}",
        "count_letter": "{0}.count({1})",
        "starts_with": "{0}.start_with?({1})",
        "ends_with": "{0}.end_with?({1})",
        "contains": "{0}.include?({1})",
        "replace": "{0}.gsub({1}, {2})",
        "first_letters": "{0}[0, {1}]",
        "last_letters": "{0}[-{1}..]",
        "join": "{0}.join({1})",
    }
    looser = {"repeat": 6}

    def extreme(self, operator: str, arguments: list[str]) -> str:
        return f"[{', '.join(arguments)}].{operator}"

    def signature(self, function: Function) -> str:
        return f"def {function.name}({', '.join(name for name, _ in function.parameters)})"

    def give(self, source: str) -> str:
        return source

    def assign_together(self, updates: tuple[tuple[str, Expression], ...]) -> list[str]:
        names, values = zip(*updates, strict=True)
        return [f"{', '.join(names)} = {', '.join(self.write(v) for v in values)}"]

    def choice(self, choice: Choice) -> list[str]:
        early = [f"return {self.write(value)} if {self.write(condition)}" for condition, value in choice.branches]
        return [*early, self.write(choice.otherwise)]

    def items(self, source: Name | Range) -> str:
        if isinstance(source, Name):
            return source.name
        return f"({self.write(source.low)}..{self.write(source.high)})"

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        bar = f" |{item}|" if any(item in line for line in lines) else ""
        if isinstance(source, Range) and not bar:
            return self.block(f"{self.write(source.high)}.times do", lines)
        return self.block(f"{self.items(source)}.each do{bar}", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while {self.write(condition)}", lines)

    def fold(self, fold: Fold) -> list[str]:
        source = self.items(fold.source)
        kept = f" {{ |{fold.item}| {self.write(fold.kept)} }}" if fold.kept else ""
        mapped = f" {{ |{fold.item}| {self.write(fold.mapped)} }}" if fold.mapped else ""
        if fold.kind in ("any", "all", "count"):
            return self.one_expression(fold, f"{source}.{fold.kind}{'' if fold.kind == 'count' else '?'}{kept}")
        chain = source + (f".select{kept}" if kept else "")
        if fold.kind == "sum":
            return self.one_expression(fold, f"{chain}.sum{mapped}")
        chain += f".map{mapped}" if mapped else ""
        gather = {"product": ".reduce(1, :*)", "max": ".max", "min": ".min", "collect": ""}[fold.kind]
        return self.one_expression(fold, chain + gather)

    def reorder(self, reorder: Reorder) -> list[str]:
        forms = {"reverse": "{0}.reverse", "sort": "{0}.sort", "take": "{0}.take({1})", "drop": "{0}.drop({1})"}
        return [forms[reorder.kind].format(reorder.source, reorder.number)]

    def check(self, call: str, expected: Any, kind: str) -> str:
        return f'raise "wrong" unless {call} == {self.literal(expected, kind)}'
