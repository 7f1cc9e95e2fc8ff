"""The endpoints for programs, for `gradio_client` or any HTTP client: `/compare`, `/generate`, `/adapters`, `/add_adapter` and
`/remove_adapter`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from flora.bank import AdapterInfo
from flora.engine import Engine, Request
from flora.errors import AudioError, CheckpointError, FloraError, RequestError
from profiling import workload
from profiling.compare import compare
from profiling.dashboard.adapters import MAX_AT_ONCE as MAX_AT_ONCE_ADDED
from profiling.dashboard.adapters import AdapterDesk
from profiling.dashboard.compare import MAX_NEW_TOKENS, WARMUP_STEPS, check_prompt_length
from profiling.dashboard.device import MAX_IN_LINE, SERVER_ERROR, Device
from profiling.dashboard.models_views import bases
from profiling.dashboard.own_request import MAX_AT_ONCE, OwnRequest
from profiling.dashboard.policy import Policy, Visitor
from profiling.dashboard.results import sentence
from profiling.events import Finished

logger = logging.getLogger(__name__)

MAX_REQUESTS = 32
_UPLOAD_CLIP = '"audio" must be an uploaded file: with gradio_client, handle_file("clip.wav").'
_UPLOAD_FILES = '"files" must be uploaded files: with gradio_client, [handle_file("mine.zip")].'
_FIELDS = ("prompt", "audio", "adapter")


def add_endpoints(engines: Mapping[str, Engine], device: Device, desk: AdapterDesk, policy: Policy) -> None:
    """Register the endpoints; call it inside a `gr.Blocks` context. desk, policy: for adapters that are added and removed."""

    def compare_endpoint(
        requests: list[dict], methods: list[str] | None = None, max_new_tokens: int = workload.MAX_NEW_TOKENS
    ) -> dict:
        """Run a batch under two or more methods, paired and interleaved, and return what the comparison measured.

        requests: a list of {"prompt": "...", "adapter": "lua"} or {"audio": handle_file("clip.wav"), "adapter": "cs"}.
        The adapter may be null. methods: default ["flora", "bmm-lora"].
        The first two methods give the ratio. A request that cannot run is named under "failures"; the rest runs.
        """
        return _compare(engines, device, requests, methods or ["flora", "bmm-lora"], max_new_tokens)

    def generate_endpoint(
        request: gr.Request,
        prompt: str | None = None,
        adapter: str | None = None,
        method: str = "flora",
        max_new_tokens: int = workload.MAX_NEW_TOKENS,
        audio: dict | None = None,
    ) -> Iterator[dict]:
        """Answer one request in the batch that everybody shares: send as many at once as you like, and they run together.

        prompt: the beginning of a function; or, instead, audio: handle_file("clip.wav"). adapter: a tag of `/adapters`, null for
        the base model. It streams: a few times a second {"text": so far, "num_new_tokens": 12, "finish_reason": null}. The last
        value, which `predict` returns, has the finish_reason ("stop", "length" or "cancelled") and besides "ttft_s" and "tpot_s",
        seconds to the first token and per further one, and "others_mean" and "others_max", the requests that ran beside it.
        """
        yield from _generate(engines, request.session_hash, prompt, adapter, method, max_new_tokens, audio)

    def adapters_endpoint() -> dict:
        """Every adapter tag, per kind of model: its families, ranks, size in bytes and number of adapted layers."""
        return {kind: {tag: _facts(info) for tag, info in engine.adapters.items()} for kind, engine in engines.items()}

    def add_adapter_endpoint(
        request: gr.Request,
        tag: str,
        files: list[dict] | None = None,
        hub: str | None = None,
        folder: str | None = None,
        any_base_model: bool = False,
    ) -> dict:
        """Add an adapter under a tag: it is checked, goes to the model that it fits, and is in every menu from then on.

        files: [handle_file("mine.zip")], or the two files adapter_config.json and adapter_model.safetensors; or, instead, hub:
        "owner/name"; or folder: one of the server's. Which of these are allowed, and for how long an adapter stays, is the
        server's to say. any_base_model: take it, if it fits, also where it says that it was made for another model. Returns the
        model's kind ("model") and what `/adapters` says of the tag.
        """
        return _add_adapter(desk, policy.visitor(request), tag, files, hub, folder, any_base_model)

    def remove_adapter_endpoint(request: gr.Request, tag: str, model: str) -> None:
        """Remove an adapter of a model ("code" or "speech") that this client has added, or any other where that is allowed."""
        with _told("/remove_adapter"):
            desk.remove(policy.visitor(request), model, tag)

    gr.api(compare_endpoint, api_name="compare", concurrency_id="device", concurrency_limit=MAX_IN_LINE)
    gr.api(generate_endpoint, api_name="generate", concurrency_id="generate", concurrency_limit=MAX_AT_ONCE)
    gr.api(adapters_endpoint, api_name="adapters", queue=False)
    gr.api(add_adapter_endpoint, api_name="add_adapter", concurrency_id="add-adapter", concurrency_limit=MAX_AT_ONCE_ADDED)
    gr.api(remove_adapter_endpoint, api_name="remove_adapter", queue=False)


def _facts(info: AdapterInfo) -> dict:
    return {
        "families": list(info.families),
        "types": list(info.peft_types),
        "ranks": dict(info.ranks),
        "size_bytes": info.size_bytes,
        "layers": info.layers,
        "base_models": bases(info),
    }


@contextmanager
def _told(endpoint: str) -> Iterator[None]:
    """What goes wrong in this context, as a sentence for the caller."""
    try:
        yield
    except FloraError as error:
        raise gr.Error(sentence(error), print_exception=False) from error
    except Exception as error:  # logged here in full; the visitor gets a sentence without the server's insides
        logger.exception("the %s endpoint broke off", endpoint)
        raise gr.Error(SERVER_ERROR, print_exception=False) from error


def _add_adapter(desk: AdapterDesk, visitor: Visitor, tag: Any, files: Any, hub: Any, folder: Any, any_base_model: Any) -> dict:
    with _told("/add_adapter"):
        if not isinstance(any_base_model, bool):
            raise RequestError('"any_base_model" must be true or false.')
        ways = [way for way in (files, hub, folder) if way is not None]
        if len(ways) != 1:
            raise RequestError('Give one of "files", "hub" and "folder".')
        if files is not None:
            if not isinstance(files, list) or len(files) > 10:
                raise RequestError('"files" must be a list: [handle_file("mine.zip")], or the two files of a PEFT folder.')
            uploaded = [_uploaded(file, CheckpointError, _UPLOAD_FILES) for file in files]
            kind, info = desk.upload(visitor, tag, uploaded, any_base_model)
        elif not isinstance(ways[0], str):
            raise RequestError('"hub" and "folder" must be text.')
        else:
            add = desk.from_hub if hub is not None else desk.from_folder
            kind, info = add(visitor, tag, ways[0], any_base_model)
        return {"model": kind, **_facts(info)}


def _generate(
    engines: Mapping[str, Engine],
    session: str | None,
    prompt: Any,
    adapter: Any,
    method: Any,
    max_new_tokens: Any,
    audio: Any,
) -> Iterator[dict]:
    with _told("/generate"):
        _check_new_tokens(max_new_tokens)
        if not isinstance(method, str):
            raise RequestError('"method" must be the name of a method, such as "flora".')
        if isinstance(prompt, str) and audio is None and not prompt.strip():
            raise RequestError("The prompt is empty: give the beginning of a function.")
        request = _request(engines, {"prompt": prompt, "audio": audio, "adapter": adapter}, max_new_tokens)
        kind = "code" if request.audio is None else "speech"
        if kind not in engines:
            raise RequestError("No code model is loaded here: send clips only.")
        with closing(OwnRequest(engines[kind], request, method, session).updates()) as updates:
            for own in updates:
                yield _so_far(own)


def _so_far(own: OwnRequest) -> dict:
    value = {"text": own.text, "num_new_tokens": own.num_new_tokens, "finish_reason": None}
    if own.completion is None:
        return value
    mean, most = own.others or (None, None)
    times = {"ttft_s": own.completion.ttft_s, "tpot_s": own.completion.tpot_s}
    return value | {"finish_reason": own.completion.finish_reason} | times | {"others_mean": mean, "others_max": most}


def _compare(engines: Mapping[str, Engine], device: Device, rows: Any, methods: Any, max_new_tokens: Any) -> dict:
    with _told("/compare"):
        requests, failures, names, positions = _requests(engines, rows, max_new_tokens)
        if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
            raise RequestError('"methods" must be a list of method names, such as ["flora", "bmm-lora"].')
        if not requests:
            return {"failures": failures}
        run = device.start(
            partial(
                compare, engines, requests, methods, warmup_steps=WARMUP_STEPS, should_stop=device.closing.is_set, audio_names=names
            )
        )
        result = None
        while not run.done:
            for event in run.fetch(1.0):
                if isinstance(event, Finished):
                    result = event.result.as_dict()
        if run.error is not None:
            raise run.error
    # `compare` counted the requests it was given; the caller counts those that were sent.
    result["rows"] = [row | {"index": positions[row["index"]]} for row in result["rows"]]
    result["failures"] = failures | {str(positions[int(index)]): sentence(message) for index, message in result["failures"].items()}
    return result


def _requests(
    engines: Mapping[str, Engine], rows: Any, max_new_tokens: Any
) -> tuple[list[Request], dict[str, str], dict[int, str], list[int]]:
    """The requests that can be made of `rows`, the failures of the others, clip names, and where each request stood in `rows`."""
    if not isinstance(rows, list) or not rows:
        raise RequestError('"requests" must be a list with at least one {"prompt": …} or {"audio": …}.')
    if len(rows) > MAX_REQUESTS:
        raise RequestError(f"A batch may hold at most {MAX_REQUESTS} requests, not {len(rows)}.")
    _check_new_tokens(max_new_tokens)
    requests: list[Request] = []
    failures: dict[str, str] = {}
    names: dict[int, str] = {}
    positions: list[int] = []
    for position, row in enumerate(rows):
        try:
            request = _request(engines, row, max_new_tokens)
        except FloraError as error:
            failures[str(position)] = sentence(error)
            continue
        if request.audio is not None:
            names[len(requests)] = _uploaded(row["audio"]).name
        requests.append(request)
        positions.append(position)
    return requests, failures, names, positions


def _check_new_tokens(max_new_tokens: Any) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise RequestError(f'"max_new_tokens" must be a whole number from 1 to {MAX_NEW_TOKENS}.')


def _request(engines: Mapping[str, Engine], row: Any, max_new_tokens: int) -> Request:
    if not isinstance(row, dict):
        raise RequestError('A request is an object such as {"prompt": "…", "adapter": "lua"}.')
    unknown = [str(field) for field in row if field not in _FIELDS]
    if unknown:
        raise RequestError(f'A request has no field "{unknown[0][:40]}": it may have {", ".join(_FIELDS)}.')
    options = {"adapter": row.get("adapter"), "max_new_tokens": max_new_tokens}
    if row.get("audio") is None:
        if isinstance(row.get("prompt"), str):
            check_prompt_length(row["prompt"])
        return Request(prompt=row.get("prompt"), **options)
    if row.get("prompt") is not None:
        raise RequestError("A request holds a prompt and a clip: give it one of the two.")
    if "speech" not in engines:
        raise RequestError("No speech model is loaded here: send prompts only.")
    samples, sampling_rate = workload.load_audio(_uploaded(row["audio"]), engines["speech"].window_s)
    return Request(audio=samples, sampling_rate=sampling_rate, **options)


def _uploaded(given: Any, error: type[FloraError] = AudioError, words: str = _UPLOAD_CLIP) -> Path:
    """The file that a client uploaded with `handle_file`; never another path of this machine."""
    path = given.get("path") if isinstance(given, dict) and isinstance(given.get("meta"), dict) else None
    if not isinstance(path, str) or "\0" in path:
        raise error(words)
    folder, file = Path(get_upload_folder()).resolve(), Path(path).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        raise error(words)
    return file
