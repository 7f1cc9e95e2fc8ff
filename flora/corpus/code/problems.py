"""The tasks: families of small functions, each drawn with random constants, compositions and names."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flora.corpus.code import names
from flora.corpus.code.nodes import (
    Body,
    Choice,
    Expression,
    Fold,
    Function,
    Loop,
    Name,
    Number,
    Range,
    Reorder,
    Text,
    evaluate,
    operation,
)

NUM_CASES = 5


@dataclass(frozen=True)
class Draft:
    """What a family draws. Parameters are called a, b, c in `body` and `description` until they get their names.

    kinds: one per parameter, of `SAMPLERS`. An `atom` has no other form (the plain sum, say), so it stays in the training split.
    """

    stems: tuple[str, ...]
    kinds: tuple[str, ...]
    returns: str
    body: Body
    description: str
    atom: bool = False


@dataclass(frozen=True)
class Problem:
    """One task: a function, what it is for in English, and how to draw inputs for it."""

    family: str
    key: str  # the same for two problems that differ only in names or wording
    function: Function
    description: str
    kinds: tuple[str, ...]

    @cached_property
    def cases(self) -> list[tuple[tuple[Any, ...], Any]]:
        """(arguments, expected) pairs; the expected value is the Python reference's. The same at every call."""
        rng = random.Random(self.key)
        hints = constants_of(self.function.body)
        cases = []
        for _ in range(NUM_CASES):
            arguments = tuple(SAMPLERS[kind](rng, hints) for kind in self.kinds)
            cases.append((arguments, evaluate(self.function, arguments)))
        return cases


# inputs


def constants_of(node: Any) -> list[int | str]:
    """Every number and text literal in a body: inputs near them tell right from nearly right."""
    if isinstance(node, (Number, Text)):
        return [node.value]
    if isinstance(node, tuple):
        return [value for item in node for value in constants_of(item)]
    if hasattr(node, "__dataclass_fields__"):
        return [value for field in node.__dataclass_fields__ for value in constants_of(getattr(node, field))]
    return []


def _int(rng: random.Random, hints: list[int | str], low: int = -12, high: int = 30) -> int:
    near = [hint for hint in hints if isinstance(hint, int)]
    if near and rng.random() < 0.5:
        return min(high, max(low, rng.choice(near) * rng.choice((1, 1, 1, 2, 3)) + rng.randint(-1, 1)))
    return rng.randint(low, high)


def _text(rng: random.Random, hints: list[int | str]) -> str:
    text = "".join(rng.choice("abcdeilmnorst") for _ in range(rng.randint(4, 9)))
    parts = [hint for hint in hints if isinstance(hint, str) and hint.isalpha()]
    if parts and rng.random() < 0.7:
        part, at = rng.choice(parts), rng.choice((0, len(text), rng.randint(0, len(text))))
        text = text[:at] + part + text[at:]
    if rng.random() < 0.25:
        text += text[::-1]
    return text


SAMPLERS: dict[str, Callable[[random.Random, list[int | str]], Any]] = {
    "int": _int,
    "natural": lambda rng, hints: rng.randint(1, 6),
    "positive": lambda rng, hints: _int(rng, hints, 1, 60),
    "large": lambda rng, hints: rng.choice((rng.randint(1, 99), rng.randint(100, 9999))),
    "ints": lambda rng, hints: [_int(rng, hints) for _ in range(rng.randint(3, 7))],
    "few": lambda rng, hints: [_int(rng, hints, -9, 9) for _ in range(rng.randint(3, 5))],
    "text": _text,
    "texts": lambda rng, hints: [_text(rng, hints) for _ in range(rng.randint(3, 5))],
}
TYPE_OF = {"natural": "int", "positive": "int", "large": "int", "few": "ints"}

# wording

X, A, B, C, I, WORD = Name("x"), Name("a"), Name("b"), Name("c"), Name("i"), Name("word")  # noqa: E741
LETTERS = "abcdefghilmnoprstuw"
PARTS = "an in on er re st the ing con ar el os un ta mi ro".split()
SEPARATORS = ["-", "_", "+", "/", ":", "; ", ", ", " and ", " or ", "=", "<", "#"]


def say(rng: random.Random, kind: str) -> str:
    """How a description starts: for a number or whether something is so, otherwise "Return"."""
    starts = {"bool": ("Check whether", "Tell whether", "Return whether"), "int": ("Return", "Return", "Compute", "Calculate")}
    return rng.choice(starts.get(kind, ("Return",)))


