"""A checkpoint that a visitor uploads, unpacked with suspicion: a zip, or the two files of a PEFT folder.

Nothing of an archive is used as a path. Two entries are read, those called adapter_config.json and adapter_model.safetensors, into
a folder of ours under these very names; everything else in it stays packed. Sizes are limited as declared and as they come.
"""

from __future__ import annotations

import json
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flora.errors import CheckpointError
from flora.formats import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE

MAX_UPLOAD_BYTES = 100 * 1000**2
MAX_ENTRIES = 200
MAX_DIRECTORY_BYTES = 64 << 10  # of the zip's table of contents
MAX_CONFIG_BYTES = 256 << 10
MAX_HEADER_BYTES = 4 << 20  # of the safetensors file: names, shapes
MAX_TENSORS = 5_000
MAX_NAME_CHARACTERS = 150
MAX_PATTERNS = 200  # names of layers among them
MAX_SEARCHES = 4  # patterns that repeat something

_FILES = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: MAX_UPLOAD_BYTES}
_GIVE = f"give a .zip of a PEFT folder, or its two files, {CONFIG_FILE} and {WEIGHTS_FILE}"
_REPEATS = "*+{?"  # of regular expressions
_CHUNK = 1 << 20
_ZIP_END, _ZIP64_END = b"PK\x05\x06", b"PK\x06\x07"


def unpack(files: Sequence[Path], folder: Path) -> None:
    """Put an upload's two files into `folder`, which is empty, and look at them as far as is needed before they are read.

    files: one zip, or the two files, by their visitors' names. Raises CheckpointError with what is wrong; the folder may then hold
    a part.
    """
    if not all(file.is_file() for file in files):
        raise CheckpointError("the upload is here no longer: choose the files again")
    if len(files) == 1 and files[0].suffix.lower() == ".zip":
        _unpack_zip(files[0], folder)
    else:
        _copy(files, folder)
    check_config(folder / CONFIG_FILE)
    check_header(folder / WEIGHTS_FILE)


def _copy(files: Sequence[Path], folder: Path) -> None:
    names = [file.name for file in files]
    if not names:
        raise CheckpointError(f"nothing was uploaded: {_GIVE}")
    if WEIGHTS_FILE not in names:
        _no_pickle(names)
    if sorted(name for name in names if name in _FILES) != sorted(_FILES):
        raise CheckpointError(f"the upload is {_listed(names)}: {_GIVE}")
    for file in files:
        if file.name in _FILES:  # the folder's README stays where it is
            with file.open("rb") as source:
                _write(source, folder / file.name, _FILES[file.name])


def _unpack_zip(file: Path, folder: Path) -> None:
    if file.stat().st_size > MAX_UPLOAD_BYTES:
        raise CheckpointError(f"the zip is larger than the {_size(MAX_UPLOAD_BYTES)} allowed")
    _check_table_of_contents(file)
    with _broken_zip_is_an_error(), zipfile.ZipFile(file) as archive:
        for name, entry in _wanted(archive.infolist()).items():
            with archive.open(entry) as source:
                _write(source, folder / name, _FILES[name])


def _check_table_of_contents(file: Path) -> None:
    """Its length and number of entries, before zipfile reads it whole: a hundred megabytes of entries would fill the memory."""
    with file.open("rb") as archive:
        length = archive.seek(0, 2)
        archive.seek(max(0, length - (22 + 20 + (1 << 16))))
        tail = archive.read()
    # As zipfile looks for it: the very end where that has no comment, else the last place that looks like it.
    place = len(tail) - 22 if tail[-22:-18] == _ZIP_END and tail[-2:] == b"\0\0" else tail.rfind(_ZIP_END)
    if place < 0 or len(tail) < place + 22:
        raise CheckpointError("the upload is no zip, or a truncated one: pack it again")
    entries, size = int.from_bytes(tail[place + 10 : place + 12], "little"), int.from_bytes(tail[place + 12 : place + 16], "little")
    if tail[max(0, place - 20) : place][:4] == _ZIP64_END or entries > MAX_ENTRIES or size > MAX_DIRECTORY_BYTES:
        raise CheckpointError(f"the zip has more than the {MAX_ENTRIES} entries allowed: pack the adapter's folder alone")


