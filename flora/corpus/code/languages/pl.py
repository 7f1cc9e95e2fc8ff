"""How Perl writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Choice, Expression, Fold, Function, Name, Range, Reorder


class Perl(Language):
    """Numbers and text are scalars, lists are array references, true is 1 and false is the empty string."""

    tag, name, comment, suffix, command = "pl", "Perl", "#", ".pl", ("perl",)
    header = "use strict;\nuse warnings;\n\n"
    true, false = "1", '""'
    symbols = {"and": "&&", "or": "||", "same_text": "eq"}
    templates = {
        "//": "int({0} / {1})",
        "abs": "abs({0:free})",
        "length": "length({0:free})",
        "size": "scalar(@{0})",
        "first": "{0}->[0]",
        "last": "{0}->[-1]",
        "upper": "uc({0:free})",
        "lower": "lc({0:free})",
        "reverse": "scalar(reverse({0:free}))",
        "repeat": "{0} x {1}",
        "count_letter": "({0} =~ tr/{1:bare}//)",
        "starts_with": "index({0}, {1}) == 0",
        "ends_with": "substr({0}, -{1:count}) eq {1}",
        "contains": "index({0}, {1}) >= 0",
        "replace": "{0} =~ s/{1:bare}/{2:bare}/gr",
        "first_letters": "substr({0:free}, 0, {1:free})",
        "last_letters": "substr({0:free}, -{1})",
        "join": "join({1}, @{0})",
    }
    looser = {"repeat": 6, "starts_with": 4, "ends_with": 4, "contains": 4, "replace": 4}

    def __init__(self) -> None:
        self.item = ""  # the variable that a fold calls $_

    def variable(self, name: str) -> str:
        return "$_" if name == self.item else f"${name}"

    def text(self, value: str) -> str:
        return super().text(value).replace("$", "\\$").replace("@", "\\@")

    def extreme(self, operator: str, arguments: list[str]) -> str:
        return f"(sort {{ $a <=> $b }} {', '.join(arguments)})[{0 if operator == 'min' else -1}]"

    def concat(self, arguments: tuple[Expression, ...]) -> str:
        return " . ".join(self.write(a, 5) for a in arguments)

    def signature(self, function: Function) -> str:
        return f"sub {function.name} {{\n{self.indent}my({', '.join('$' + name for name, _ in function.parameters)}) = @_;"

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"my ${name} = {source};"

    def choice(self, choice: Choice) -> list[str]:
        early = [f"return {self.write(value)} if {self.write(condition)};" for condition, value in choice.branches]
        return [*early, self.give(self.write(choice.otherwise))]

    def items(self, source: Name | Range) -> str:
        if isinstance(source, Name):
            return f"@${source.name}"
        return f"{self.write(source.low)} .. {self.write(source.high)}"

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        return self.block(f"for my ${item} ({self.items(source)}) {{", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while ({self.write(condition)}) {{", lines)

    def fold(self, fold: Fold) -> list[str]:
        self.item = fold.item
        items = f"grep {{ {self.write(fold.kept)} }} {self.items(fold.source)}" if fold.kept else self.items(fold.source)
        mapped = self.write(fold.mapped) if fold.mapped else "$_"
        through = f"map {{ {mapped} }} {items}" if fold.mapped else items
        self.item = ""
        if fold.kind == "any":
            return [self.give(f"scalar({items}) > 0")]
        if fold.kind == "all":
            return [self.give(f"scalar({items}) == {self.items(fold.source)}")]
        if fold.kind == "count":
            return self.one_expression(fold, f"scalar({items})")
        if fold.kind == "collect":
            return [self.give(f"[{through}]")]
        after = self.give(self.write(fold.after or Name(fold.result)))
        if fold.kind in ("max", "min"):
            order = "$b <=> $a" if fold.kind == "max" else "$a <=> $b"
            return [f"my (${fold.result}) = sort {{ {order} }} {through};", after]

        symbol, start = ("+", 0) if fold.kind == "sum" else ("*", 1)
        return [f"my ${fold.result} = {start};", f"${fold.result} {symbol}= {mapped} for {items};", after]

    def reorder(self, reorder: Reorder) -> list[str]:
        items = f"@${reorder.source}"
        order = "$a <=> $b" if reorder.item_type == "int" else "$a cmp $b"
        forms = {
            "reverse": f"reverse {items}",
            "sort": f"sort {{ {order} }} {items}",
            "take": f"{items}[0 .. {reorder.number - 1}]",
            "drop": f"{items}[{reorder.number} .. $#${reorder.source}]",
        }
        return [self.give(f"[{forms[reorder.kind]}]")]

    def check(self, call: str, expected: Any, kind: str) -> str:
        if kind in ("ints", "texts"):
            return f'die "wrong" unless join(",", @{{{call}}}) eq {self.text(",".join(map(str, expected)))};'
        if kind == "int":
            return f'die "wrong" unless {call} == {expected};'
        return f'die "wrong" unless {call} eq {self.literal(expected, kind)};'