def parity(rng: random.Random, item: Name) -> tuple[Expression, str]:
    k = rng.randint(3, 9)
    return rng.choice(
        (
            (operation("even", item), "even"),
            (operation("odd", item), "odd"),
            (operation("==", operation("%", item, k), 0), f"divisible by {k}"),
        )
    )


def order(rng: random.Random, item: Name, highest: int) -> tuple[Expression, str]:
    k = rng.randint(2, highest)
    far = k + rng.randint(3, 12)
    return rng.choice(
        (
            (operation(">", item, k), f"greater than {k}"),
            (operation("<", item, k), f"less than {k}"),
            (operation(">=", item, k), f"at least {k}"),
            (operation("<=", item, k), f"at most {k}"),
            (operation("!=", item, k), f"different from {k}"),
            (operation("and", operation(">=", item, k), operation("<=", item, far)), f"between {k} and {far}"),
        )
    )


def simple_condition(rng: random.Random, item: Name, highest: int) -> tuple[Expression, str]:
    """A condition on a number, and the adjective for it: `x % 3 == 0`, "divisible by 3"."""
    return parity(rng, item) if rng.random() < 1 / 3 else order(rng, item, highest)


def condition(rng: random.Random, item: Name, highest: int = 25) -> tuple[Expression, str]:
    """One condition, or what a number is divisible by joined with how large it is: "odd and less than 9"."""
    if rng.random() < 0.3:
        (first, phrase), (second, other) = parity(rng, item), order(rng, item, highest)
        joined = rng.choice(("and", "and", "or"))
        return operation(joined, first, second), f"{phrase} {joined} {other}"
    return simple_condition(rng, item, highest)


def change(rng: random.Random, item: Expression, highest: int = 12) -> tuple[Expression, str]:
    """Arithmetic on a number, and the participle for it: `x * 3 + 1`, "multiplied by 3 and increased by 1"."""
    k, m = rng.randint(2, highest), rng.randint(1, highest)
    times = operation("*", item, k)
    return rng.choice(
        (
            (times, f"multiplied by {k}"),
            (operation("+", item, k), f"increased by {k}"),
            (operation("-", item, k), f"decreased by {k}"),
            (operation("-", Number(k), item), f"subtracted from {k}"),
            (operation("+", times, m), f"multiplied by {k} and increased by {m}"),
            (operation("-", times, m), f"multiplied by {k} and decreased by {m}"),
            (operation("*", operation("+", item, m), k), f"increased by {m} and multiplied by {k}"),
            (operation("*", item, item), "squared") if isinstance(item, Name) else (times, f"multiplied by {k}"),
        )
    )


def text_condition(rng: random.Random, item: Name) -> tuple[Expression, str]:
    letter, part, k = rng.choice(LETTERS), rng.choice(PARTS), rng.randint(2, 9)
    return rng.choice(
        (
            (operation("starts_with", item, Text(letter)), f"start with '{letter}'"),
            (operation("ends_with", item, Text(letter)), f"end with '{letter}'"),
            (operation("starts_with", item, Text(part)), f"start with '{part}'"),
            (operation("ends_with", item, Text(part)), f"end with '{part}'"),
            (operation("contains", item, Text(part)), f"contain '{part}'"),
            (operation("contains", item, Text(letter)), f"contain '{letter}'"),
            (operation(">", operation("length", item), k), f"have more than {k} letters"),
            (operation("<", operation("length", item), k), f"have fewer than {k} letters"),
        )
    )


def affix(rng: random.Random) -> str:
    return rng.choice(PARTS) + rng.choice(("", "!", "?", ".", "1", "2", "_"))


def that_are(which: str) -> str:
    return f" that are {which}" if which else ""


def each(how: str) -> str:
    return f", each {how}" if how else ""


def then(how: str) -> str:
    return f", {how}" if how else ""


# families: each draws one task


