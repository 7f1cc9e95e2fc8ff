"""Adapters that visitors add, and models that are replaced while requests run: on real engines, without a browser."""

from __future__ import annotations

import argparse
import gc
import http.client
import json
import shutil
import threading
import time
import weakref
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr
import pytest
import tiny_models
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from safetensors.torch import load_file, save_file

from flora.engine import Engine, Request
from flora.errors import AdapterError, CheckpointError, FloraError, ModelError, RequestError, UnknownAdapterError
from flora.formats import write_flora
from profiling.compare import compare
from profiling.dashboard import adapters as adapters_module
from profiling.dashboard import models_views as views
from profiling.dashboard import page, upload_quota
from profiling.dashboard.adapters import AdapterDesk
from profiling.dashboard.device import Device
from profiling.dashboard.engines import Engines
from profiling.dashboard.live_load import LiveLoads, Wish
from profiling.dashboard.menus import MAX_LISTED, Follower, Following, adapter_choices
from profiling.dashboard.models import ModelDesk
from profiling.dashboard.policy import EVERYTHING, PermissionRefused, Policy, Visitor
from profiling.events import Finished
from profiling.loading import add_where_it_fits

OWNER = Visitor("owner", EVERYTHING)
GUEST, OTHER = Visitor("guest", frozenset({"upload"})), Visitor("other", frozenset({"upload"}))
NOBODY = Visitor("nobody", frozenset())


@pytest.fixture
def own(model_folders):
    """Engines of this test's own: code and speech, each with one of its two adapters."""
    engines = Engines(
        {kind: Engine.from_pretrained(model, dict(list(adapters.items())[:1])) for kind, (model, adapters) in model_folders.items()}
    )
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture
def desk(own):
    desk = AdapterDesk(own)
    yield desk
    desk.close()


@pytest.fixture
def packed(model_folders, tmp_path):
    """packed(kind, tag, family's place) → a zip of that checkpoint, as a visitor sends it."""

    def pack(kind: str, tag: str, place: int = 0) -> list[Path]:
        folder = model_folders[kind][1][tag][place]
        file = tmp_path / f"{kind}-{tag}-{place}.zip"
        with zipfile.ZipFile(file, "w") as archive:
            for path in folder.iterdir():
                archive.write(path, f"{tag}/{path.name}")
        return [file]

    return pack


