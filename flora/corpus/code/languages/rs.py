"""How Rust writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Choice, Expression, Fold, Function, Name, Range, Reorder, Text


class Rust(Language):
    """Parameters are owned; a body ends in an expression, not in a return."""

    tag, name, comment, suffix = "rs", "Rust", "///", ".rs"
    types = {"int": "isize", "bool": "bool", "text": "String", "ints": "Vec<isize>", "texts": "Vec<String>"}
    templates = {
        "if": "if {0:free} {{ {1:free} }} else {{ {2:free} }}",
        "abs": "{0}.abs()",
        "length": "{0}.len() as isize",
        "size": "{0}.len() as isize",
        "first": "{0}[0]",
        "last": "{0}[{0}.len() - 1]",
        "upper": "{0}.to_uppercase()",
        "lower": "{0}.to_lowercase()",
        "reverse": "{0}.chars().rev().collect::<String>()",
        "repeat": "{0}.repeat({1} as usize)",
        "count_letter": "{0}.matches({1:letter}).count() as isize",
        "starts_with": "{0}.starts_with({1})",
        "ends_with": "{0}.ends_with({1})",
        "contains": "{0}.contains({1})",
        "replace": "{0}.replace({1}, {2})",
        "first_letters": "{0}[..{1:free}].to_string()",
        "last_letters": "{0}[{0}.len() - {1}..].to_string()",
        "join": "{0}.join({1})",
    }
    looser = {"concat": 9, "if": 0, "length": 0, "size": 0, "count_letter": 0}

    def extreme(self, operator: str, arguments: list[str]) -> str:
        first, *others = arguments
        first = f"({first})" if " " in first else first
        return first + "".join(f".{operator}({other})" for other in others)

    def concat(self, arguments: tuple[Expression, ...]) -> str:
        shape = "".join(a.value if isinstance(a, Text) else "{}" for a in arguments)
        return f"format!({', '.join([self.text(shape), *(self.write(a) for a in arguments if not isinstance(a, Text))])})"

    def signature(self, function: Function) -> str:
        parameters = ", ".join(f"{name}: {self.types[kind]}" for name, kind in function.parameters)
        return f"fn {function.name}({parameters}) -> {self.types[function.returns]} {{"

    def give(self, source: str) -> str:
        return source

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"let {'mut ' if changes else ''}{name}: {self.types[kind]} = {source};"

    def choice(self, choice: Choice) -> list[str]:
        if not choice.branches:
            return [self.owned(choice.otherwise)]
        lines = []
        for i, (condition, value) in enumerate(choice.branches):
            opening = f"if {self.write(condition)} {{" if i == 0 else f"}} else if {self.write(condition)} {{"
            lines += [opening, self.indent + self.owned(value)]
        return [*lines, "} else {", self.indent + self.owned(choice.otherwise), "}"]

    def owned(self, value: Expression) -> str:
        source = self.write(value)
        return f"{source}.to_string()" if isinstance(value, Text) else source

    def items(self, source: Name | Range) -> str:
        if isinstance(source, Name):
            return f"{source.name}.into_iter()"
        return f"({self.write(source.low)}..={self.write(source.high)})"

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        name = item if any(item in line for line in lines) else "_"
        return self.block(f"for {name} in {self.items(source).strip('()')} {{", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while {self.write(condition)} {{", lines)

    def fold(self, fold: Fold) -> list[str]:
        item, chain = fold.item, self.items(fold.source)
        reference = f"&{item}" if fold.item_type == "int" else item
        if fold.kind in ("any", "all"):
            return [f"{chain}.{fold.kind}(|{item}| {self.write(fold.kept)})"]
        chain += f".filter(|{reference}| {self.write(fold.kept)})" if fold.kept else ""
        chain += f".map(|{item}| {self.write(fold.mapped)})" if fold.mapped else ""
        gather = {"count": "count() as isize", "max": "max().unwrap()", "min": "min().unwrap()", "collect": "collect()"}
        return self.one_expression(fold, f"{chain}.{gather.get(fold.kind, fold.kind + '()')}")

    def reorder(self, reorder: Reorder) -> list[str]:
        source, number = reorder.source, reorder.number
        if reorder.kind == "sort":
            return [f"let mut result = {source};", "result.sort();", "result"]
        forms = {
            "reverse": ".into_iter().rev().collect()",
            "take": f"[..{number}].to_vec()",
            "drop": f"[{number}..].to_vec()",
        }
        return [source + forms[reorder.kind]]

    def literal(self, value: Any, kind: str) -> str:
        return f"String::from({self.text(value)})" if kind == "text" else super().literal(value, kind)

    def list_literal(self, items: list[str], kind: str) -> str:
        return f"Vec::<{self.types[kind[:-1]]}>::from([{', '.join(items)}])"

    def check(self, call: str, expected: Any, kind: str) -> str:
        return f"    assert_eq!({call}, {self.literal(expected, kind)});"

    def main(self, lines: list[str]) -> str:
        return f"fn main() {{\n{super().main(lines)}}}\n"