def fold_numbers(rng: random.Random) -> Draft:
    """A sum, product, maximum or minimum of a list, perhaps of some of its items, perhaps of each changed."""
    kind = rng.choice(("sum", "sum", "sum", "product", "max", "min"))
    small = kind == "product"
    kept, which = condition(rng, X, 6 if small else 25) if kind in ("sum", "product") and rng.random() < 0.7 else (None, "")
    mapped, how = change(rng, X, 6 if small else 12) if rng.random() < 0.55 else (None, "")
    noun = {"sum": "sum", "product": "product", "max": "largest", "min": "smallest"}[kind]
    description = f"{say(rng, 'int')} the {noun} of the numbers in a{that_are(which)}{each(how)}."
    stems = {
        "sum": ("total", "sum", "add_up"),
        "product": ("product", "multiply"),
        "max": ("largest", "max", "top"),
        "min": ("smallest", "min", "least"),
    }
    return Draft(
        stems[kind],
        ("few" if small else "ints",),
        "int",
        Fold(kind, A, "x", "int", kept, mapped),
        description,
        kept is None and mapped is None,
    )


def count_numbers(rng: random.Random) -> Draft:
    kept, which = condition(rng, X)
    description = rng.choice((f"Count the numbers in a that are {which}.", f"Return how many numbers in a are {which}."))
    return Draft(("count", "how_many", "num"), ("ints",), "int", Fold("count", A, "x", "int", kept), description)


def test_numbers(rng: random.Random) -> Draft:
    kind = rng.choice(("any", "all"))
    kept, which = condition(rng, X)
    who = rng.choice(("any number", "some number")) if kind == "any" else "every number"
    description = f"{say(rng, 'bool')} {who} in a is {which}."
    stems = ("has", "any", "some") if kind == "any" else ("all", "only", "every")
    return Draft(stems, ("ints",), "bool", Fold(kind, A, "x", "int", kept), description)


def collect_numbers(rng: random.Random) -> Draft:
    """A list of some of the items, or of each changed, or both."""
    form = rng.choice(("keep", "map", "both"))
    kept, which = condition(rng, X) if form != "map" else (None, "")
    mapped, how = change(rng, X) if form != "keep" else (None, "")
    lead = rng.choice(("Return a list of the numbers in a", "List the numbers in a", "Collect the numbers in a"))
    description = f"{lead}{that_are(which)}{each(how)}."
    stems = {
        "keep": ("keep", "select", "filter"),
        "map": ("change", "update", "convert"),
        "both": ("pick", "extract", "collect"),
    }[form]
    return Draft(stems, ("ints",), "ints", Fold("collect", A, "x", "int", kept, mapped), description)


def fold_then(rng: random.Random) -> Draft:
    """A sum or count, and something done with it."""
    kind = rng.choice(("sum", "count", "max", "min"))
    kept, which = condition(rng, X) if kind == "count" or (kind == "sum" and rng.random() < 0.4) else (None, "")
    noun = {"sum": "the sum of the", "count": "the count of", "max": "the largest of the", "min": "the smallest of the"}[kind]
    what = f"{noun} numbers in a{that_are(which)}"
    result = Name(Fold(kind, A, "x", "int").result)
    if rng.random() < 0.4:
        after, how = simple_condition(rng, result, 25)
        description, returns, stems = f"{say(rng, 'bool')} {what} is {how}.", "bool", ("check", "test", "is_good")
    else:
        after, how = change(rng, result)
        description, returns, stems = f"{say(rng, 'int')} {what}, {how}.", "int", ("score", "rate", "measure")
    return Draft(stems, ("ints",), returns, Fold(kind, A, "x", "int", kept, None, after), description)


def fold_range(rng: random.Random) -> Draft:
    """Like `fold_numbers`, for the integers from 1 to n."""
    kind = rng.choice(("sum", "sum", "product", "count", "collect"))
    small = kind == "product"
    kept, which = condition(rng, I, 4 if small else 9) if kind == "count" or rng.random() < 0.5 else (None, "")
    mapped, how = change(rng, I, 6) if kind != "count" and rng.random() < 0.6 else (None, "")
    if kind == "collect" and kept is None and mapped is None:
        mapped, how = change(rng, I, 6)
    noun = {"sum": "the sum", "product": "the product", "count": "the count", "collect": "a list"}[kind]
    description = f"{say(rng, 'int')} {noun} of the integers from 1 to a{that_are(which)}{each(how)}."
    stems = {
        "sum": ("sum_to", "total_to"),
        "product": ("product_to", "multiply_to"),
        "count": ("count_to", "num_to"),
        "collect": ("list_to", "series_to"),
    }
    fold = Fold(kind, Range(Number(1), A), "i", "int", kept, mapped)
    return Draft(
        stems[kind],
        ("natural" if small else "positive",),
        "ints" if kind == "collect" else "int",
        fold,
        description,
        kept is None and mapped is None,
    )


