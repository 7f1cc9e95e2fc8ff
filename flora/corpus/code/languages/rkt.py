"""How Racket writes the corpus's functions, and a file that runs their cases."""

from __future__ import annotations

from typing import Any

from flora.corpus.code.languages.base import Language
from flora.corpus.code.nodes import Choice, Fold, Function, Loop, Name, Operation, Range, Reorder


class Racket(Language):
    tag, name, comment, suffix, command = "rkt", "Racket", ";;", ".rkt", ("racket",)
    header = "#lang racket\n\n"
    indent, end, closing, true, false = "  ", "", "", "#t", "#f"
    heads = {
        "//": "quotient",
        "%": "modulo",
        "==": "=",
        "even": "even?",
        "odd": "odd?",
        "length": "string-length",
        "size": "length",
        "upper": "string-upcase",
        "lower": "string-downcase",
        "concat": "string-append",
        "same_text": "string=?",
        "starts_with": "string-prefix?",
        "ends_with": "string-suffix?",
        "contains": "string-contains?",
        "replace": "string-replace",
        "join": "string-join",
    }
    templates = {
        "!=": "(not (= {0} {1}))",
        "reverse": "(list->string (reverse (string->list {0})))",
        "repeat": "(string-append* (make-list {1} {0}))",
        "count_letter": "(for/sum ([c {0}] #:when (char=? c {1:letter})) 1)",
        "first_letters": "(substring {0} 0 {1})",
        "last_letters": "(substring {0} (- (string-length {0}) {1}))",
    }

    def letter(self, value: str) -> str:
        return f"#\\{value}"

    def precedence(self, operator: str) -> int:
        return 9

    def write_operation(self, expression: Operation) -> str:
        if expression.operator in self.templates:
            return super().write_operation(expression)
        head = self.heads.get(expression.operator, expression.operator)
        return f"({head} {' '.join(self.write(a) for a in expression.arguments)})"

    def signature(self, function: Function) -> str:
        return f"(define ({' '.join([function.name, *(name for name, _ in function.parameters)])})"

    def completion(self, function: Function) -> str:
        return super().completion(function) + ")"

    def give(self, source: str) -> str:
        return source

    def declare(self, name: str, kind: str, source: str, changes: bool = False) -> str:
        return f"(define {name} {source})"

    def choice(self, choice: Choice) -> list[str]:
        if not choice.branches:
            return [self.write(choice.otherwise)]
        if len(choice.branches) == 1:
            condition, value = choice.branches[0]
            return [f"(if {self.write(condition)}", f"    {self.write(value)}", f"    {self.write(choice.otherwise)})"]
        lines = [f"[{self.write(condition)} {self.write(value)}]" for condition, value in choice.branches]
        return ["(cond", *(f"  {line}" for line in lines), f"  [else {self.write(choice.otherwise)}])"]

    def items(self, source: Name | Range) -> str:
        if isinstance(source, Name):
            return source.name
        return f"(in-range {self.write(source.low)} (+ {self.write(source.high)} 1))"

    def fold(self, fold: Fold) -> list[str]:
        clause = f"[{fold.item} {self.items(fold.source)}]"
        if fold.kind in ("any", "all"):
            return [f"(for/{'or' if fold.kind == 'any' else 'and'} ({clause}) {self.write(fold.kept)})"]
        clause += f" #:when {self.write(fold.kept)}" if fold.kept else ""
        mapped = "1" if fold.kind == "count" else self.write(fold.mapped or Name(fold.item))
        head = {"sum": "for/sum", "count": "for/sum", "product": "for/product"}.get(fold.kind, "for/list")
        through = f"({head} ({clause}) {mapped})"
        if fold.kind in ("max", "min"):
            plain = fold.mapped is None and fold.kept is None and isinstance(fold.source, Name)
            through = f"(apply {fold.kind} {fold.source.name if plain else through})"
        return self.one_expression(fold, through)

    def loop(self, loop: Loop) -> list[str]:
        starts = " ".join(f"[{name} {self.write(start)}]" for name, start in loop.variables)
        updates = dict(loop.updates)
        steps = [self.write(updates.get(name, Name(name))) for name, _ in loop.variables]
        if isinstance(loop.source, Operation):
            lines = [f"(let loop ({starts})", f"  (if {self.write(loop.source)}"]
            return [*lines, f"      (loop {' '.join(steps)})", f"      {self.write(loop.result)}))"]
        if len(steps) == 1 and loop.result == Name(loop.variables[0][0]):
            return [f"(for/fold ({starts}) ([i {self.items(loop.source)}])", f"  {steps[0]})"]
        opening = f"(for/fold ({starts} #:result {self.write(loop.result)}) ([i {self.items(loop.source)}])"
        return [opening, f"  {f'(values {chr(32).join(steps)})' if len(steps) > 1 else steps[0]})"]

    def reorder(self, reorder: Reorder) -> list[str]:
        order = "<" if reorder.item_type == "int" else "string<?"
        forms = {
            "reverse": "(reverse {0})",
            "sort": "(sort {0} {2})",
            "take": "(take {0} {1})",
            "drop": "(drop {0} {1})",
        }
        return [forms[reorder.kind].format(reorder.source, reorder.number, order)]

    def list_literal(self, items: list[str], kind: str) -> str:
        return f"(list{''.join(' ' + item for item in items)})"

    def call(self, function: Function, arguments: tuple[Any, ...]) -> str:
        written = (self.literal(a, kind) for a, (_, kind) in zip(arguments, function.parameters, strict=True))
        return f"({' '.join([function.name, *written])})"

    def check(self, call: str, expected: Any, kind: str) -> str:
        return f"(unless (equal? {call} {self.literal(expected, kind)}) (exit 1))"