def files_of(desk: AdapterDesk) -> list[Path]:
    return [path for path in Path(desk._folder.name).rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------------------------- adapters


def test_an_upload_is_served_by_the_model_that_it_fits(own, desk, packed, model_folders):
    number = own.number
    kind, info = desk.upload(GUEST, "mine", packed("code", "rb"))
    assert (kind, info.families, info.peft_types) == ("code", ("flora",), ("FLORA",)) and own.number > number
    kind, _ = desk.upload(GUEST, "heard", packed("speech", "lt", 1))
    assert kind == "speech" and own["speech"].adapters["heard"].peft_types == ("LORA",)

    asked = Request(prompt="local x", adapter="mine", max_new_tokens=6)
    model, adapters = model_folders["code"]
    known = Engine.from_pretrained(model, {"mine": adapters["rb"]})
    assert own["code"].generate([asked])[0].token_ids == known.generate([asked])[0].token_ids


def test_a_tag_takes_a_checkpoint_of_each_family(own, desk, packed):
    desk.upload(GUEST, "mine", packed("code", "rb", 0))
    _, info = desk.upload(GUEST, "mine", packed("code", "rb", 1))
    assert info.families == ("flora", "lora") and len(files_of(desk)) == 4
    _, info = desk.upload(GUEST, "mine", packed("code", "lua", 0))
    assert set(info.families) == {"flora", "lora"} and info.ranks["flora"] == 1 and len(files_of(desk)) == 4
    desk.remove(GUEST, "code", "mine")
    assert "mine" not in own["code"].adapters and not files_of(desk)


def test_an_adapter_is_read_again_from_where_it_was_unpacked(model_folders, packed):
    model, _ = model_folders["code"]
    engines = Engines({"code": Engine.from_pretrained(model, host_adapter_bytes=0, adapter_slots=1)})
    desk = AdapterDesk(engines)
    for tag in ("one", "two"):
        desk.upload(GUEST, tag, packed("code", "rb"))
    answers = [
        engines["code"].generate([Request("x", adapter=tag, max_new_tokens=3)])[0].token_ids for tag in ("one", "two", "one")
    ]
    assert answers[0] == answers[1] == answers[2] and engines["code"].bank.counters()["one"].loads > 0
    desk.close()
    engines["code"].close()


@pytest.mark.parametrize(
    "tag",
    ["", " ", "a b", "<b>x</b>", '"', "x" * 41, "../up", "a/b", "-x", ".x", "x\n", "a=b", "ä", "\u202ex", None, 7, ["x"]],
)
def test_a_tag_is_a_plain_word(desk, packed, tag):
    with pytest.raises(RequestError, match="a tag has"):
        desk.upload(GUEST, tag, packed("code", "rb"))
    assert not files_of(desk)


def test_a_visitor_touches_only_what_is_the_visitors(own, desk, packed):
    desk.upload(GUEST, "mine", packed("code", "rb"))
    before = own["code"].adapters["mine"]
    for visitor, kind, tag in ((OTHER, "code", "mine"), (OTHER, "code", "lua"), (GUEST, "speech", "cs"), (NOBODY, "code", "mine")):
        with pytest.raises(PermissionRefused, match="not yours.*--allow manage"):
            desk.remove(visitor, kind, tag)
    for visitor, tag in ((OTHER, "mine"), (OTHER, "lua"), (GUEST, "cs")):
        with pytest.raises(PermissionRefused, match="already"):
            desk.upload(visitor, tag, packed("code", "rb"))
    nameless = Visitor(None, frozenset({"upload"}))
    desk.upload(nameless, "stray", packed("code", "rb"))
    with pytest.raises(PermissionRefused, match="not yours"):
        desk.remove(Visitor(None, frozenset({"upload"})), "code", "stray")
    assert own["code"].adapters["mine"] is before
    desk.remove(OWNER, "code", "mine")
    desk.remove(OWNER, "code", "lua")
    with pytest.raises(UnknownAdapterError, match="no adapter lua"):
        desk.remove(OWNER, "code", "lua")
    for kind, tag in (("video", "x"), (None, "x"), ("code", None), ({}, [])):
        with pytest.raises(RequestError):
            desk.remove(OWNER, kind, tag)


def test_what_is_not_allowed_is_refused_before_anything_is_looked_at(own, desk, packed, model_folders):
    folder = model_folders["code"][1]["rb"][0]
    for what in (
        lambda: desk.upload(NOBODY, "x", packed("code", "rb")),
        lambda: desk.from_folder(GUEST, "x", str(folder)),
        lambda: desk.from_folder(GUEST, "x", "/no/such/folder"),
        lambda: desk.from_hub(GUEST, "x", "owner/name"),
    ):
        with pytest.raises(PermissionRefused, match="switched off here.*--allow"):
            what()
    assert set(own["code"].adapters) == {"lua"} and not files_of(desk)


def test_what_is_wrong_with_an_upload_is_told_and_nothing_stays(own, desk, packed, tmp_path, model_folders):
    source = model_folders["code"][1]["rb"][0]
    broken = tmp_path / "broken"
    for spoil, words in (
        (lambda: (broken / "adapter_model.safetensors").write_bytes(b"\x10"), "not a safetensors"),
        (lambda: (broken / "adapter_config.json").write_text('{"peft_type": "<b>MAGIC</b>"}'), "MAGIC"),
        (lambda: (broken / "adapter_config.json").write_text("{}"), "mine/uploaded"),
    ):
        shutil.copytree(source, broken)
        spoil()
        with pytest.raises(CheckpointError, match=words) as refusal:
            desk.upload(GUEST, "mine", sorted(broken.iterdir()))
        assert str(tmp_path) not in str(refusal.value) and desk._folder.name not in str(refusal.value)
        shutil.rmtree(broken)
    assert not files_of(desk) and "mine" not in own["code"].adapters
    with pytest.raises(CheckpointError, match="no longer"):
        desk.upload(GUEST, "mine", [tmp_path / "gone.zip"])


def test_an_adapter_of_another_model_is_refused_by_name(own, desk, tmp_path, model_folders):
    source = model_folders["code"][1]["rb"][1]
    shutil.copytree(source, tmp_path / "mine")
    path = tmp_path / "mine" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key.replace("transformer.h.", "model.layers."): value for key, value in tensors.items()}, path)
    with pytest.raises(AdapterError, match="does not fit the code model .* and the speech model .*model.layers"):
        desk.upload(GUEST, "mine", sorted((tmp_path / "mine").iterdir()))
    save_file({key: value.repeat(1, 2) if "lora_A" in key else value for key, value in tensors.items()}, path)
    with pytest.raises(AdapterError, match="does not fit layer"):
        desk.upload(GUEST, "mine", sorted((tmp_path / "mine").iterdir()))
    assert not files_of(desk)