def reorder_list(rng: random.Random) -> Draft:
    kind, k = rng.choice(("reverse", "sort", "take", "drop", "take", "drop")), rng.randint(1, 3)
    number = k if kind in ("take", "drop") else 0
    numbers = "number" if k == 1 else f"{k} numbers"
    description = {
        "reverse": "Return the numbers in a in reverse order.",
        "sort": "Return the numbers in a in ascending order.",
        "take": f"Return the first {numbers} in a.",
        "drop": f"Return the numbers in a without the first {numbers}.",
    }[kind]
    stems = {
        "reverse": ("reverse", "turn"),
        "sort": ("sort", "order"),
        "take": ("take", "first"),
        "drop": ("drop", "skip"),
    }[kind]
    return Draft(stems, ("ints",), "ints", Reorder(kind, "a", "int", number), description, atom=True)


def list_ends(rng: random.Random) -> Draft:
    """Arithmetic on the first item, the last item or the size of a list."""
    what, phrase = rng.choice(
        (
            (operation("first", A), "the first number in a"),
            (operation("last", A), "the last number in a"),
            (operation("size", A), "the size of a"),
            (
                operation("+", operation("first", A), operation("last", A)),
                "the sum of the first and the last number in a",
            ),
            (operation("-", operation("last", A), operation("first", A)), "the last number in a minus the first"),
            (
                operation("*", operation("first", A), operation("last", A)),
                "the product of the first and the last number in a",
            ),
        )
    )
    if rng.random() < 0.35:
        body, how = simple_condition(rng, what, 12)
        return Draft(("check", "test"), ("ints",), "bool", Choice(body), f"{say(rng, 'bool')} {phrase} is {how}.")
    body, how = change(rng, what) if rng.random() < 0.8 else (what, "")
    return Draft(("value", "edge", "from"), ("ints",), "int", Choice(body), f"{say(rng, 'int')} {phrase}{then(how)}.", not how)


def fold_words(rng: random.Random) -> Draft:
    """Words that meet a condition: their list, their number, their length in all."""
    kept, which = text_condition(rng, WORD)
    kind = rng.choice(("collect", "collect", "count", "sum"))
    if kind == "count":
        description, stems, returns, mapped = (
            f"Count the strings in a that {which}.",
            ("count", "how_many"),
            "int",
            None,
        )
    elif kind == "sum":
        description, stems, returns = (
            f"{say(rng, 'int')} the total length of the strings in a that {which}.",
            ("length", "letters"),
            "int",
        )
        mapped = operation("length", WORD)
    else:
        mapped, how = rng.choice(
            ((None, ""), (operation("upper", WORD), ", in upper case"), (operation("reverse", WORD), ", each reversed"))
        )
        if mapped is not None and mapped.operator == "reverse":
            mapped, how = operation("length", WORD), ""
            lead = "Return a list of the lengths of the strings in a"
            return Draft(
                ("lengths",),
                ("texts",),
                "ints",
                Fold("collect", A, "word", "text", kept, mapped),
                f"{lead} that {which}.",
            )
        description, stems, returns = (
            f"Return a list of the strings in a that {which}{how}.",
            ("keep", "select", "filter"),
            "texts",
        )
    return Draft(stems, ("texts",), returns, Fold(kind, A, "word", "text", kept, mapped), description)


def join_words(rng: random.Random) -> Draft:
    separator = rng.choice(SEPARATORS)
    body: Expression = operation("join", A, Text(separator))
    ending = rng.choice(("", "", "upper", "affix"))
    extra = ""
    if ending == "upper":
        body, extra = operation("upper", body), ", in upper case"
    elif ending == "affix":
        end = affix(rng)
        body, extra = operation("concat", body, Text(end)), f", followed by '{end}'"
    return Draft(
        ("join", "combine", "merge"),
        ("texts",),
        "text",
        Choice(body),
        f"{rng.choice(('Join', 'Combine'))} the strings in a with '{separator}' between them{extra}.",
    )


