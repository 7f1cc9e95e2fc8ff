"""Menus whose entries change while the page is open, and what keeps them true: models and adapters come and go for everybody."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from flora.corpus.code import LANGUAGES as CODE_LANGUAGES
from flora.corpus.speech import LANGUAGES as SPEECH_LANGUAGES
from flora.engine import Engine
from profiling.dashboard.engines import Engines

NO_ADAPTER = ""
MAX_LISTED = 500  # tags of a menu; of more, the first, and any other may be typed


class Menu(gr.Dropdown):
    """A menu whose entries change: what was chosen before they did is told as it is, not refused.

    A visitor may choose before the newest entries arrive, and gr.Dropdown knows only those.
    """

    is_template = True  # the browser's side is gr.Dropdown's

    def preprocess(self, payload: Any) -> str | None:
        return payload if isinstance(payload, str) else None


class MultiMenu(gr.Dropdown):
    """As `Menu`, of which several entries may be chosen: give `multiselect=True`."""

    is_template = True

    def preprocess(self, payload: Any) -> list[str]:
        return [entry for entry in payload if isinstance(entry, str)] if isinstance(payload, list) else []


def adapter_choices(kind: str, engines: Mapping[str, Engine], chosen: str | None = None) -> list[tuple[str, str]]:
    """What an adapter menu offers: each tag and, where known, its language's name; last the bare base model.

    chosen: what the menu shows now; it stays, marked, where there is no such adapter any more.
    """
    tags = list(engines[kind].adapters)
    languages = CODE_LANGUAGES if kind == "code" else SPEECH_LANGUAGES
    choices = [(f"{tag} · {languages[tag].name}" if tag in languages else tag, tag) for tag in tags[:MAX_LISTED]]
    if chosen and chosen not in tags:
        choices.append((f"{chosen} · not here", chosen))
    elif chosen in tags[MAX_LISTED:]:
        choices.append((chosen, chosen))
    return [*choices, ("no adapter", NO_ADAPTER)]


@dataclass(frozen=True)
class Follower:
    """A part of the page that shows which models and adapters there are.

    update: the values of `inputs`, and whether the page has just been opened, → values for `outputs`. menus: those that look for
    news when they are opened.
    """

    outputs: Sequence[gr.blocks.Block]
    update: Callable[[Sequence[Any], bool], list[Any]]
    inputs: Sequence[gr.components.Component] = ()
    menus: Sequence[gr.Dropdown] = field(default=())


class Following:
    """All followers of a page. What a page last saw is a number; where it is still the engines' own, there is nothing to do."""

    def __init__(self, engines: Engines, followers: Sequence[Follower]) -> None:
        self.engines, self.followers = engines, followers
        self.seen = gr.State(engines.number)
        self.inputs = [self.seen, *(part for follower in followers for part in follower.inputs)]
        self.outputs = [self.seen, *(part for follower in followers for part in follower.outputs)]

    def connect(self, selected: Sequence[Callable], changes: Sequence[Callable], opened: Callable) -> None:
        """Look for news when a tab is selected, after each change that the page makes, and when a menu or the page is opened."""
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        menus = [menu.focus for follower in self.followers for menu in follower.menus]
        gr.on([*selected, *menus], self.look, self.inputs, self.outputs, **quiet)
        for then in changes:
            then(self.look, self.inputs, self.outputs, **quiet)
        opened(self.begin, self.inputs, self.outputs, **quiet)

    def look(self, seen: int, *values: Any) -> list[Any]:
        """News for a page that is open."""
        return self._news(seen, values, opened=False)

    def begin(self, seen: int, *values: Any) -> list[Any]:
        """News for a page that has just been opened, and shows what there was when the server was started."""
        return self._news(seen, values, opened=True)

    def _news(self, seen: int, values: Sequence[Any], opened: bool) -> list[Any]:
        number = self.engines.number
        if seen == number:
            return [gr.skip()] * len(self.outputs)
        left, updates = iter(values), []
        for follower in self.followers:
            updates += follower.update([next(left) for _ in follower.inputs], opened)
        return [number, *updates]
