"""What is measured: the ready batch, batches from a file, and the adapters on disk."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from flora.audio import load_audio
from flora.corpus.code import example_prompts
from flora.engine import Engine, Request
from flora.errors import RequestError
from flora.names import public_name
from profiling.options import weight_words

ASSETS = Path(__file__).resolve().parents[1] / "assets"
MAX_NEW_TOKENS = 48

SOURCES = {"code": "prompt", "speech": "audio"}  # kind → the field of a row that makes a request of that kind
_ROW_FIELDS = {"prompt": str, "audio": str, "adapter": str, "max_new_tokens": int, "temperature": (int, float)}


# ------------------------------------------------------------------------------------------------------------ adapters


def discover_adapters(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """The adapters on disk, tag → checkpoint folders: `folder`/<tag>/<method>/, or `folder`/<tag>/ where that is a
    checkpoint itself.

    A checkpoint folder is one that holds an adapter_config.json. A tag has one adapter of each family, and IA3 is of
    fLoRA's: beside a fLoRA adapter it is left out. Empty where `folder` does not exist.
    """
    folder = Path(folder)
    found: dict[str, list[Path]] = {}
    for tag in sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ():
        candidates = [tag, *sorted(path for path in tag.iterdir() if path.is_dir())]
        checkpoints = [path for path in candidates if (path / "adapter_config.json").is_file()]
        if tag / "flora" in checkpoints and tag / "ia3" in checkpoints:
            checkpoints.remove(tag / "ia3")
        if checkpoints:
            found[tag.name] = checkpoints
    return found


def given_adapters(entries: Sequence[str]) -> dict[str, list[str]]:
    """The adapters that a command line names as TAG=FOLDER, tag → folders; a tag may come twice, once per family."""
    adapters: dict[str, list[str]] = {}
    for entry in entries:
        tag, equals, folder = entry.partition("=")
        if not (tag and equals and folder):
            raise RequestError(f"an adapter is given as TAG=FOLDER, not {entry!r}")
        adapters.setdefault(tag, []).append(folder)
    return adapters


# ------------------------------------------------------------------------------------------------------------- batches


def kind_of(request: Request) -> str:
    """ "code" for a prompt, "speech" for a clip: the kind of model that serves the request."""
    return "code" if request.prompt is not None else "speech"


def popularity(adapters: Sequence[str | None]) -> str:
    """The batch's adapters in Punica's words: all one ("identical"), no two alike ("distinct"), else "as given"; or "no"."""
    if not any(adapters):
        return "no"
    if len(set(adapters)) == len(adapters):
        return "distinct"
    return "identical" if len(set(adapters)) == 1 else "as given"


def example_clips() -> list[dict[str, str]]:
    """The clips that ship, as assets/clips/clips.json lists them: {file, tag, text, …}."""
    return json.loads((ASSETS / "clips" / "clips.json").read_text(encoding="utf-8"))


@cache
def _first_prompts() -> dict[str, str]:
    return {tag: prompts[0] for tag, prompts in example_prompts().items()}


def languages(kind: str) -> list[str]:
    """The tags of a kind that there are examples for, in the order in which the ready batch asks for them."""
    return list(_first_prompts()) if kind == "code" else list(dict.fromkeys(clip["tag"] for clip in example_clips()))


def ready_rows(adapters: Mapping[str, Collection[str]], rows_per_kind: int = 4, max_new_tokens: int = MAX_NEW_TOKENS) -> list[dict]:
    """The batch the demo opens with: a code prompt and a clip for each of the first four languages that have an
    adapter.

    adapters: kind → the tags that an adapter exists for (an engine's `adapters` will do). A kind with fewer than four
    is filled up with requests to the base model in the remaining languages, and a kind that is missing gets no rows.
    """
    prompts = _first_prompts()
    clips: dict[str, str] = {}
    for clip in example_clips():
        clips.setdefault(clip["tag"], f"assets/clips/{clip['file']}")
    rows = []
    for kind, field, examples in (("code", "prompt", prompts), ("speech", "audio", clips)):
        tags = sorted(examples, key=lambda tag, kind=kind: tag not in adapters.get(kind, ()))  # stable: the languages' own order
        for tag in tags[:rows_per_kind] if kind in adapters else ():
            adapter = tag if tag in adapters[kind] else None
            rows.append({field: examples[tag], "adapter": adapter, "max_new_tokens": max_new_tokens})
    return rows


def request_from_row(row: Mapping[str, Any], folder: str | os.PathLike = ".", max_new_tokens: int = MAX_NEW_TOKENS) -> Request:
    """Make a request of a row {"prompt" or "audio", "adapter", "max_new_tokens", "temperature"}.

    "audio" is a file that `find_clip` finds; how long it may be is the engine's to say. max_new_tokens: for a row that does
    not say.
    Raises RequestError for a row that makes no sense, AudioError for a clip that cannot be read.
    """
    if not isinstance(row, Mapping):
        raise RequestError(f'a row of a batch is an object such as {{"prompt": "…", "adapter": "lua"}}, not {json.dumps(row)[:40]}')
    for field, value in row.items():
        if field not in _ROW_FIELDS:
            raise RequestError(f"a row of a batch has no field {field!r}: it may have {', '.join(_ROW_FIELDS)}")
        if value is not None and (not isinstance(value, _ROW_FIELDS[field]) or isinstance(value, bool)):
            raise RequestError(f"the field {field!r} of a row cannot be {json.dumps(value)[:40]}")
    if (row.get("prompt") is None) == (row.get("audio") is None):
        raise RequestError("a row of a batch needs either a prompt or an audio file")
    given = {field: row[field] for field in ("prompt", "adapter", "temperature") if row.get(field) is not None}
    if row.get("audio") is not None:
        given["audio"], given["sampling_rate"] = load_audio(find_clip(row["audio"], folder))
    wanted = row.get("max_new_tokens")
    return Request(**given, max_new_tokens=max_new_tokens if wanted is None else wanted)


def find_clip(name: str, folder: str | os.PathLike) -> Path:
    """The file a row means: seen from `folder`, from the current folder, or from the project's; the first where none exists."""
    candidates = [Path(folder) / name, Path(name), ASSETS.parent / name]
    return next((path for path in candidates if path.is_file()), candidates[0])


def read_rows(path: str | os.PathLike) -> list[dict]:
    """The rows of a batch file: a JSON array of objects, or one object a line (JSONL). Raises RequestError that names
    the file and the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"the batch file {path.name!r} cannot be read: give a JSON or JSONL text file") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(f"the batch file {path.name!r} is not JSON: {error.msg} in line {error.lineno}") from error
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise RequestError(f"the batch file {path.name!r} is not JSON in line {number}: {error.msg}") from error
    if not rows:
        raise RequestError(f"the batch file {path.name!r} holds no rows: add a prompt or an audio file")
    return rows


def rows_of(requests: Sequence[Request], audio_names: Mapping[int, str]) -> list[dict]:
    """The rows that `request_from_row` would make `requests` of; audio_names: index → the clip's file."""
    rows = []
    for index, request in enumerate(requests):
        row = {"prompt": request.prompt} if request.audio is None else {"audio": audio_names.get(index, "clip.wav")}
        row |= {"adapter": request.adapter, "max_new_tokens": request.max_new_tokens}
        rows.append(row | ({"temperature": request.temperature} if request.temperature else {}))
    return rows


# ------------------------------------------------------------------------------------------------------------- command


def _asks_any_base_model(engine: Engine, kind: str, rows: Iterable[Mapping]) -> bool:
    """Whether one of the rows' adapters names another base model and was taken anyway."""
    tags = {row["adapter"] for row in rows if SOURCES[kind] in row}
    return any(engine.adapters[tag].any_base_model for tag in tags & engine.adapters.keys())


def command_line(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    methods: Sequence[str],
    warmup_steps: int,
    repeats: int,
    seed: int,
    audio_names: Mapping[int, str],
    model_names: Mapping[str, str],
) -> str:
    """The `python -m profiling compare …` that makes the same comparison again, quoted for a shell; what the command
    assumes anyway is left out.

    Clips, adapters and models of the visitor's own appear by name only, so those have to lie in the folder where the
    command is run.
    """
    rows = rows_of(requests, audio_names)
    kinds = [kind for kind, source in SOURCES.items() if kind in engines and any(source in row for row in rows)]
    words = ["python", "-m", "profiling", "compare", "--methods", *methods]
    for kind in kinds:
        engine = engines[kind]
        name = model_names.get(kind, engine.name)
        if name != kind:  # the embedded models' folders are named after their kind
            words += [f"--{kind}-model", public_name(name)]
        given = adapters_given(engine, kind, {row["adapter"] for row in rows if SOURCES[kind] in row})
        words += [f"--{kind}-adapters", *given] if given else []
    for option, values in (
        ("--device", {engines[kind].device.type for kind in kinds}),
        ("--dtype", {str(engines[kind].dtype).removeprefix("torch.") for kind in kinds}),
        ("--max-new-tokens", {row["max_new_tokens"] for row in rows}),
    ):
        words += [option, str(values.pop())] if len(values) == 1 else []
    if kinds:
        words += weight_words(engines[kinds[0]], any(_asks_any_base_model(engines[kind], kind, rows) for kind in kinds))
    words += [
        "--warmup",
        str(warmup_steps),
        "--repeats",
        str(repeats),
        "--seed",
        str(seed),
        "--threads",
        str(torch.get_num_threads()),
    ]
    if "--max-new-tokens" in words:
        rows = [{key: value for key, value in row.items() if key != "max_new_tokens"} for row in rows]
    ready = ready_rows({kind: engine.adapters for kind, engine in engines.items()})
    if rows != [{key: value for key, value in row.items() if key != "max_new_tokens"} for row in ready]:
        for row in rows:
            row = {key: value for key, value in row.items() if value is not None}
            words += ["--row", json.dumps(row, ensure_ascii=False)]
    return shlex.join(words)


def adapters_given(engine: Engine, kind: str, tags: Collection[str | None]) -> list[str]:
    """tag=folder for the checkpoints of `tags` that `discover_adapters` does not find in assets/."""
    shipped = discover_adapters(ASSETS / "adapters" / kind)
    given = []
    for tag in sorted(tag for tag in tags if tag in engine.adapters):
        sources = engine.adapters[tag].sources
        if {Path(source).resolve() for source in sources} != set(shipped.get(tag, ())):
            given += [f"{tag}={public_name(source)}" for source in sources]
    return given