def change_text(rng: random.Random) -> Draft:
    """One or two steps on a text."""
    value: Expression = A
    phrases = []
    for step in rng.sample(("upper", "reverse", "repeat", "before", "after", "replace", "first", "last"), rng.choice((1, 2, 2))):
        k, end = rng.randint(2, 6), affix(rng)
        old, new = rng.sample(LETTERS, 2)
        if step == "upper":
            case = rng.choice(("upper", "lower"))
            value, phrase = operation(case, value), f"in {case} case"
        elif step == "reverse":
            value, phrase = operation("reverse", value), "reversed"
        elif step == "repeat":
            value, phrase = operation("repeat", value, k), f"repeated {k} times"
        elif step == "before":
            value, phrase = operation("concat", Text(end), value), f"with '{end}' in front"
        elif step == "after":
            value, phrase = operation("concat", value, Text(end)), f"followed by '{end}'"
        elif step == "replace":
            value, phrase = operation("replace", value, Text(old), Text(new)), f"with every '{old}' replaced by '{new}'"
        elif value != A:
            continue
        else:
            k = rng.randint(1, 4)
            letters = "letter" if k == 1 else f"{k} letters"
            value, phrase = operation(f"{step}_letters", value, k), f"cut to its {step} {letters}"
        phrases.append(phrase)
    if value == A:
        value, phrases = operation("upper", A), ["in upper case"]
    atom = len(phrases) == 1 and not constants_of(value)
    return Draft(
        ("format", "style", "make", "write"),
        ("text",),
        "text",
        Choice(value),
        f"{say(rng, 'text')} a {', then '.join(phrases)}.",
        atom,
    )


def two_texts(rng: random.Random) -> Draft:
    between = rng.choice(SEPARATORS)
    first, second, how = rng.choice(
        (
            (A, B, "a and b joined by '{}'"),
            (B, A, "b and a joined by '{}'"),
            (operation("upper", A), B, "a in upper case and b joined by '{}'"),
            (A, operation("upper", B), "a and b in upper case joined by '{}'"),
            (operation("reverse", A), B, "a reversed and b joined by '{}'"),
        )
    )
    body = operation("concat", first, Text(between), second)
    return Draft(
        ("pair", "link", "connect"),
        ("text", "text"),
        "text",
        Choice(body),
        f"{say(rng, 'text')} {how.format(between)}.",
    )


def text_number(rng: random.Random) -> Draft:
    letter = rng.choice(LETTERS)
    what, phrase = rng.choice(
        (
            (operation("count_letter", A, Text(letter)), f"the number of times '{letter}' is in a"),
            (operation("length", A), "the length of a"),
        )
    )
    if rng.random() < 0.4:
        body, how = simple_condition(rng, what, 10)
        return Draft(("check", "test"), ("text",), "bool", Choice(body), f"{say(rng, 'bool')} {phrase} is {how}.")
    body, how = change(rng, what) if rng.random() < 0.7 else (what, "")
    return Draft(
        ("count_in", "measure"),
        ("text",),
        "int",
        Choice(body),
        f"{say(rng, 'int')} {phrase}{then(how)}.",
        not constants_of(body),
    )


def test_text(rng: random.Random) -> Draft:
    if rng.random() < 0.1:
        body = operation("same_text", A, operation("reverse", A))
        return Draft(
            ("is_palindrome", "same_backwards"),
            ("text",),
            "bool",
            Choice(body),
            f"{say(rng, 'bool')} a is a palindrome.",
            True,
        )
    body, which = text_condition(rng, A)
    first, _, rest = which.partition(" ")
    verb = {"have": "has"}.get(first, first + "s")
    if rng.random() < 0.4:
        other, second = text_condition(rng, A)
        while second.split(" ")[0] == first:  # "ends with 'c' and ends with 'w'" says nothing
            other, second = text_condition(rng, A)
        head, _, tail = second.partition(" ")
        joined = rng.choice(("and", "or"))
        body = operation(joined, body, other)
        rest += f" {joined} { ({'have': 'has'}.get(head, head + 's')) } {tail}"
    return Draft(("check", "is_valid", "match"), ("text",), "bool", Choice(body), f"{say(rng, 'bool')} a {verb} {rest}.")


def change_number(rng: random.Random) -> Draft:
    body, how = change(rng, A, 40)
    return Draft(
        ("change", "convert", "adjust", "scale"),
        ("int",),
        "int",
        Choice(body),
        f"{say(rng, 'int')} a {how}.",
        not constants_of(body),
    )