def _wanted(entries: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Our name → the entry that holds it."""
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        path = PurePosixPath(entry.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0:1]:
            raise CheckpointError("the zip has an entry that points outside of it: pack the adapter's folder again")
        if path.name not in _FILES or entry.is_dir():
            continue
        if path.name in found:
            raise CheckpointError(f"the zip has more than one {path.name}: pack one adapter's folder alone")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise CheckpointError(f"in the zip, {path.name} is a link and no file: pack the file itself")
        if entry.flag_bits & 1:
            raise CheckpointError("the zip is encrypted: pack it without a password")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError("the zip is packed by a method that is not read here: pack it with deflate, zip's own")
        if entry.file_size > _FILES[path.name]:
            raise CheckpointError(f"in the zip, {path.name} has more than the {_size(_FILES[path.name])} allowed")
        found[path.name] = entry
    missing = [name for name in _FILES if name not in found]
    if missing:
        if missing == [WEIGHTS_FILE]:
            _no_pickle([PurePosixPath(entry.filename).name for entry in entries])
        raise CheckpointError(f"the zip has no {missing[0]}: {_GIVE}")
    return found


@contextmanager
def _broken_zip_is_an_error() -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError("the zip is truncated or damaged: pack it again") from error


def _write(source: BinaryIO, file: Path, most: int) -> None:
    """Copy what comes, as long as it is no more than `most` bytes, whatever was declared."""
    left = most
    with file.open("xb") as target:
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise CheckpointError(f"{file.name} has more than the {_size(most)} allowed")
            target.write(chunk)


def _no_pickle(names: Sequence[str]) -> None:
    pickles = [name for name in names if name in PICKLE_FILES]
    if pickles:
        raise CheckpointError(f"its weights are in {pickles[0]}, a pickle, and pickles are never loaded: save it as safetensors")


# ----------------------------------------------------------------------------------------------------- what is inside


def check_config(file: Path) -> None:
    """CheckpointError for patterns that could be searched for without end: they are regular expressions of somebody else's."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of very many digits
        raise CheckpointError(f"{CONFIG_FILE} is not valid JSON: save the adapter again") from error
    for option in ("alpha_pattern", "rank_pattern"):
        patterns = config.get(option) if isinstance(config, dict) else None
        if not isinstance(patterns, dict):
            continue
        searches = [pattern for pattern in patterns if any(sign in pattern for sign in _REPEATS)]
        if len(patterns) > MAX_PATTERNS or len(searches) > MAX_SEARCHES or not all(map(_is_plain, patterns)):
            raise CheckpointError(f"{option} in {CONFIG_FILE} is more than an upload's may be: name the layers it is for in full")


def _is_plain(pattern: str) -> bool:
    """Whether it is found, or not, in few steps: short, one repetition at most and none of a group, few alternatives."""
    repeats = sum(map(pattern.count, _REPEATS))
    return (
        len(pattern) <= MAX_NAME_CHARACTERS
        and repeats <= 1
        and pattern.count("|") <= 3
        and not any(f"){sign}" in pattern for sign in _REPEATS)
    )


def check_header(file: Path) -> None:
    """CheckpointError for a safetensors file with a longer table of contents, or longer names, than any adapter has."""
    with file.open("rb") as weights:
        length = int.from_bytes(weights.read(8), "little")
        header = weights.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{WEIGHTS_FILE} is truncated or not a safetensors file: save it again") from error
    if not isinstance(tensors, dict) or len(tensors) > MAX_TENSORS or any(len(name) > MAX_NAME_CHARACTERS for name in tensors):
        raise CheckpointError(f"{WEIGHTS_FILE} holds more, or longer names, than an adapter's weights: save it again")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(name[:40] for name in names[:3])
    return shown if len(names) <= 3 else f"{len(names)} files"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1000**2:.0f} MB" if num_bytes >= 1000**2 else f"{num_bytes >> 10} KiB"
