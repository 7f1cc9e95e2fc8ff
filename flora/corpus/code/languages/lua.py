"""How Lua writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Expression, Function, Name, Range, Reorder


class Lua(Language):
    tag, name, comment, suffix, command = "lua", "Lua", "--", ".lua", ("lua",)
    end, closing = "", "end"
    symbols = {"!=": "~=", "same_text": "=="}
    templates = {
        "if": "{0} and {1} or {2}",
        "abs": "math.abs({0:free})",
        "length": "#{0}",
        "size": "#{0}",
        "first": "{0}[1]",
        "last": "{0}[#{0}]",
        "upper": "{0}:upper()",
        "lower": "{0}:lower()",
        "reverse": "{0}:reverse()",
        "repeat": "{0}:rep({1:free})",
        "count_letter": 'select(2, {0}:gsub({1}, ""))',
        "starts_with": "{0}:sub(1, {1:count}) == {1}",
        "ends_with": "{0}:sub(-{1:count}) == {1}",
        "contains": "{0}:find({1}, 1, true) ~= nil",
        "replace": "({0}:gsub({1}, {2}))",
        "first_letters": "{0}:sub(1, {1:free})",
        "last_letters": "{0}:sub(-{1})",
        "join": "table.concat({0:free}, {1})",
    }
    looser = {"if": 1, "starts_with": 4, "ends_with": 4, "contains": 4}
    starts = {**Language.starts, "max": "-math.huge", "min": "math.huge", "collect": "{}"}

    def extreme(self, operator: str, arguments: list[str]) -> str:
        return f"math.{operator}({', '.join(arguments)})"

    def concat(self, arguments: tuple[Expression, ...]) -> str:
        return " .. ".join(self.write(a, 5) for a in arguments)

    def signature(self, function: Function) -> str:
        return f"local function {function.name}({', '.join(name for name, _ in function.parameters)})"

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"local {name} = {source}"

    def assign(self, name: str, value: Expression) -> str:
        return f"{name} = {self.write(value)}"

    def assign_together(self, updates: tuple[tuple[str, Expression], ...]) -> list[str]:
        names, values = zip(*updates, strict=True)
        return [f"{', '.join(names)} = {', '.join(self.write(v) for v in values)}"]

    def append(self, name: str, value: Expression) -> str:
        return f"table.insert({name}, {self.write(value)})"

    def when(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"if {self.write(condition)} then", lines)

    def each(self, item: str, source: Name | Range, lines: list[str]) -> list[str]:
        if isinstance(source, Range):
            return self.block(f"for {item} = {self.write(source.low)}, {self.write(source.high)} do", lines)
        return self.block(f"for _, {item} in ipairs({source.name}) do", lines)

    def repeat_while(self, condition: Expression, lines: list[str]) -> list[str]:
        return self.block(f"while {self.write(condition)} do", lines)

    def reorder(self, reorder: Reorder) -> list[str]:
        source = reorder.source
        if reorder.kind == "sort":
            return [f"table.sort({source})", self.give(source)]
        if reorder.kind == "reverse":
            last, move = f"for i = #{source}, 1, -1 do", f"table.insert(result, {source}[i])"
            return [self.declare("result", "ints", "{}"), *self.block(last, [move]), self.give("result")]
        bounds = f"1, {reorder.number}" if reorder.kind == "take" else f"{reorder.number + 1}"
        return [self.give(f"{{table.unpack({source}, {bounds})}}")]

    def list_literal(self, items: list[str], kind: str) -> str:
        return f"{{{', '.join(items)}}}"

    def check(self, call: str, expected: Any, kind: str) -> str:
        if kind in ("ints", "texts"):
            return f'assert(table.concat({call}, ",") == {self.text(",".join(map(str, expected)))})'
        return f"assert(({call}) == {self.literal(expected, kind)})"