def of_rank(rank: int, folder: Path) -> list[Path]:
    """The files of a fLoRA adapter of one layer of the code model."""
    factors = {"transformer.h.0.attn.c_proj": (torch.ones(rank, 48), torch.ones(rank, 48))}
    write_flora(folder, factors, {"r": rank})
    return sorted(folder.iterdir())


def test_ranks_are_limited_as_every_slot_has_room_for_the_largest(own, desk, tmp_path, monkeypatch):
    with pytest.raises(AdapterError, match=r"^adapter mine has rank 1,500, and one that is sent here may have 128 at most$"):
        desk.upload(GUEST, "mine", of_rank(1500, tmp_path / "1500"))
    with pytest.raises(AdapterError, match=r"has rank 100 on layer transformer.h.0.attn.c_proj, .* takes 64 at most"):
        desk.upload(GUEST, "mine", of_rank(100, tmp_path / "100"))
    assert not files_of(desk) and not desk._ranks.get("code")

    slots = own["code"].bank.num_slots + 1
    monkeypatch.setattr(adapters_module, "MAX_SLOT_BYTES", slots * 4 * (48 + 48) * own["code"].bank.dtype.itemsize)
    for tag, rank in (("four", 4), ("three", 3)):  # they share the room
        desk.upload(GUEST, tag, of_rank(rank, tmp_path / tag))
    five = of_rank(5, tmp_path / "five")
    with pytest.raises(AdapterError, match="slots of visitors' adapters may take .* and with five they would take more"):
        desk.upload(GUEST, "five", five)
    desk.remove(GUEST, "code", "four")  # its slots stay as wide as they were
    with pytest.raises(AdapterError, match="with five they would take more"):
        desk.upload(GUEST, "five", five)
    assert desk._ranks["code"] == {("flora", "transformer.h.0.attn.c_proj"): 4}
    model = Engine.from_pretrained(own["code"].model.name_or_path)
    own.replace(model)  # its stacks are made anew, for those that came along
    assert desk._ranks["code"] == {("flora", "transformer.h.0.attn.c_proj"): 3}
    desk.from_folder(OWNER, "five", str(tmp_path / "five"))


def test_from_a_folder_and_the_folder_stays(own, desk, model_folders, tmp_path):
    folder = model_folders["code"][1]["rb"][0]
    kind, info = desk.from_folder(OWNER, "mine", f" {folder} ")
    assert kind == "code" and info.sources == (str(folder),)
    desk.remove(OWNER, "code", "mine")
    assert (folder / "adapter_config.json").is_file()
    for place, words in (
        ("", "name the folder"),
        (str(tmp_path / "no"), "no such folder"),
        ("\0", "no such folder"),
        ("~nobody", "no such"),
    ):
        with pytest.raises(CheckpointError, match=words) as refusal:
            desk.from_folder(OWNER, "mine", place)
        assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "../x", "/etc", "./x", "a/.b", "a b/c", "https://x/y", "x" * 200 + "/y"])
def test_a_hub_id_is_no_path(desk, name):
    with pytest.raises(CheckpointError, match="owner/name"):
        desk.from_hub(OWNER, "mine", name)