def two_numbers(rng: random.Random) -> Draft:
    """Arithmetic on two numbers."""
    k = rng.randint(2, 9)
    value, phrase = rng.choice(
        (
            (operation("+", A, B), "the sum of a and b"),
            (operation("-", A, B), "the difference of a and b"),
            (operation("*", A, B), "the product of a and b"),
            (operation("abs", operation("-", A, B)), "the absolute difference of a and b"),
            (operation("max", A, B), "the larger of a and b"),
            (operation("min", A, B), "the smaller of a and b"),
            (operation("+", A, operation("*", B, k)), f"a plus {k} times b"),
            (operation("+", operation("*", A, A), operation("*", B, B)), "the sum of the squares of a and b"),
            (operation("*", operation("+", A, B), 2), "twice the sum of a and b"),
        )
    )
    roll = rng.random()
    if roll < 0.3:
        body, how = simple_condition(rng, value, 25)
        return Draft(("check", "compare"), ("int", "int"), "bool", Choice(body), f"{say(rng, 'bool')} {phrase} is {how}.")
    if roll < 0.75:
        body, how = change(rng, value)
        return Draft(("combine", "mix"), ("int", "int"), "int", Choice(body), f"{say(rng, 'int')} {phrase}, {how}.")
    return Draft(("combine", "mix"), ("int", "int"), "int", Choice(value), f"{say(rng, 'int')} {phrase}.", True)


def three_numbers(rng: random.Random) -> Draft:
    value, phrase = rng.choice(
        (
            (operation("max", A, B, C), "the largest of a, b and c"),
            (operation("min", A, B, C), "the smallest of a, b and c"),
            (operation("+", operation("+", A, B), C), "the sum of a, b and c"),
            (operation("*", operation("*", A, B), C), "the product of a, b and c"),
        )
    )
    if rng.random() < 0.3:
        body, how = simple_condition(rng, value, 25)
        return Draft(("check", "test"), ("int",) * 3, "bool", Choice(body), f"{say(rng, 'bool')} {phrase} is {how}.")
    body, how = change(rng, value) if rng.random() < 0.8 else (value, "")
    return Draft(("of_three", "three"), ("int",) * 3, "int", Choice(body), f"{say(rng, 'int')} {phrase}{then(how)}.", not how)


def clamp_number(rng: random.Random) -> Draft:
    low = rng.randint(0, 15)
    high = low + rng.randint(2, 30)
    form = rng.choice(("both", "both", "low", "high"))
    if form == "both":
        body, phrase = operation("max", operation("min", A, high), low), f"a, but at least {low} and at most {high}"
    elif form == "low":
        body, phrase = operation("max", A, low), f"a, but at least {low}"
    else:
        body, phrase = operation("min", A, high), f"a, but at most {high}"
    return Draft(("clamp", "bound", "restrict"), ("int",), "int", Choice(body), f"{say(rng, 'int')} {phrase}.")


def test_number(rng: random.Random) -> Draft:
    body, which = condition(rng, A, 50)
    return Draft(("is_good", "is_valid", "check"), ("int",), "bool", Choice(body), f"{say(rng, 'bool')} a is {which}.")


LABELS = """
low high small big cold hot young old poor good slow fast light heavy short long cheap dear weak strong no yes few many
""".split()


def label_number(rng: random.Random) -> Draft:
    """A word for a number: by one threshold or two, or by a condition."""
    first, second, third = rng.sample(LABELS, 3)
    if rng.random() < 0.5:
        low = rng.randint(2, 30)
        high = low + rng.randint(2, 40)
        branches = ((operation("<", A, low), Text(first)), (operation("<", A, high), Text(second)))
        description = (
            f"{say(rng, 'text')} '{first}' if a is less than {low}, '{second}' if it is less than {high}, otherwise '{third}'."
        )
        return Draft(("label", "describe", "name"), ("int",), "text", Choice(Text(third), branches), description)
    test, which = condition(rng, A, 40)
    description = f"{say(rng, 'text')} '{first}' if a is {which}, otherwise '{second}'."
    return Draft(("label", "describe", "name"), ("int",), "text", Choice(Text(second), ((test, Text(first)),)), description)


def branch_number(rng: random.Random) -> Draft:
    """One of two changes, by a condition."""
    test, which = simple_condition(rng, A, 30)
    yes, how = change(rng, A)
    no, other = change(rng, A) if rng.random() < 0.6 else (A, "itself")
    description = f"{say(rng, 'int')} a {how} if it is {which}, otherwise {'a ' + other}."
    return Draft(("decide", "choose", "switch"), ("int",), "int", Choice(no, ((test, yes),)), description)


