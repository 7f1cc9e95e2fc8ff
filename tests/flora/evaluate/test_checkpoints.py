"""Which adapters a folder or a command line names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora.errors import AdapterError
from flora.evaluate.checkpoints import SERVED_BY, Checkpoint, find_checkpoints, given_checkpoints, shipped_adapters, shipped_model
from flora.evaluate.rows import METHODS
from flora.formats import CONFIG_FILE
from flora.ops import METHODS as ENGINE_METHODS


def save(folder: Path, configuration: str = '{"peft_type": "FLORA"}') -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(configuration)
    return folder


def test_a_folder_holds_adapters_by_language_and_method(tmp_path):
    for name in ("lua/flora", "lua/lora", "rb/ia3", "pl/flora"):
        save(tmp_path / name)
    (tmp_path / "rb" / "flora").mkdir()  # nothing in it
    found, missing = find_checkpoints(tmp_path, ["rb", "lua"], METHODS)
    assert [checkpoint.name for checkpoint in found] == ["rb/ia3", "lua/lora", "lua/flora"]
    assert missing == ["rb/lora", "rb/flora", "lua/ia3"]
    assert found[1] == Checkpoint("lua", "lora", str(tmp_path / "lua" / "lora"))
    assert find_checkpoints(tmp_path / "nowhere", ["rb"], ["base", "lora"]) == ([], ["rb/lora"])


@pytest.mark.parametrize(("peft_type", "method"), [("FLORA", "flora"), ("LORA", "lora"), ("IA3", "ia3")])
def test_the_method_is_read_from_the_checkpoint(tmp_path, peft_type, method):
    folder = save(tmp_path / "one", json.dumps({"peft_type": peft_type}))
    assert given_checkpoints([f"lua={folder}"]) == [Checkpoint("lua", method, str(folder))]


def test_a_method_that_is_given_needs_no_folder_here(tmp_path):
    assert given_checkpoints(["lua/lora=owner/adapter=v2", "lua/flora=x"]) == [
        Checkpoint("lua", "lora", "owner/adapter=v2"),
        Checkpoint("lua", "flora", "x"),
    ]


@pytest.mark.parametrize("entry", ("lua", "=x", "lua=", "lua/=x", "/lora=x", ""))
def test_another_form_is_refused(entry):
    with pytest.raises(AdapterError, match="an adapter is given as TAG=FOLDER or TAG/METHOD=FOLDER, not"):
        given_checkpoints([entry])


@pytest.mark.parametrize("configuration", ("{", "[]", "{}", '{"peft_type": 3}', "[" * 100_000))
def test_a_checkpoint_that_does_not_say_its_method_is_named(tmp_path, configuration):
    folder = save(tmp_path / "mine", configuration)
    with pytest.raises(AdapterError, match="adapter mine: adapter_config.json does not say its peft_type"):
        given_checkpoints([f"lua={folder}"])


def test_methods_that_are_not_compared_and_adapters_given_twice_are_refused(tmp_path):
    folder = save(tmp_path / "one", '{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(AdapterError, match="adapter lua: the method 'prefix_tuning' is unknown; methods are ia3, lora, flora"):
        given_checkpoints([f"lua={folder}"])
    with pytest.raises(AdapterError, match="adapter lua/base: the method 'base' is unknown"):
        given_checkpoints(["lua/base=x"])
    with pytest.raises(AdapterError, match="there are two adapters lua/lora"):
        given_checkpoints(["lua/lora=x", "lua/lora=y"])


def test_every_method_is_served_by_one_of_the_engines():
    assert set(SERVED_BY) == set(METHODS) and set(SERVED_BY.values()) <= set(ENGINE_METHODS)


@pytest.mark.parametrize("task", ("code", "speech"))
def test_models_and_adapters_ship(task):
    assert (shipped_model(task) / "config.json").is_file()
    found, _ = find_checkpoints(shipped_adapters(task), ["lua", "cs"], ["flora"])
    assert len(found) == 1