def test_from_the_hub(own, desk, model_folders, monkeypatch):
    asked, folder = [], model_folders["code"][1]["rb"][0]

    def download(name, file, local_dir, token, dry_run=False):
        asked.append((name, token))
        if dry_run:
            return argparse.Namespace(file_size=(folder / file).stat().st_size)
        return shutil.copy(folder / file, local_dir)

    monkeypatch.setattr(adapters_module, "hf_hub_download", download)
    visitor = Visitor("guest", frozenset({"hub"}))
    kind, info = desk.from_hub(visitor, "mine", "owner/name")
    assert kind == "code" and info.sources[0].endswith("/owner/name") and len(files_of(desk)) == 2
    assert {token for _, token in asked} == {False}, "a visitor does not read what is the owner's own"
    monkeypatch.setattr(adapters_module, "MAX_UPLOAD_BYTES", 100)
    with pytest.raises(CheckpointError, match="MB allowed"):
        desk.from_hub(visitor, "another", "owner/name")
    desk.remove(visitor, "code", "mine")
    assert not files_of(desk)


def test_the_hub_that_cannot_be_reached_is_named(desk):
    with pytest.raises(CheckpointError, match="adapter owner/name"):
        desk.from_hub(OWNER, "mine", "owner/name")
    assert not files_of(desk)


def test_there_is_a_limit_to_what_visitors_add(desk, packed, monkeypatch):
    monkeypatch.setattr(adapters_module, "MAX_OF_ONE_VISITOR", 2)
    for tag in "ab":
        desk.upload(GUEST, tag, packed("code", "rb"))
    with pytest.raises(RequestError, match="remove one first"):
        desk.upload(GUEST, "c", packed("code", "rb"))
    monkeypatch.setattr(adapters_module, "MAX_ADDED", 3)
    desk.upload(OTHER, "c", packed("code", "rb"))
    with pytest.raises(RequestError, match="room for no more"):
        desk.upload(OWNER, "d", packed("code", "rb"))
    desk.remove(OTHER, "code", "c")
    monkeypatch.setattr(adapters_module, "MAX_ADDED_BYTES", 100)
    with pytest.raises(AdapterError, match="together"):
        desk.upload(OTHER, "c", packed("code", "rb"))


def test_what_guests_added_goes_with_them_or_after_a_while(own, desk, packed, monkeypatch):
    desk.upload(GUEST, "mine", packed("code", "rb"))
    desk.upload(OTHER, "theirs", packed("speech", "lt"))
    desk.upload(OWNER, "stays", packed("code", "rb"))
    desk.leave("guest")
    desk.leave("owner")
    assert set(own["code"].adapters) == {"lua", "stays"} and set(own["speech"].adapters) == {"cs", "theirs"}
    monkeypatch.setattr(adapters_module, "STAY_S", -1.0)
    desk.upload(OTHER, "brief", packed("code", "rb"))
    desk.sweep()
    assert set(own["code"].adapters) == {"lua", "stays"} and "theirs" in own["speech"].adapters
    folder = Path(desk._folder.name)
    desk.close()
    assert not folder.exists()


def test_two_who_want_the_same_tag_at_once(desk, packed, monkeypatch):
    read, entered, go_on = adapters_module.read_adapter, threading.Event(), threading.Event()

    def slow(source):
        entered.set()
        go_on.wait(20)
        return read(source)

    monkeypatch.setattr(adapters_module, "read_adapter", slow)
    first = threading.Thread(target=desk.upload, args=(GUEST, "mine", packed("code", "rb")))
    first.start()
    assert entered.wait(20)
    with pytest.raises(RequestError, match="at this moment"):
        desk.upload(OTHER, "mine", packed("code", "lua"))
    go_on.set()
    first.join()
    assert desk.may_remove(GUEST, "code", "mine") and not desk.may_remove(OTHER, "code", "mine")


def test_adapters_of_a_command_line_go_where_they_fit(own, model_folders):
    (_, code), (_, speech) = model_folders["code"], model_folders["speech"]
    add_where_it_fits(own, [f"x={code['rb'][0]}", f"x={code['rb'][1]}", f"x={speech['lt'][0]}", f"lua={code['rb'][0]}"])
    assert own["code"].adapters["x"].families == ("flora", "lora") and own["speech"].adapters["x"].families == ("flora",)
    assert set(own["code"].adapters["lua"].families) == {"flora", "lora"} and own["code"].adapters["lua"].ranks["flora"] == 2
    for entry, words in (("lua", "TAG="), ("lua=./no/such/place", "no such folder")):
        with pytest.raises(FloraError, match=words):
            add_where_it_fits(own, [entry])


