"""Uploads, unpacked with suspicion: what is taken, and everything that is not."""

from __future__ import annotations

import io
import json
import pickle
import stat
import struct
import time
import zipfile

import pytest
import torch
from safetensors.torch import save

from flora.errors import CheckpointError
from flora.formats import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from profiling.dashboard import uploads
from profiling.dashboard.uploads import unpack

WEIGHTS = save({f"base_model.model.h.0.c_attn.flora_{side}": torch.ones(2, 5) for side in "AB"})
CONFIG = json.dumps({"peft_type": "FLORA", "combine": "sum", "r": 2}).encode()
PACKED = {f"mine/{CONFIG_FILE}": CONFIG, f"mine/{WEIGHTS_FILE}": WEIGHTS}


def zipped(entries, compression=zipfile.ZIP_DEFLATED) -> bytes:
    """entries: name or ZipInfo → content."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def take(tmp_path):
    """take(a zip's bytes, or {name: content}) → the folder it was unpacked to; nothing else may have been written."""

    def take_one(given):
        incoming, folder = tmp_path / "incoming", tmp_path / "a" / "b" / "unpacked"
        incoming.mkdir()
        folder.mkdir(parents=True)
        files = {"mine.zip": given} if isinstance(given, bytes) else given
        for name, content in files.items():
            (incoming / name).write_bytes(content)
        try:
            unpack([incoming / name for name in files], folder)
        finally:
            written = {path for path in tmp_path.rglob("*") if path.is_file()} - {incoming / name for name in files}
            assert written <= {folder / CONFIG_FILE, folder / WEIGHTS_FILE}
            assert not any(path.is_symlink() for path in written)
        return folder

    return take_one


@pytest.mark.parametrize(
    "given",
    [
        zipped(PACKED),
        zipped({CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS}, zipfile.ZIP_STORED),
        zipped(
            {**PACKED, "mine/README.md": b"#", "mine/optimizer.pt": pickle.dumps(1), "__MACOSX/mine/._adapter_config.json": b"x"}
        ),
        zipped({"mine/": b"", **PACKED}),
        {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS},
        {CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS, "README.md": b"#", "adapter_model.bin": pickle.dumps(1)},
    ],
    ids=["zip", "stored, no folder", "with other files", "with a folder's entry", "two files", "two among others"],
)
def test_an_adapter_is_unpacked_and_can_be_read(take, given):
    folder = take(given)
    assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert read_adapter(folder).rank == 2


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def encrypted() -> bytes:
    """The flag is enough: nobody gets as far as the content."""
    packed = bytearray(zipped(PACKED))
    place = packed.rfind(b"PK\x01\x02")
    packed[place + 8] |= 1
    return bytes(packed)


def lying_about_its_size() -> bytes:
    """Two kilobytes that say they are ten bytes, and unpack to two megabytes."""
    packed = bytearray(zipped({f"mine/{CONFIG_FILE}": b" " * 2_000_000, f"mine/{WEIGHTS_FILE}": WEIGHTS}))
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<I", packed, packed.find(signature) + offset, 10)
    return bytes(packed)


def with_count(number: int) -> bytes:
    return zipped({**PACKED, **{f"mine/{i}.txt": b"" for i in range(number)}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (zipped({f"../{CONFIG_FILE}": CONFIG, f"../{WEIGHTS_FILE}": WEIGHTS}), "points outside"),
        (zipped({**PACKED, "../../evil.txt": b"x"}), "points outside"),
        (zipped({f"/etc/{CONFIG_FILE}": CONFIG, WEIGHTS_FILE: WEIGHTS}), "points outside"),
        (zipped({f"..\\{CONFIG_FILE}": CONFIG, WEIGHTS_FILE: WEIGHTS}), "points outside"),
        (zipped({**PACKED, link("mine/link"): b"/etc"}), None),
        (zipped({f"mine/{CONFIG_FILE}": CONFIG, link(f"mine/{WEIGHTS_FILE}"): b"/etc/passwd"}), "is a link"),
        (zipped({f"mine/{CONFIG_FILE}": b" " * (uploads.MAX_CONFIG_BYTES + 1), f"mine/{WEIGHTS_FILE}": WEIGHTS}), "256 KiB"),
        (lying_about_its_size(), "truncated or damaged"),
        (with_count(uploads.MAX_ENTRIES), "200 entries"),
        (encrypted(), "encrypted"),
        (zipped(PACKED, zipfile.ZIP_LZMA), "deflate"),
        (zipped({**PACKED, f"other/{CONFIG_FILE}": CONFIG}), "more than one adapter_config.json"),
        (zipped({"mine/README.md": b"hello"}), "no adapter_config.json"),
        (zipped({f"mine/{CONFIG_FILE}": CONFIG}), "no adapter_model.safetensors"),
        (zipped({f"mine/{CONFIG_FILE}": CONFIG, "mine/adapter_model.bin": pickle.dumps(1)}), "a pickle"),
        (zipped({"mine/Adapter_Config.JSON": CONFIG, f"mine/{WEIGHTS_FILE}": WEIGHTS}), "no adapter_config.json"),
        (zipped(PACKED)[:-30], "truncated"),
        (zipped(PACKED)[60:], None),
        (zipped(PACKED)[:40] + b"\0" * 90 + zipped(PACKED)[130:], "truncated or damaged"),
        (b"", "no zip"),
        (b"PK\x05\x06", "no zip"),
        (pickle.dumps({"a": 1}) * 50, "no zip"),
        ({}, "nothing was uploaded"),
        ({CONFIG_FILE: CONFIG}, "its two files"),
        ({CONFIG_FILE: CONFIG, "adapter_model.bin": pickle.dumps(1)}, "a pickle"),
        ({"mine.tar.gz": b"x"}, "its two files"),
        ({CONFIG_FILE: b"{" * 100_000, WEIGHTS_FILE: WEIGHTS}, "not valid JSON"),
        ({CONFIG_FILE: b'{"r": ' + b"9" * 5000 + b"}", WEIGHTS_FILE: WEIGHTS}, "not valid JSON"),
        ({CONFIG_FILE: b"\xff\xfe", WEIGHTS_FILE: WEIGHTS}, "not valid JSON"),
        ({CONFIG_FILE: b"x" * (uploads.MAX_CONFIG_BYTES + 1), WEIGHTS_FILE: WEIGHTS}, "256 KiB"),
        ({CONFIG_FILE: CONFIG, WEIGHTS_FILE: pickle.dumps({"a": 1})}, "not a safetensors file"),
        ({CONFIG_FILE: CONFIG, WEIGHTS_FILE: b""}, "not a safetensors file"),
        ({CONFIG_FILE: CONFIG, WEIGHTS_FILE: (1 << 62).to_bytes(8, "little") + b"{}"}, "not a safetensors file"),
        ({CONFIG_FILE: CONFIG, WEIGHTS_FILE: save({"x" * 200: torch.ones(1)})}, "longer names"),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_named(take, given, words):
    """words: None where it is harmless, and read or refused as the case may be."""
    if words is None:
        try:
            take(given)
        except CheckpointError:
            pass
        return
    with pytest.raises(CheckpointError, match=words) as refusal:
        take(given)
    assert "/" not in str(refusal.value).replace("owner/name", "") and len(str(refusal.value)) < 250


def test_a_bomb_is_not_unpacked(take):
    """A declared gigabyte is refused as it stands there; nothing is read."""
    packed = bytearray(zipped({f"mine/{CONFIG_FILE}": CONFIG, f"mine/{WEIGHTS_FILE}": b"\0" * 3_000_000}))
    assert len(packed) < 10_000
    place = packed.rfind(b"PK\x01\x02")
    struct.pack_into("<I", packed, place + 24, 1 << 30)
    with pytest.raises(CheckpointError, match="100 MB"):
        take(bytes(packed))


def test_what_comes_is_counted_whatever_was_declared(take, monkeypatch):
    monkeypatch.setitem(uploads._FILES, WEIGHTS_FILE, 20)
    with pytest.raises(CheckpointError, match="allowed"):
        take({CONFIG_FILE: CONFIG, WEIGHTS_FILE: WEIGHTS})


def test_a_table_of_contents_is_not_read_to_find_that_it_is_too_long(take, monkeypatch):
    """A hundred megabytes of entries take a gigabyte once zipfile has read them."""
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 150, 150, uploads.MAX_DIRECTORY_BYTES + 1, 0, 0)
    with pytest.raises(CheckpointError, match="200 entries"):
        take(b"\0" * 70_000 + end)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 50, 0, 0)
    with pytest.raises(CheckpointError, match="200 entries"):
        unpack_again(take, b"\0" * 100 + locator + end)


def unpack_again(take, given):
    """`take` makes its folders once: the second upload of a test is unpacked where the first was."""
    folder = take.__closure__[0].cell_contents
    (folder / "incoming" / "mine.zip").write_bytes(given)
    unpack([folder / "incoming" / "mine.zip"], folder / "a" / "b" / "unpacked")


@pytest.mark.parametrize(
    "pattern", ["(a+)+", "(x*)*y", ".*.*.*.*.*.*b", "(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)", "a" * 500, "(.{1,9}){9}"]
)
@pytest.mark.parametrize("option", ["alpha_pattern", "rank_pattern"])
def test_patterns_that_could_be_searched_for_without_end_are_refused(take, pattern, option):
    config = json.dumps({"peft_type": "LORA", option: {pattern: 4}}).encode()
    with pytest.raises(CheckpointError, match=option):
        take({CONFIG_FILE: config, WEIGHTS_FILE: WEIGHTS})


@pytest.mark.parametrize("pattern", ["h.0.attn.c_attn", "^model.layers.3.mlp$", r"h\.[0-3]\.attn.*", "(q|k|v)_proj"])
def test_patterns_that_people_write_are_taken(take, pattern):
    config = json.dumps({"peft_type": "FLORA", "combine": "sum", "alpha_pattern": {pattern: 4}}).encode()
    assert read_adapter(take({CONFIG_FILE: config, WEIGHTS_FILE: WEIGHTS})).rank == 2


def test_the_worst_that_is_taken_is_read_at_once(take):
    """As many layers, patterns and dots as are allowed, all of it for nothing."""
    name = ".".join("a" * 60)
    tensors = {f"{name}.{i}.lora_{side}.weight": torch.ones(1, 1) for i in range(600) for side in "AB"}
    searches, names = uploads.MAX_SEARCHES, uploads.MAX_PATTERNS - uploads.MAX_SEARCHES
    patterns = {f".*b{i}": 1 for i in range(searches)} | {f"{name}.{i}.b": 1 for i in range(names)}
    config = json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "alpha_pattern": patterns}).encode()
    folder = take({CONFIG_FILE: config, WEIGHTS_FILE: save(tensors)})
    started = time.process_time()
    assert len(read_adapter(folder).factors) == 600
    assert time.process_time() - started < 10