def repeat_change(rng: random.Random) -> Draft:
    """Apply a change n times to a start: powers, doubling, compound growth."""
    k, m, start = rng.randint(2, 6), rng.randint(1, 9), rng.randint(1, 9)
    result = Name("result")
    if rng.random() < 0.2:
        loop = Loop((("result", Number(start)),), Range(Number(1), B), (("result", operation("*", result, A)),), result)
        return Draft(
            ("power", "grow"),
            ("natural", "natural"),
            "int",
            loop,
            f"{say(rng, 'int')} {start} multiplied by a, b times.",
        )
    step, how = rng.choice(
        (
            (operation("*", result, k), f"multiplied by {k}"),
            (operation("+", operation("*", result, k), m), f"multiplied by {k} and increased by {m}"),
            (operation("*", operation("+", result, m), k), f"increased by {m} and multiplied by {k}"),
        )
    )
    loop = Loop((("result", Number(start)),), Range(Number(1), A), (("result", step),), result)
    return Draft(("grow", "repeat", "iterate"), ("natural",), "int", loop, f"{say(rng, 'int')} {start} {how}, a times over.")


def sequence(rng: random.Random) -> Draft:
    """The n-th number of a sequence in which each is made of the two before it, as Fibonacci's."""
    first, second, k = rng.randint(0, 6), rng.randint(1, 9), rng.randint(2, 4)
    current, following = Name("current"), Name("following")
    step, how = rng.choice(
        (
            (operation("+", current, following), "the sum of the two before it"),
            (
                operation("+", current, operation("*", following, k)),
                f"the number two before plus {k} times the number before",
            ),
        )
    )
    variables = (("current", Number(first)), ("following", Number(second)))
    loop = Loop(variables, Range(Number(1), A), (("current", following), ("following", step)), current)
    return Draft(
        ("sequence", "nth", "series"),
        ("natural",),
        "int",
        loop,
        f"Start with {first} and {second}, where each number is {how}, and return the one after a steps.",
    )


def common_divisor(rng: random.Random) -> Draft:
    x, y = Name("x"), Name("y")
    value, how, returns = x, "", "int"
    if rng.random() < 0.35:
        value, which = simple_condition(rng, x, 12)
        description, returns = f"{say(rng, 'bool')} the greatest common divisor of a and b is {which}.", "bool"
    else:
        value, how = change(rng, x) if rng.random() < 0.85 else (x, "")
        description = f"{say(rng, 'int')} the greatest common divisor of a and b{then(how)}."
    loop = Loop((("x", A), ("y", B)), operation("!=", y, 0), (("x", y), ("y", operation("%", x, y))), value)
    return Draft(("divisor", "gcd"), ("positive", "positive"), returns, loop, description, value == x)


def digits(rng: random.Random) -> Draft:
    """The sum, number or product of a number's digits in some base."""
    rest, total = Name("rest"), Name("total")
    base = rng.choice((10, 10, 10, 2, 3, 4, 5, 6, 7, 8, 9))
    digit = operation("%", rest, base)
    step, noun, start = rng.choice(
        (
            (operation("+", total, digit), "sum of the digits", 0),
            (operation("+", total, 1), "number of digits", 0),
            (operation("*", total, digit), "product of the digits", 1),
        )
    )
    what = f"the {noun} of a" + (f" in base {base}" if base != 10 else "")
    if rng.random() < 0.3:
        value, which = simple_condition(rng, total, 20)
        description, returns = f"{say(rng, 'bool')} {what} is {which}.", "bool"
    else:
        value, how = change(rng, total) if rng.random() < 0.6 else (total, "")
        description, returns = f"{say(rng, 'int')} {what}{then(how)}.", "int"
    loop = Loop(
        (("rest", A), ("total", Number(start))),
        operation(">", rest, 0),
        (("total", step), ("rest", operation("//", rest, base))),
        value,
    )
    return Draft(("digits", "digit_score"), ("large",), returns, loop, description, value == total)


