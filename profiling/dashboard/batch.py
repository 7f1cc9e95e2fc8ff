"""The batch a visitor builds: rows of code prompts and audio clips, each with an adapter. A fixed pool of rows, shown as needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from flora.corpus.code import example_prompts
from flora.engine import Engine
from profiling import workload
from profiling.dashboard.menus import NO_ADAPTER, Follower, Menu, adapter_choices

ROWS_PER_KIND = 8
KINDS = ("code", "speech")
_FIELD = {"code": "prompt", "speech": "audio"}
_MENU = "examples"
_READY = "ready batch: prompts and clips, each with its own adapter"


@dataclass(frozen=True)
class _Slot:
    """One row of the pool."""

    row: gr.Row
    content: gr.Textbox | gr.Audio
    adapter: Menu
    remove: gr.Button


class BatchEditor:
    """The left panel. Call it inside a Blocks context, then `connect()`.

    `inputs` are the components that a handler takes, `rows(values)` reads what it was given.

    engines: kind -> engine; the kinds stay, their adapters may come and go.
    """

    def __init__(self, engines: Mapping[str, Engine]):
        self.engines = engines
        examples = self._examples()
        ready = self.ready = examples.get(_READY, [])  # what every page shows when it is opened
        self.offered = list(examples)
        begin = {kind: [row for row in ready if _FIELD[kind] in row] for kind in self.kinds}
        self.slots: dict[str, list[_Slot]] = {}
        gr.HTML('<h2 class="panel-title">batch</h2>', apply_default_css=False)
        for kind in self.kinds:
            self.slots[kind] = [self._slot(kind, i, begin[kind][i] if i < len(begin[kind]) else None) for i in range(ROWS_PER_KIND)]
        self.shown = gr.State({kind: [i < len(begin[kind]) for i in range(ROWS_PER_KIND)] for kind in self.kinds})
        with gr.Row(elem_classes="batch-buttons"):
            self.add = {}
            for kind, word in (("code", "code"), ("speech", "audio")):
                if kind in self.kinds:
                    self.add[kind] = gr.Button(f"+ {word}", size="sm", scale=0, min_width=70, elem_id=f"add-{word}")
            self.menu = Menu(
                choices=[_MENU, *examples],
                value=_MENU,
                label="examples",
                show_label=False,
                container=False,
                min_width=120,
                elem_id="examples",
                elem_classes="examples",
                filterable=True,
                interactive=True,
            )

    def _slot(self, kind: str, i: int, row: Mapping[str, Any] | None) -> _Slot:
        with gr.Row(
            visible=row is not None, elem_classes=f"request-row {kind}", elem_id=f"{kind}-row-{i}", equal_height=False
        ) as line:
            adapter = Menu(
                choices=adapter_choices(kind, self.engines),
                value=(row or {}).get("adapter") or NO_ADAPTER,
                label=f"adapter of {kind} row {i + 1}",
                show_label=False,
                container=False,
                scale=0,
                min_width=124,
                filterable=True,
                elem_classes="adapter-menu",
                interactive=True,
            )
            if kind == "code":
                content: gr.Textbox | gr.Audio = gr.Textbox(
                    value=(row or {}).get("prompt", ""),
                    lines=3,
                    max_lines=3,
                    label=f"prompt {i + 1}",
                    show_label=False,
                    container=False,
                    placeholder="the beginning of a function",
                    scale=1,
                    min_width=120,
                    elem_classes="prompt-box",
                    interactive=True,
                )
            else:
                content = gr.Audio(
                    value=_clip_path((row or {}).get("audio")),
                    type="filepath",
                    sources=["upload", "microphone"],
                    label=f"clip {i + 1}",
                    show_label=False,
                    container=False,
                    scale=1,
                    min_width=120,
                    elem_classes="clip-box",
                    interactive=True,
                    editable=False,
                    buttons=[],
                    waveform_options=gr.WaveformOptions(
                        waveform_color="#8a97a3", waveform_progress_color="#0072B2", show_recording_waveform=True
                    ),
                )
            remove = gr.Button("✕", size="sm", scale=0, min_width=28, elem_classes="remove-row", elem_id=f"remove-{kind}-{i}")
        return _Slot(line, content, adapter, remove)

    @property
    def kinds(self) -> list[str]:
        """Of the models there are."""
        return [kind for kind in KINDS if kind in self.engines]

    def _examples(self) -> dict[str, list[dict]]:
        """Menu entry -> rows. An entry that begins with "add" adds its row, the others replace the batch."""
        adapters = {kind: list(self.engines[kind].adapters) for kind in self.kinds}
        found: dict[str, list[dict]] = {_READY: workload.ready_rows(adapters)}
        prompts = {tag: texts for tag, texts in example_prompts().items() if texts}
        clips: dict[str, list[dict]] = {}
        for clip in workload.example_clips():
            clips.setdefault(clip["tag"], []).append(clip)
        code_tags = [tag for tag in adapters.get("code", ()) if tag in prompts][:ROWS_PER_KIND]
        speech_tags = [tag for tag in adapters.get("speech", ()) if tag in clips][:ROWS_PER_KIND]
        if len(code_tags) > 1:
            found["code only: a prompt for every adapter"] = [{"prompt": prompts[tag][0], "adapter": tag} for tag in code_tags]
            found["code only: all prompts with one adapter"] = [
                {"prompt": text, "adapter": code_tags[0]} for text in prompts[code_tags[0]][:ROWS_PER_KIND]
            ]
        if len(speech_tags) > 1:
            found["audio only: a clip for every adapter"] = [
                {"audio": _shipped(clips[tag][0]), "adapter": tag} for tag in speech_tags
            ]
        for tag in prompts if "code" in adapters else ():
            adapter = tag if tag in adapters["code"] else None
            for text in prompts[tag]:
                found[f"add prompt: {tag} · {text.strip().splitlines()[0]}"] = [{"prompt": text, "adapter": adapter}]
        for tag in clips if "speech" in adapters else ():
            adapter = tag if tag in adapters["speech"] else None
            for clip in clips[tag]:
                found[f"add clip: {tag} · {clip['text']}"] = [{"audio": _shipped(clip), "adapter": adapter}]
        return found

    # ------------------------------------------------------------------------------------------------ reading

    @property
    def inputs(self) -> list[gr.components.Component]:
        """What a handler has to take to know the batch."""
        return [self.shown] + [part for kind in self.slots for slot in self.slots[kind] for part in (slot.content, slot.adapter)]

    def rows(self, values: Sequence[Any]) -> list[dict]:
        """The visible rows, code first: {kind, "prompt" or "audio" (a path or None), adapter (a tag or None)}."""
        shown, parts = values[0], iter(values[1:])
        found = []
        for kind, slots in self.slots.items():
            for i in range(len(slots)):
                content, adapter = next(parts), next(parts)
                if shown[kind][i]:
                    found.append({"kind": kind, _FIELD[kind]: content, "adapter": adapter or None})
        return found

    # ------------------------------------------------------------------------------------------------ wiring

    def connect(self) -> None:
        """Add, remove and example buttons; none of them is an API endpoint, none waits for the device."""
        quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        for kind, slots in self.slots.items():
            outputs = [self.shown, *(part for slot in slots for part in (slot.row, slot.adapter))]
            self.add[kind].click(self._adder(kind), [self.shown, *(slot.adapter for slot in slots)], outputs, **quiet)
            for i, slot in enumerate(slots):
                slot.remove.click(self._remover(kind, i), self.shown, [self.shown, slot.row, slot.content], **quiet)
        # Not `input`, which tells a choice twice, so that "add" would add twice, nor `select`, which tells none made by keyboard.
        # "multiple": what is chosen while the last choice is being answered is not lost.
        self.menu.change(self._choose, [self.menu, self.shown], self._every, trigger_mode="multiple", **quiet)

    def _adder(self, kind: str):
        def add(shown: dict, *adapters: str):
            if all(shown[kind]):
                gr.Warning(f"The batch holds at most {ROWS_PER_KIND} rows of a kind: remove one first.")
                return [shown, *(gr.skip() for _ in range(2 * ROWS_PER_KIND))]
            place, tags = shown[kind].index(False), list(self.engines[kind].adapters)
            used = {adapter for adapter, visible in zip(adapters, shown[kind], strict=True) if visible}
            adapter = next((tag for tag in tags if tag not in used), tags[0] if tags else NO_ADAPTER)
            shown[kind][place] = True
            updates = []
            for i in range(ROWS_PER_KIND):
                updates += [gr.Row(visible=True), self._set(kind, adapter)] if i == place else [gr.skip(), gr.skip()]
            return [shown, *updates]

        return add

    def _remover(self, kind: str, i: int):
        def remove(shown: dict):
            shown[kind][i] = False
            return shown, gr.Row(visible=False), gr.Textbox(value="") if kind == "code" else gr.Audio(value=None)

        return remove

    def _choose(self, choice: str | None, shown: dict):
        if choice == _MENU:  # put back by the answer to a choice, or by a visitor
            return [gr.skip()] * len(self._every)
        rows = self._examples().get(choice or "", [])
        adds = (choice or "").startswith("add")
        wanted: dict[str, dict[int, dict]] = {kind: {} for kind in self.slots}
        for kind in self.slots:
            for row in (row for row in rows if _FIELD[kind] in row):
                free = [i for i in range(ROWS_PER_KIND) if i not in wanted[kind] and not (adds and shown[kind][i])]
                if not free:
                    gr.Warning(f"The batch holds at most {ROWS_PER_KIND} rows of a kind: remove one first.")
                    break
                wanted[kind][free[0]] = row
        updates = []
        for kind in self.slots:
            for i in range(ROWS_PER_KIND):
                row = wanted[kind].get(i)
                if row is not None:
                    shown[kind][i] = True
                    content = gr.Textbox(value=row["prompt"]) if kind == "code" else gr.Audio(value=_clip_path(row["audio"]))
                    updates += [gr.Row(visible=True), content, self._set(kind, row["adapter"] or NO_ADAPTER)]
                elif rows and not adds:
                    shown[kind][i] = False
                    updates += [gr.Row(visible=False), gr.Textbox(value="") if kind == "code" else gr.Audio(value=None), gr.skip()]
                else:
                    updates += [gr.skip()] * 3
        return [shown, gr.Dropdown(value=_MENU), *updates]

    def _set(self, kind: str, adapter: str) -> gr.Dropdown:
        """An adapter menu with this entry chosen, which a page that was opened earlier may not know."""
        return gr.Dropdown(choices=adapter_choices(kind, self.engines, adapter), value=adapter)

    def follower(self) -> Follower:
        """The menus, as adapters come and go; a page that has just been opened begins with the ready batch of what there is now."""
        slots = [(kind, slot) for kind, row in self.slots.items() for slot in row]
        adapters = [slot.adapter for _, slot in slots]

        def update(values: Sequence[Any], opened: bool) -> list[Any]:
            shown, *chosen = values
            examples = self._examples()
            # Where its entries are the same it is left alone: somebody may be choosing.
            menu = gr.skip() if list(examples) == self.offered else gr.Dropdown(choices=[_MENU, *examples], value=_MENU)
            if opened and examples[_READY] != self.ready:
                shown, _, *updates = self._choose(_READY, shown)
                return [shown, menu, *updates]
            updates = []
            for (kind, _), adapter in zip(slots, chosen, strict=True):
                updates += [gr.skip(), gr.skip(), gr.Dropdown(choices=adapter_choices(kind, self.engines, adapter))]
            return [gr.skip(), menu, *updates]

        return Follower(self._every, update, [self.shown, *adapters], adapters)

    @property
    def _every(self) -> list[Any]:
        """All that an example changes."""
        slots = [part for slots in self.slots.values() for slot in slots for part in (slot.row, slot.content, slot.adapter)]
        return [self.shown, self.menu, *slots]


def _shipped(clip: Mapping[str, str]) -> str:
    return f"assets/clips/{clip['file']}"


def _clip_path(name: str | None) -> str | None:
    """A shipped clip's file, wherever the app was started."""
    return None if name is None else str(Path(workload.ASSETS).parent / name)