def test_an_adapter_of_another_base_model_is_taken_where_one_says_so(own, desk, model_folders, tmp_path):
    shutil.copytree(model_folders["code"][1]["rb"][0], tmp_path / "mine")
    path = tmp_path / "mine" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "some/other"}))
    files = sorted((tmp_path / "mine").iterdir())
    with pytest.raises(AdapterError, match="made for the base model 'other'.*--any-base-model, or the box in the page"):
        desk.upload(GUEST, "mine", files)
    with pytest.raises(AdapterError, match="made for the base model 'other'"):
        add_where_it_fits(own, [f"line={tmp_path / 'mine'}"])
    _, info = desk.upload(GUEST, "mine", files, any_base_model=True)
    add_where_it_fits(own, [f"line={tmp_path / 'mine'}"], any_base_model=True)
    desk.upload(GUEST, "mine", sorted(model_folders["code"][1]["rb"][1].iterdir()))  # beside it, and it stays
    assert info.any_base_model and len(own["code"].adapters["mine"].families) == 2
    assert own.replace(Engine.from_pretrained(own["code"].model.name_or_path)) == []
    assert {"mine", "line"} <= {tag for tag, info in own["code"].adapters.items() if info.any_base_model}


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def options(model_folders):
    """A command line that started with the tiny models."""
    given = {f"{kind}_model": str(model) for kind, (model, _) in model_folders.items()}
    given |= {
        f"{kind}_adapters": [f"started={adapters['rb' if kind == 'code' else 'lt'][0]}"]
        for kind, (_, adapters) in model_folders.items()
    }
    weights = {"quantize": None, "weights": "pretrained", "llm_int8_threshold": None, "any_base_model": False}
    return argparse.Namespace(**given, device="cpu", dtype="auto", **weights)


@pytest.fixture
def device():
    device = Device()
    yield device
    device.close()


def test_another_model_serves_and_nothing_of_the_old_one_is_left(own, device, options, model_folders, desk, packed):
    desk.upload(GUEST, "mine", packed("code", "rb"))
    old = weakref.ref(own["code"])
    options.dtype = "bfloat16"
    model_desk, number = ModelDesk(own, device, options), own.number
    words = list(model_desk.load(OWNER, "as started:code", "nf4", "float32", "random"))  # which are not as it was started
    assert words[-1].endswith("is the code model now, for everybody, with 3 adapters.")
    gc.collect()
    assert old() is None, "the old engine's memory is given back"
    assert str(own["code"].dtype) == "torch.bfloat16" and own["code"].quantize is None and own.number > number
    assert set(own["code"].adapters) == {"started", "lua", "mine"} and desk.may_remove(GUEST, "code", "mine")
    assert own["code"].generate([Request("x", adapter="mine", max_new_tokens=2)])[0].token_ids
    desk.remove(GUEST, "code", "mine")