def count_steps(rng: random.Random) -> Draft:
    """How many steps until a bound is passed."""
    rest, steps = Name("rest"), Name("steps")
    k, bound = rng.randint(2, 9), rng.randint(1, 20)
    more = ("steps", operation("+", steps, 1))
    form = rng.choice(("divide", "subtract", "multiply"))
    if form == "divide":
        loop = Loop(
            (("rest", A), ("steps", Number(0))),
            operation(">", rest, bound),
            (("rest", operation("//", rest, k)), more),
            steps,
        )
        description = f"Count how often a can be divided by {k} until it is at most {bound}."
    elif form == "subtract":
        loop = Loop(
            (("rest", A), ("steps", Number(0))),
            operation(">=", rest, bound),
            (("rest", operation("-", rest, k)), more),
            steps,
        )
        description = f"Count how often {k} can be subtracted from a until it is less than {bound}."
    else:
        loop = Loop(
            (("rest", Number(bound)), ("steps", Number(0))),
            operation("<", rest, A),
            (("rest", operation("*", rest, k)), more),
            steps,
        )
        description = f"Count how often {bound} must be multiplied by {k} until it is at least a."
    return Draft(("steps", "rounds"), ("large" if form != "subtract" else "positive",), "int", loop, description)


FAMILIES: tuple[tuple[Callable[[random.Random], Draft], int], ...] = (
    (fold_numbers, 5),
    (count_numbers, 3),
    (test_numbers, 3),
    (collect_numbers, 5),
    (fold_then, 3),
    (fold_range, 4),
    (reorder_list, 1),
    (list_ends, 2),
    (fold_words, 3),
    (join_words, 1),
    (change_text, 3),
    (two_texts, 1),
    (text_number, 2),
    (test_text, 2),
    (change_number, 1),
    (two_numbers, 2),
    (three_numbers, 1),
    (clamp_number, 1),
    (test_number, 2),
    (label_number, 2),
    (branch_number, 2),
    (repeat_change, 2),
    (sequence, 1),
    (common_divisor, 1),
    (digits, 2),
    (count_steps, 2),
)


def problems(split: str, seed: int) -> Iterator[Problem]:
    """An endless stream of problems of one split, "train" or "held-out"; the same for the same seed.

    A problem is held out by the hash of its key (what it computes, constants and composition, without names), and the names of
    functions and parameters by the hash of the name: no held-out task and no held-out name is ever in the training stream.
    """
    if split not in names.SPLITS:
        raise ValueError(f"a split is one of {', '.join(names.SPLITS)}, not {split!r}")
    rng = random.Random(f"{split} {seed}")
    families, weights = zip(*FAMILIES, strict=True)
    while True:
        (family,) = rng.choices(families, weights)
        draft = family(rng)
        key = f"{family.__name__} {draft.body!r}"
        if ("train" if draft.atom else names.split_of(key)) == split:
            yield named(draft, family.__name__, key, rng, split)


def named(draft: Draft, family: str, key: str, rng: random.Random, split: str) -> Problem:
    """Give a draft's function and parameters names of the split."""
    types = [TYPE_OF.get(kind, kind) for kind in draft.kinds]
    called: dict[str, str] = {}
    for placeholder, kind in zip("abc", types, strict=False):
        called[placeholder] = names.draw_name(rng, kind, split, set(called.values()))
    parameters = tuple(zip(called.values(), types, strict=True))
    name = names.function_name(rng, draft.stems, parameters[0][0])
    function = Function(name, parameters, draft.returns, renamed(draft.body, called))
    return Problem(family, key, function, reworded(draft.description, called), draft.kinds)


def reworded(description: str, called: dict[str, str]) -> str:
    """The description with the parameters' names for a, b and c; the article "a" and quoted text stay as they are."""
    words = description.split(" ")
    for i, word in enumerate(words):
        bare = word.rstrip(".,")
        article = bare == "a" and i + 1 < len(words) and words[i + 1] in ("list", "palindrome.")
        if bare in called and not article:
            words[i] = called[bare] + word[len(bare) :]
    return " ".join(words)


def renamed(node: Any, called: dict[str, str]) -> Any:
    """The same body with other names for its parameters."""
    if isinstance(node, Name):
        return Name(called.get(node.name, node.name))
    if isinstance(node, Reorder):
        return Reorder(node.kind, called[node.source], node.item_type, node.number)
    if isinstance(node, tuple):
        return tuple(renamed(item, called) for item in node)
    if hasattr(node, "__dataclass_fields__") and not isinstance(node, (Number, Text)):
        return type(node)(*(renamed(getattr(node, field), called) for field in node.__dataclass_fields__))
    return node
