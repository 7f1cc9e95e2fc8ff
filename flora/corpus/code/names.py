"""Names for functions and parameters; every name belongs to one split for ever.

There are far more names than a model of this size can learn by heart, so that it has to learn to copy them from the prompt.
"""

from __future__ import annotations

import hashlib
import random

SPLITS = ("train", "held-out")

COUNTED = """
price score weight age point number level height size mark cost step vote coin seat order day hour mile stone brick apple
ticket page card tile bead bottle book stamp shell amount grade temperature distance rate speed depth width bill wage
gain profit sale visit goal lap floor room plant tree seed egg cup plate spoon chair lamp wire bolt screw nail rope boat
wagon train reading sample digit integer road river lake hill field farm horse hen dog cat bird nest net shop market
stall basket barrel crate parcel letter cable pipe valve pump motor wheel gear lever spring clock bell drum flute song
record film poster ticket garden flower leaf root branch fruit melon lemon onion carrot bean pea grain sack mill oven cake
cookie candle lantern mirror window door wall roof tower bridge tunnel station platform engine cabin deck mast sail anchor
harbor island village castle market museum hotel garage office school class pupil teacher lesson test exam quiz result
player team match game round prize medal trophy target arrow racket glove shirt coat hat shoe button needle thread cloth
blanket pillow carpet curtain shelf drawer cupboard bucket broom hammer saw drill ladder shovel rake hose fence gate path
sensor signal channel packet message buffer block frame pixel layer column row cell node edge
""".split()
QUANTITIES = """
n amount limit width height age score level price weight depth speed distance degree mark grade budget volume
area number quantity balance temperature radius rank mass power pressure altitude income payment bonus
discount deposit salary offset position duration month year minute hour day floor room goal visit
energy charge voltage current load force torque angle slope margin ratio share tax fee fine rent debt credit loan
capacity supply demand stock surplus deficit growth height length_cm delay timeout interval period frequency phase
humidity rainfall brightness contrast loudness pitch tempo beat stride pace lap turn stage rating index address port seat
bid offer quota target threshold tolerance gap range_km mileage fuel thrust lift drag wind tide latitude longitude
""".split()
WRITTEN = """
name title label phrase sentence line caption nickname slogan heading greeting subject password city
country street author brand color flavor animal note comment motto answer question reply
village river mountain planet flower dish recipe song poem verse rhyme riddle story chapter quote headline summary
username handle domain address hostname filename folder suffix prefix keyword token symbol code serial badge sign
surname initials signature profession hobby sport team club band movie actor singer painter writer poet inventor
""".split()
QUALIFIERS = """
new old all my red big daily first weekly small good rare local other main top raw given final early late best
blue green black white gray brown long short wide narrow tall deep light heavy fast slow warm cold dry wet clean dirty
cheap paid free open closed full spare extra missing lost found broken fixed used sold rented ordered shipped returned
public private shared hidden visible active idle ready pending valid common special regular usual average total net
gross monthly yearly hourly nightly morning evening winter summer spring autumn north south east west upper lower inner
outer left right middle front back minor major junior senior next previous last latest current recent former future
silver golden wooden iron paper plastic cotton leather royal modern ancient foreign remote urban rural coastal
""".split()
SYLLABLES = """
ba be bo bri ca ce clo da de dri du fa fe fli go gra ha he jo ka ke ko la le li lo lu ma me mi mo na ne no nu o pa pe plo
qua ra re ri ro ru sa se si sko so sta su ta te ti to tra tu va ve vi vo wa we zo zu
""".split()
CODAS = ("", "", "", "l", "m", "n", "r", "s", "t", "x", "nd", "rk", "st")

LOCALS = frozenset(
    "result count total sum largest smallest product word x y i rest steps current following digit item".split()
)
"""What the languages call their own variables: no parameter has such a name."""
TAKEN = frozenset(  # words of some language, as a bare name
    """
    alias all and any as assert begin block body box branch break byte case cast char class code const continue crate debug
    def default delegate do else end enum except export extern false final fn for from function gate global goto guard if
    import in index init inout int is lambda last first second let library local long loop macro match max min mod module move
    mut my new next nil none not null object operator or out override package pass port print private protocol pub public
    quote range real record ref repeat require return root scope self short static string struct super switch symbol table
    test then this token trait true try type unit unless until use using values vector version virtual void when where while
    yield
    """.split()
)


def plural(noun: str) -> str:
    """prices, boxes, cities, leaves."""
    if noun in ("leaf", "shelf"):
        return noun[:-1] + "ves"
    if noun.endswith(("s", "x", "sh", "ch", "z")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def _unique(words: list[str]) -> list[str]:
    return list(dict.fromkeys(words))


POOLS = {
    "ints": _unique([plural(noun) for noun in COUNTED]),
    "int": _unique(QUANTITIES),
    "text": _unique(WRITTEN),
    "texts": _unique([plural(noun) for noun in WRITTEN if noun != "initials"]),
}
FIRST_HALVES = _unique([*COUNTED, *WRITTEN])
"""What stands before the noun in a compound: `river_prices`."""
SHORT = {
    "ints": "xs ns nums numbers values items data array arr a lst".split(),
    "int": "n k m a b num value p q".split(),
    "text": "s t text string word_in input_text a b".split(),
    "texts": "words strings texts lines names ws items a".split(),
}
"""What programmers type when they do not think about it."""


def split_of(key: str) -> str:
    """The split a key belongs to: one in eight is held out, by its hash."""
    return "held-out" if hashlib.sha256(key.encode()).digest()[0] % 8 == 0 else "train"


def made_up(rng: random.Random) -> str:
    """A word that means nothing: `velotra`, `skonu_bem`."""

    def word() -> str:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))) + rng.choice(CODAS)

    return word() if rng.random() < 0.7 else f"{word()}_{word()}"


def _candidate(rng: random.Random, kind: str, split: str) -> str:
    form = rng.random()
    if split == "train" and form < 0.25:  # only to learn copying from
        return made_up(rng) if form < 0.2 else rng.choice(SHORT[kind])
    noun = rng.choice(POOLS[kind])
    form = rng.random()
    if form < 0.3:
        return noun
    if form < 0.75:
        return f"{rng.choice(QUALIFIERS)}_{noun}"
    return f"{rng.choice(FIRST_HALVES)}_{noun}"


def draw_name(rng: random.Random, kind: str, split: str, taken: set[str]) -> str:
    """A parameter's name of this split that is not taken."""
    while True:
        name = _candidate(rng, kind, split)
        if name not in taken and name not in LOCALS and name not in TAKEN and split_of(name) == split:
            return name


def function_name(rng: random.Random, stems: tuple[str, ...], parameter: str) -> str:
    """What a function does, and to what: `total_prices`, of the parameter's split, since it holds its name."""
    return f"{rng.choice(stems)}_{parameter}"