def test_adapters_that_do_not_fit_the_new_model_are_named_and_let_go(own, device, options, desk, packed, tmp_path):
    other = tiny_models.save_llama_model(tmp_path / "llama")
    desk.upload(GUEST, "mine", packed("code", "rb"))
    options.quantize, options.llm_int8_threshold = "int8", 0.0  # of which the new one has nothing
    words = list(ModelDesk(own, device, options).load(OWNER, str(other), "no", "auto", "pretrained"))
    assert words[-1].startswith("llama is the code model now") and words[-1].endswith("; could not be taken along: lua, mine.")
    assert not own["code"].adapters and not files_of(desk) and str(tmp_path) not in " ".join(words)


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(own, device, options, tmp_path, monkeypatch):
    desk, before = ModelDesk(own, device, options), own["code"]
    (tmp_path / "config.json").write_text("{}")
    for name, values, words in (
        (str(tmp_path), ("no", "auto", "pretrained"), "could not be loaded"),
        ("no such/thing at all", ("no", "auto", "pretrained"), "neither a folder"),
        ("as started:code", ("int3", "auto", "pretrained"), "no such quantisation"),
        ("as started:code", ("no", "float3", "pretrained"), "no such dtype"),
        ("as started:code", ("no", "auto", "none"), "no such weights"),
        ("", ("no", "auto", "pretrained"), "choose a model"),
        (None, ("no", "auto", "pretrained"), "choose a model"),
        ("x" * 999, ("no", "auto", "pretrained"), "choose a model"),
    ):
        with pytest.raises(FloraError, match=words) as refusal:
            list(desk.load(OWNER, name, *values))
        assert str(tmp_path) not in str(refusal.value)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("profiling.dashboard.models.load_chosen", full)
    with pytest.raises(ModelError, match="does not fit into the memory"):
        list(desk.load(OWNER, "as started:code", "no", "auto", "pretrained"))
    assert own["code"] is before and before.generate([Request("x", adapter="lua", max_new_tokens=2)])


def test_who_may_load_what(own, device, options, monkeypatch, tmp_path):
    desk = ModelDesk(own, device, options)
    monkeypatch.setattr(device, "start", lambda job: pytest.fail("it began"))
    values = ("no", "auto", "pretrained")
    with pytest.raises(PermissionRefused, match="--allow models"):
        next(desk.load(GUEST, "embedded:code", *values))
    loader = Visitor("x", frozenset({"models"}))
    for name in ("/etc", str(tmp_path), "~", "../secret", "./x"):
        with pytest.raises(PermissionRefused, match="--allow folders"):
            next(desk.load(loader, name, *values))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(ModelError, match="not on the hub"):
        next(desk.load(loader, "a/b", *values))
    labels, given = zip(*desk.choices(), strict=True)
    assert {"embedded:code", "as started:speech", "starcoder", "whisper-large-v3"} <= set(given)
    assert not any(label.startswith("/") for label in labels)


def test_requests_in_flight_finish_or_fail_by_name(own, model_folders):
    old, (model, adapters) = own["code"], model_folders["code"]
    ticket = old.submit(Request("x", max_new_tokens=60, ignore_eos=True))
    own.replace(Engine.from_pretrained(model, adapters))
    assert len(ticket.result(20).token_ids) == 60
    with pytest.raises(RequestError, match="shutting down"):
        old.submit(Request("x"))
    assert own["code"] is not old


def test_a_model_waits_for_the_comparisons_before_it_and_a_visitor_who_leaves_loads_none(own, device, options):
    go_on, asked = threading.Event(), Request("x", max_new_tokens=3)
    device.start(lambda: iter([go_on.wait(20)]))
    loading, before = ModelDesk(own, device, options).load(OWNER, "as started:code", "no", "auto", "pretrained"), own["code"]
    assert next(loading) == "measuring, 1 ahead of you"
    loading.close()
    run = device.start(lambda: compare(own, [asked], ("flora", "base"), warmup_steps=0))
    go_on.set()
    until, events = time.monotonic() + 30, []
    while not run.done and time.monotonic() < until:
        events += run.fetch(0.1)
    assert isinstance(events[-1], Finished) and own["code"] is before


def test_a_live_load_ends_by_name_when_its_model_is_replaced(own, model_folders):
    loads = LiveLoads(own)
    own.when_replaced(loads.replaced)
    wish = Wish(rate=20.0, new_tokens=3, num_adapters=1)
    loads.start("me", wish)
    loads.start("speaks", Wish(rate=5.0, new_tokens=2, num_adapters=1, speech_percent=100.0))
    old = weakref.ref(own["code"])
    model, adapters = model_folders["code"]
    own.replace(Engine.from_pretrained(model, adapters))
    until = time.monotonic() + 20
    while loads.of("me").driver.running and time.monotonic() < until:
        time.sleep(0.01)
    moment = loads.of("me").moment(0)
    assert moment.state == "failed" and "code model was replaced" in moment.failure
    assert loads.of("speaks").driver.running, "the other model's load goes on"
    gc.collect()
    assert old() is None, "an ended load keeps no engine"
    assert loads.start("me", wish).driver.running
    loads.close()


