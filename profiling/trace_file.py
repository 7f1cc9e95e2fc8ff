"""Chrome traces as files: read with limits, since anybody may send one, and written without what names a machine."""

from __future__ import annotations

import gzip
import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 200 * 1000**2
"""Of a trace, unpacked: half a million events with their shapes. As Python's objects they take eight times as much."""

SUFFIXES = (".json", ".json.gz")
_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20
_PRIVATE = ("host_name", "traceName", "trace_id")


class TraceError(Exception):
    """What is wrong with a trace or its file, in one sentence. Not of `flora.errors`: whoever reads a trace needs no torch."""


def read_trace(path: str | os.PathLike, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The document of a Chrome trace, plain or gzipped, whatever its name: {"traceEvents": […], …}.

    Raises TraceError in one sentence for a file that cannot be read, is no trace, or is larger than max_bytes unpacked.
    """
    path = Path(path)
    name = path.name[-80:]
    try:
        with path.open("rb") as file:
            packed = file.read(2) == _MAGIC
        text = _unpacked(path, max_bytes) if packed else _plain(path, max_bytes)
    except OSError as error:
        raise TraceError(f"the trace {name!r} cannot be read: {error.strerror or 'its gzip is broken'}") from error
    except (EOFError, zlib.error) as error:
        raise TraceError(f"the trace {name!r} cannot be read: its gzip is broken, perhaps cut short") from error
    if text is None:
        raise TraceError(
            f"the trace {name!r} is larger than {max_bytes / 1e6:.0f} MB unpacked: record fewer steps, or without shapes and stacks"
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"the trace {name!r} is not JSON: give a Chrome trace as torch.profiler exports it") from error
    del text
    if isinstance(document, list):  # the format allows the events alone
        document = {"traceEvents": document}
    if not isinstance(document, dict) or not isinstance(document.get("traceEvents"), list):
        raise TraceError(f"the file {name!r} is no Chrome trace: it has no list of traceEvents")
    return document


def _plain(path: Path, max_bytes: int) -> bytes | None:
    return path.read_bytes() if path.stat().st_size <= max_bytes else None


def _unpacked(path: Path, max_bytes: int) -> bytes | None:
    """None where there is more than max_bytes: of a bomb no more is unpacked than that."""
    parts, size = [], 0
    with gzip.open(path, "rb") as file:
        while part := file.read(_CHUNK):
            parts.append(part)
            size += len(part)
            if size > max_bytes:
                return None
    return b"".join(parts)


def write_trace(path: str | os.PathLike, document: Mapping[str, Any]) -> None:
    """Write a trace, gzipped where the name ends in .gz, without the names of the machine and of its files. TraceError where it
    cannot be written."""
    path = Path(path)
    text = json.dumps({key: value for key, value in document.items() if key not in _PRIVATE}, separators=(",", ":")).encode()
    try:
        path.write_bytes(gzip.compress(text, compresslevel=5, mtime=0) if path.suffix == ".gz" else text)
    except OSError as error:
        raise TraceError(f"cannot write {path.name!r}: {error.strerror}") from error


def write_tensorboard_run(folder: str | os.PathLike, document: Mapping[str, Any], worker: str = "flora-live") -> Path:
    """Write a trace as a run that TensorBoard's profiler plugin finds in `folder`; the file's path.

    The plugin takes a folder below its log directory for a run, and <worker>.<milliseconds>.pt.trace.json.gz in it for a span.
    """
    moment = time.time_ns() // 1_000_000
    run = Path(folder) / time.strftime("kernels_%Y-%m-%d_%H-%M-%S", time.localtime(moment / 1000))
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(f"cannot write into the folder {Path(folder).name!r}: {error.strerror}") from error
    path = run / f"{worker}.{moment}.pt.trace.json.gz"
    write_trace(path, document)
    return path
