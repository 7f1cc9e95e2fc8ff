"""Names for functions and parameters; every name belongs to one split for ever."""

from __future__ import annotations

import hashlib
import random

SPLITS = ("train", "held-out")

NUMBER_LISTS = """
prices scores weights ages points numbers levels heights sizes marks costs steps votes coins seats orders days
hours miles stones bricks apples tickets pages cards tiles beads boxes bottles books stamps shells amounts
grades temperatures distances rates speeds depths widths bills wages gains losses profits sales visits goals
laps floors rooms plants trees seeds eggs loaves cups plates spoons chairs tables lamps wires bolts screws
nails ropes boats wagons trains readings samples entries digits integers
""".split()
NUMBERS = """
n amount limit width height age score level price weight depth speed distance degree mark grade budget volume
area number quantity balance temperature radius rank mass power pressure altitude income payment bonus
discount deposit salary offset position duration month year minute second hour day floor room goal visit
""".split()
TEXTS = """
name title label phrase message sentence line caption nickname slogan heading greeting subject password city
country street author brand color flavor animal letter note comment motto answer question reply
""".split()
TEXT_LISTS = """
names titles labels phrases messages sentences words captions nicknames slogans headings greetings subjects
cities countries streets authors brands colors flavors animals letters notes comments mottos answers questions
replies tags
""".split()
QUALIFIERS = """
new old all my red big daily first weekly small good rare local other main top raw given final early late best
""".split()
POOLS = {"ints": NUMBER_LISTS, "int": NUMBERS, "text": TEXTS, "texts": TEXT_LISTS}


def split_of(key: str) -> str:
    """The split a key belongs to: one in eight is held out, by its hash."""
    return "held-out" if hashlib.sha256(key.encode()).digest()[0] % 8 == 0 else "train"


def draw_name(rng: random.Random, kind: str, split: str, taken: set[str]) -> str:
    """A parameter's name of this split that is not taken."""
    while True:
        name = rng.choice(POOLS[kind])
        if rng.random() < 0.5:
            name = f"{rng.choice(QUALIFIERS)}_{name}"
        if name not in taken and split_of(name) == split:
            return name


def draw_function_name(rng: random.Random, stems: tuple[str, ...], kind: str, split: str) -> str:
    """A function's name of this split: what it does, and to what."""
    while True:
        name = f"{rng.choice(stems)}_{rng.choice(POOLS[kind])}"
        if rng.random() < 0.3:
            name = f"{rng.choice(stems)}_{rng.choice(QUALIFIERS)}_{rng.choice(POOLS[kind])}"
        if split_of(name) == split:
            return name