# ----------------------------------------------------------------------------------------------------------------- page


def test_a_page_looks_for_news_only_where_there_is_some(own, desk, packed):
    with gr.Blocks():
        looked, menu = [], gr.Dropdown()
        follower = Follower([menu], lambda values, opened: looked.append((values, opened)) or ["news"], [menu])
        following = Following(own, [follower])
    seen = own.number
    assert following.look(seen, "lua") == [gr.skip()] * 2 and following.begin(seen, "lua") == [gr.skip()] * 2 and not looked
    desk.upload(GUEST, "mine", packed("code", "rb"))
    assert following.look(seen, "lua") == [own.number, "news"] and following.begin(seen, "lua") == [own.number, "news"]
    assert looked == [(["lua"], False), (["lua"], True)]


def test_a_menu_keeps_what_was_chosen_and_says_that_it_is_gone(own, monkeypatch):
    assert adapter_choices("code", own, "lua") == [("lua · Lua", "lua"), ("no adapter", "")]
    assert ("gone · not here", "gone") in adapter_choices("code", own, "gone")
    monkeypatch.setattr(type(own["code"]), "adapters", {f"t{i}": None for i in range(MAX_LISTED + 9)})
    assert len(adapter_choices("code", own)) == MAX_LISTED + 1
    assert (f"t{MAX_LISTED + 5}",) * 2 in adapter_choices("code", own, f"t{MAX_LISTED + 5}")


def test_the_table_of_thousands_shows_some_and_all_can_be_found(own, model_folders):
    folder = model_folders["code"][1]["rb"][0]
    own["code"].add_adapter("<script>alert(1)</script>", folder)
    prepared = own["code"].bank._adapters["lua"]
    own["code"].bank._adapters.update({f"tag-{i:04}": prepared for i in range(3000)})
    everything = views.table(own, "", [("code", "tag-2999")], lambda *_: True)["cells"]
    assert everything["count"] == "3,003 adapters, the first 50 shown: filter by tag for others"
    assert everything["table"].count("<tr>") == 51 and everything["table"].index("tag-2999") < everything["table"].index("lua")
    found = views.table(own, " TAG-2998 ")["cells"]
    assert found["count"] == "1 of 3,003 adapters" and "tag-2998" in found["table"] and "<button" not in found["table"]
    hostile = views.table(own, "script", (), lambda *_: True)["cells"]["table"]
    assert "<script>" not in hostile and hostile.count("&lt;script&gt;") >= 2
    assert "No tag contains" in views.table(own, "nothing like it")["cells"]["table"]


def test_what_a_model_is_in_words(own):
    facts = views.model(own["code"])["cells"]
    assert facts["name"] == "code-model" and facts["architecture"] == "GPTBigCodeForCausalLM" and facts["dtype"] == "float32"
    assert facts["quantised"] == "no" and facts["layers"] == "8" and facts["weights"].endswith("kB")
    assert [views.count(n) for n in (7, 4200, 3_110_000, 15.5e9)] == ["7", "4.2 k", "3.11 M", "15.5 B"]
    assert [views.num_bytes(n) for n in (7, 4200, 3.11e6, 31e9)] == ["7 bytes", "4.2 kB", "3.11 MB", "31 GB"]


def test_what_is_off_is_said(own):
    assert views.rights(OWNER, 3600)["cells"]["rights"] == ""
    assert "--allow upload hub folders models manage</code>" in views.rights(GUEST, 3600)["cells"]["rights"]
    assert "1 h at most" in views.rights(GUEST, 3600)["cells"]["rights"]
    assert "--allow all</code>" in views.rights(NOBODY, 3600)["cells"]["rights"]


# ------------------------------------------------------------------------------------------------------------- programs


@pytest.fixture(scope="module")
def served(model_folders, tmp_path_factory):
    """A page of guests, who may upload and no more: its address and its engines."""
    made = {kind: Engine.from_pretrained(model, adapters) for kind, (model, adapters) in model_folders.items()}
    demo = page.build(made, tmp_path_factory.mktemp("no results"), Policy.of_command_line(None, "0.0.0.0"))
    demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, **page.launch_options(demo))
    yield demo.local_url, made
    demo.close(verbose=False)


