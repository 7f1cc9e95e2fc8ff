"""The *Models* tab: what serves, another model, the adapters there are, one more, one less."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from flora.errors import FloraError
from profiling.dashboard import models_views as views
from profiling.dashboard.adapters import MAX_AT_ONCE, STAY_S, AdapterDesk
from profiling.dashboard.device import MAX_IN_LINE
from profiling.dashboard.live_cells import LiveCells
from profiling.dashboard.menus import Follower, Menu
from profiling.dashboard.models import DTYPES, QUANTIZATIONS, WEIGHTS, ModelDesk
from profiling.dashboard.policy import Policy, Visitor
from profiling.dashboard.results import sentence
from profiling.dashboard.uploads import MAX_UPLOAD_BYTES

logger = logging.getLogger(__name__)

SERVER_ERROR = "Something went wrong on the server, and nothing was changed. Try again, or reload the page."
_WAYS = {"upload": "upload", "hub": "hub id", "folders": "folder of the server"}  # by the right that they need
_QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
_QUEUED = {"show_progress": "hidden", "api_visibility": "private"}


def build_models_tab(
    tab: gr.Tab, opened: Callable[..., Any], adapters: AdapterDesk, models: ModelDesk | None, policy: Policy
) -> tuple[Follower, list[Callable[..., Any]]]:
    """Lay out the tab and wire it; call it inside `tab`'s context. opened: the page's event. models: None where no other can be
    loaded.

    Returns what follows the engines, and the events that change them.
    """
    engines = adapters.engines
    anybody = Visitor(None, policy.widest)

    with gr.Row(equal_height=True, elem_classes="models-row"):
        cards = {}
        for kind, engine in engines.items():
            with gr.Column(min_width=280, elem_classes="instrument"):
                cards[kind] = LiveCells(views.model_template(kind), views.model(engine), elem_id=f"model-{kind}")
    with gr.Row(equal_height=False, elem_classes="bench models"):
        with gr.Column(scale=4, min_width=300, elem_classes="models-side"):
            with gr.Column(min_width=280, elem_classes="instrument", visible=_can_add(anybody)) as add_panel:
                gr.HTML('<h2 class="panel-title">add an adapter</h2>', apply_default_css=False)
                way = gr.Radio(
                    _ways(anybody),
                    value=next((value for _, value in _ways(anybody)), None),
                    label="from where",
                    show_label=False,
                    container=False,
                    visible=len(_ways(anybody)) > 1,
                    elem_id="adapter-way",
                    elem_classes="switch",
                    interactive=True,
                )
                files = gr.File(
                    file_count="multiple",
                    file_types=[".zip", ".json", ".safetensors"],
                    label=f".zip, or its two files; {MAX_UPLOAD_BYTES // 1000**2} MB at most",
                    height=104,
                    elem_id="adapter-files",
                    elem_classes="adapter-files",
                    interactive=True,
                )
                with gr.Row(elem_classes="controls one-control"):
                    place = gr.Textbox(
                        label="hub id",
                        placeholder="owner/name",
                        max_lines=1,
                        visible=False,
                        elem_id="adapter-place",
                        interactive=True,
                    )
                with gr.Row(elem_classes="controls tag-row"):
                    tag = gr.Textbox(
                        label="tag, what requests call it", placeholder="mine", max_lines=1, elem_id="adapter-tag", interactive=True
                    )
                    add = gr.Button("Add", variant="primary", min_width=70, elem_id="adapter-add")
                any_base = gr.Checkbox(
                    label="made for another base model: add it anyway",
                    value=False,
                    container=False,
                    elem_id="adapter-any-base",
                    interactive=True,
                )
                add_status = LiveCells(
                    views.STATUS_TEMPLATE,
                    views.status("idle", "It goes to the model it fits. A tag may hold one that multiplies and one that adds."),
                    elem_id="adapter-status",
                )
            with gr.Column(
                min_width=280, elem_classes="instrument", visible=models is not None and "models" in anybody.rights
            ) as load_panel:
                gr.HTML('<h2 class="panel-title">load another model</h2>', apply_default_css=False)
                with gr.Row(elem_classes="controls one-control"):
                    name = Menu(
                        [] if models is None else models.choices(),
                        value=None,
                        label="short name, hub id or folder",
                        allow_custom_value=True,
                        filterable=True,
                        elem_id="model-name",
                        interactive=True,
                    )
                with gr.Row(elem_classes="controls model-options"):
                    quantize = _option(QUANTIZATIONS, "quantised", "model-quantize")
                    dtype = _option(DTYPES, "dtype", "model-dtype")
                    weights = _option(WEIGHTS, "weights", "model-weights")
                with gr.Row(elem_classes="run-buttons"):
                    load = gr.Button("Load for everybody", variant="secondary", elem_id="model-load", min_width=90)
                load_status = LiveCells(
                    views.STATUS_TEMPLATE,
                    views.status("idle", "It replaces the model of its kind once it is loaded; until then the old one serves."),
                    elem_id="model-status",
                )
            rights = LiveCells(views.RIGHTS_TEMPLATE, views.rights(anybody, STAY_S), elem_id="rights")
        with gr.Column(scale=8, min_width=300, elem_classes="instrument"):
            with gr.Row(elem_classes="table-head"):
                gr.HTML('<h2 class="panel-title">adapters</h2>', apply_default_css=False)
                wanted = gr.Textbox(
                    label="filter by tag",
                    show_label=False,
                    container=False,
                    placeholder="filter by tag",
                    max_lines=1,
                    min_width=120,
                    elem_id="adapter-filter",
                    interactive=True,
                )
            table_status = LiveCells(views.TABLE_STATUS_TEMPLATE, elem_id="table-status")
            table = LiveCells(views.TABLE_TEMPLATE, views.table(engines), elem_id="adapters")

    def shown(visitor: Visitor, words: str | None) -> dict[str, Any]:
        return views.table(
            engines, words or "", adapters.added_by_visitors, lambda kind, its_tag: adapters.may_remove(visitor, kind, its_tag)
        )

    def look(request: gr.Request, words: str | None) -> list[Any]:
        """What there is now, as far as this visitor is concerned."""
        adapters.sweep()
        return [*(views.model(engine) for engine in engines.values()), shown(policy.visitor(request), words)]

    def admit(request: gr.Request, words: str | None) -> list[Any]:
        """The page as its visitor may use it: others may be allowed less than whoever sits at this machine."""
        visitor = policy.visitor(request)
        ways = _ways(visitor)
        first = next((value for _, value in ways), None)
        return [
            gr.Column(visible=_can_add(visitor)),
            gr.Column(visible=models is not None and "models" in visitor.rights),
            gr.Radio(choices=ways, value=first, visible=len(ways) > 1),
            *_fields(first),
            views.rights(visitor, STAY_S),
            *look(request, words),
        ]

    def begin(chosen: str | None):
        words = {"hub": "fetching and checking", "upload": "unpacking and checking"}.get(chosen or "", "reading and checking")
        return views.status("running", words), gr.Button(interactive=False)

    def add_it(
        request: gr.Request,
        chosen: str | None,
        its_tag: str,
        uploaded: list[str] | None,
        where: str,
        anyway: bool | None,
        words: str | None,
    ):
        visitor = policy.visitor(request)
        its_tag = (its_tag or "").strip()
        kept = [gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        try:
            if chosen == "upload":
                kind, info = adapters.upload(visitor, its_tag, [Path(file) for file in uploaded or ()], bool(anyway))
            elif chosen == "hub":
                kind, info = adapters.from_hub(visitor, its_tag, where, bool(anyway))
            else:
                kind, info = adapters.from_folder(visitor, its_tag, where, bool(anyway))
        except FloraError as error:
            status = views.status("failed", sentence(error))
        except Exception:  # a fault of ours: in the server's log in full, on the page one sentence without the server's insides
            logger.exception("an adapter could not be added")
            status = views.status("failed", SERVER_ERROR)
        else:
            status = views.status("done", sentence(views.added(kind, its_tag, info)))
            kept = [None, "", "", False]
            _forget_uploads(uploaded)
        return [status, gr.Button(interactive=True), *kept, *look(request, words)]

    def could_not_begin():
        """Gradio itself refused: too many wait, or what the browser sent makes no sense; a notice says which."""
        return views.status("failed", "It could not begin: try again in a minute, or reload the page."), gr.Button(interactive=True)

    def remove(request: gr.Request, event: gr.EventData, words: str | None) -> list[Any]:
        asked = event._data if isinstance(event._data, dict) else {}
        kind, its_tag = asked.get("kind"), asked.get("tag")
        try:
            adapters.remove(policy.visitor(request), kind, its_tag)
        except FloraError as error:
            status = views.status("failed", sentence(error))
        except Exception:  # as above
            logger.exception("an adapter could not be removed")
            status = views.status("failed", SERVER_ERROR)
        else:
            status = views.status("done", f"Removed {its_tag}; requests that run with it finish with it.")
        return [status, *look(request, words)]

    def load_it(request: gr.Request, *values: Any):
        state, words = "running", "beginning"
        try:
            with closing(models.load(policy.visitor(request), *values)) as steps:
                for words in steps:
                    yield views.status("running", sentence(words)), gr.skip()
            state = "done"
        except FloraError as error:
            state, words = "failed", f"{sentence(error)} The model that served goes on."
        except Exception:  # as above
            logger.exception("a model could not be loaded")
            state, words = "failed", SERVER_ERROR
        yield views.status(state, sentence(words)), gr.Button(interactive=True)

    parts = [*cards.values(), table]
    admitted = [add_panel, load_panel, way, files, place, rights, *parts]
    way.input(_fields, way, [files, place], **_QUIET)
    tab.select(look, wanted, parts, **_QUIET)
    wanted.change(look, wanted, parts, trigger_mode="always_last", **_QUIET)
    adding = add.click(begin, way, [add_status, add], **_QUIET).then(
        add_it,
        [way, tag, files, place, any_base, wanted],
        [add_status, add, files, tag, place, any_base, *parts],
        concurrency_id="add-adapter",
        concurrency_limit=MAX_AT_ONCE,
        **_QUEUED,
    )
    adding.failure(could_not_begin, None, [add_status, add], **_QUIET)
    removing = table.select(remove, wanted, [table_status, *parts], **_QUIET)
    changes = [adding.then, removing.then]
    if models is not None:
        loading = load.click(
            lambda: (views.status("running", "beginning"), gr.Button(interactive=False)), None, [load_status, load], **_QUIET
        ).then(
            load_it,
            [name, quantize, dtype, weights],
            [load_status, load],
            concurrency_id="device",
            concurrency_limit=MAX_IN_LINE,
            **_QUEUED,
        )
        loading.failure(could_not_begin, None, [load_status, load], **_QUIET)
        changes.append(loading.then(look, wanted, parts, **_QUIET).then)
    follower = Follower([*cards.values()], lambda values, opened: [views.model(engine) for engine in engines.values()])
    opened(admit, wanted, admitted, **_QUIET)
    return follower, changes


def _ways(visitor: Visitor) -> list[tuple[str, str]]:
    return [(words, right) for right, words in _WAYS.items() if right in visitor.rights]


def _can_add(visitor: Visitor) -> bool:
    return bool(_ways(visitor))


def _fields(way: str | None) -> list[Any]:
    """The fields of a way to add an adapter."""
    label, example = ("hub id", "owner/name") if way == "hub" else ("folder of the server", "adapters/mine")
    return [gr.File(visible=way == "upload"), gr.Textbox(visible=way != "upload", label=label, placeholder=example)]


def _option(choices: Sequence[str], label: str, elem_id: str) -> gr.Dropdown:
    return gr.Dropdown(list(choices), value=choices[0], label=label, min_width=80, elem_id=elem_id, interactive=True)


def _forget_uploads(files: Sequence[str] | None) -> None:
    """They are unpacked: nobody needs them any more."""
    for file in files or ():
        Path(file).unlink(missing_ok=True)
