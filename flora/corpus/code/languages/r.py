"""How R writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Expression, Fold, Function, Name, Operation, Range, Reorder


class R(Language):
    """Lists are vectors, and a fold works on the whole vector at once."""

    tag, name, comment, suffix, command = "r", "R", "#", ".R", ("Rscript",)
    end, true, false = "", "TRUE", "FALSE"
    symbols = {"and": "&&", "or": "||", "//": "%/%", "%": "%%", "same_text": "=="}
    templates = {
        "if": "if ({0:free}) {1:free} else {2:free}",
        "abs": "abs({0:free})",
        "length": "nchar({0:free})",
        "size": "length({0:free})",
        "first": "{0}[1]",
        "last": "{0}[length({0:free})]",
        "upper": "toupper({0:free})",
        "lower": "tolower({0:free})",
        "reverse": 'paste(rev(strsplit({0:free}, "")[[1]]), collapse = "")',
        "repeat": "strrep({0:free}, {1:free})",
        "count_letter": 'sum(strsplit({0:free}, "")[[1]] == {1})',
        "starts_with": "startsWith({0:free}, {1})",
        "ends_with": "endsWith({0:free}, {1})",
        "contains": "grepl({1}, {0:free}, fixed = TRUE)",
        "replace": "gsub({1}, {2}, {0:free}, fixed = TRUE)",
        "first_letters": "substr({0:free}, 1, {1:free})",
        "last_letters": "substring({0:free}, nchar({0:free}) - {1} + 1)",
        "join": "paste({0:free}, collapse = {1})",
    }
    looser = {"concat": 9, "if": 0}

    def __init__(self) -> None:
        self.item, self.vector = "", ""  # inside a fold the item's name stands for the vector

    def variable(self, name: str) -> str:
        return self.vector if name == self.item else name

    def write_operation(self, expression: Operation) -> str:
        if expression.operator in ("and", "or") and self.item:
            left, right = (self.write(a, 3) for a in expression.arguments)
            return f"{left} {'&' if expression.operator == 'and' else '|'} {right}"
        return super().write_operation(expression)

    def concat(self, arguments: tuple[Expression, ...]) -> str:
        return f"paste0({', '.join(self.write(a) for a in arguments)})"

    def signature(self, function: Function) -> str:
        return f"{function.name} <- function({', '.join(name for name, _ in function.parameters)}) {{"

    def give(self, source: str) -> str:
        return f"return({source})"

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"{name} <- {source}"

    def assign(self, name: str, value: Expression) -> str:
        return f"{name} <- {self.write(value)}"

    def assign_together(self, updates: tuple[tuple[str, Expression], ...]) -> list[str]:
        (first, value), (second, other) = updates
        return [f"held <- {self.write(other)}", f"{first} <- {self.write(value)}", f"{second} <- held"]

    def when(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"if ({self.write(condition)}) {{", lines)

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        return self.block(f"for ({item} in {self.write(source.low)}:{self.write(source.high)}) {{", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while ({self.write(condition)}) {{", lines)

    def fold(self, fold: Fold) -> list[str]:
        lines = []
        self.vector = fold.source.name if isinstance(fold.source, Name) else fold.item
        if isinstance(fold.source, Range):
            lines.append(f"{fold.item} <- {self.write(fold.source.low)}:{self.write(fold.source.high)}")
        self.item = fold.item
        kept = self.write(fold.kept) if fold.kept else ""
        mapped = self.write(fold.mapped or Name(fold.item))
        vector = self.vector
        self.item = ""
        if fold.kind in ("any", "all", "count"):
            gather = {"any": "any", "all": "all", "count": "sum"}[fold.kind]
            return [*lines, *self.one_expression(fold, f"{gather}({kept})")]
        if kept:
            lines.append(f"{vector} <- {vector}[{kept}]")
        gathered = {"product": f"prod({mapped})", "collect": mapped}.get(fold.kind, f"{fold.kind}({mapped})")
        return [*lines, *self.one_expression(fold, gathered)]

    def reorder(self, reorder: Reorder) -> list[str]:
        forms = {"reverse": "rev({0})", "sort": "sort({0})", "take": "head({0}, {1})", "drop": "tail({0}, -{1})"}
        return [self.give(forms[reorder.kind].format(reorder.source, reorder.number))]

    def list_literal(self, items: list[str], kind: str) -> str:
        return f"c({', '.join(items)})" if items else f"{'numeric' if kind == 'ints' else 'character'}(0)"

    def check(self, call: str, expected: Any, kind: str) -> str:
        cast = {"int": "as.numeric", "ints": "as.numeric", "texts": "as.character"}.get(kind, "")
        return f"stopifnot(identical({cast}({call}), {cast}({self.literal(expected, kind)})))"