def test_a_program_adds_uses_and_removes_an_adapter(served, packed):
    url, engines = served
    mine, other = Client(url, verbose=False), Client(url, verbose=False)
    (file,) = packed("code", "rb")
    added = mine.predict("mine", [handle_file(str(file))], api_name="/add_adapter")
    assert added["model"] == "code" and added["types"] == ["FLORA"] and added["ranks"] == {"flora": 2}
    assert other.predict(api_name="/adapters")["code"]["mine"] == {key: added[key] for key in added if key != "model"}
    answer = other.predict("local x", "mine", "flora", 4, api_name="/generate")
    assert answer["text"] == engines["code"].generate([Request("local x", adapter="mine", max_new_tokens=4)])[0].text
    with pytest.raises(AppError, match="not yours"):
        other.predict("mine", "code", api_name="/remove_adapter")
    with pytest.raises(AppError, match="not yours"):
        other.predict("mine", [handle_file(str(file))], api_name="/add_adapter")
    mine.predict("mine", "code", api_name="/remove_adapter")
    assert "mine" not in other.predict(api_name="/adapters")["code"]


def test_a_program_says_that_another_base_model_is_right(served, model_folders, tmp_path):
    url, engines = served
    shutil.copytree(model_folders["code"][1]["rb"][0], tmp_path / "mine")
    path = tmp_path / "mine" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "some/other"}))
    client, files = Client(url, verbose=False), [handle_file(str(path)) for path in (tmp_path / "mine").iterdir()]
    with pytest.raises(AppError, match="made for the base model 'other'"):
        client.predict("mine", files, api_name="/add_adapter")
    added = client.predict("mine", files, any_base_model=True, api_name="/add_adapter")
    assert added["base_models"] == ["some/other"] and engines["code"].adapters["mine"].any_base_model
    client.predict("mine", "code", api_name="/remove_adapter")


def test_uploads_are_limited_one_by_one_and_together(served, monkeypatch, tmp_path):
    url = f"{served[0]}gradio_api/upload"

    def upload(headers, body=b"x"):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.putrequest("POST", urlsplit(url).path)
        for name, value in {"Content-Type": "multipart/form-data; boundary=b", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return connection.getresponse().status

    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--b--\r\n'
    assert upload({"Content-Length": str(len(form))}, form) == 200
    assert upload({"Content-Length": "200000000"}, b"") == 413
    assert upload({"Transfer-Encoding": "chunked"}, b"1\r\nx\r\n0\r\n\r\n") == 411
    monkeypatch.setattr(upload_quota, "get_upload_folder", lambda: str(tmp_path))
    (tmp_path / "held").mkdir()
    with (tmp_path / "held" / "big").open("wb") as file:
        file.truncate(upload_quota.MAX_HELD_BYTES)
    assert upload({"Content-Length": str(len(form))}, form) == 507


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one of"), ({"hub": "a/b"}, "--allow hub"), ({"folder": "/etc"}, "--allow folders"), ({"hub": 7}, "text"),
        ({"files": []}, "nothing was uploaded"), ({"files": [7]}, "uploaded files"), ({"files": "x"}, "list"),
        ({"files": [{"path": "/etc/passwd"}]}, "uploaded files"), ({"hub": "a/b", "folder": "/"}, "one of"),
        ({"files": [{"path": "/etc/passwd", "meta": {"_type": "x"}}]}, "uploaded files"),
        ({"hub": "a/b", "any_base_model": "yes"}, "true or false"),
        ({"tag": "<b>", "files": []}, "a tag has"), ({"tag": "lua", "files": []}, "not yours"),
    ],
)  # fmt: skip
def test_what_a_program_may_not_do_is_named(served, arguments, words):
    client = Client(served[0], verbose=False)
    with pytest.raises(AppError, match=f"(?i){words}") as refusal:
        client.predict(**{"tag": "mine"} | arguments, api_name="/add_adapter")
    assert "/etc" not in str(refusal.value) and "Traceback" not in str(refusal.value)
    assert json.dumps(client.predict(api_name="/adapters")).count('"mine"') == 0
