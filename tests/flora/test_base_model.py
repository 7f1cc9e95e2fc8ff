"""An adapter says which model it was made for: names of one model are one, wherever it lay, and another model's are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from flora import AdapterError, Engine
from flora.formats import CONFIG_FILE, Adapter, require_base_model


@pytest.fixture
def lora(checkpoints, tmp_path) -> Path:
    """A copy of a LoRA checkpoint that fits the tiny model "code"."""
    return Path(shutil.copytree(checkpoints["code"].adapters["aa"]["lora"], tmp_path / "my-lora"))


def say(folder: Path, base_model: object) -> None:
    """Write down another base model in the adapter's configuration."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base_model}))


@pytest.mark.parametrize(
    "made_for",
    [
        "code",
        "CODE",
        "bigcode/code",
        "./code/",
        "/srv/models/code",
        r"D:\models\code",
        "/srv/models--bigcode--code/snapshots/0a1b",
    ]
    + [None, "", ".", 7],
)
def test_an_adapter_of_this_model_is_taken_wherever_it_lay(made_for, checkpoints, lora):
    say(lora, made_for)
    assert checkpoints["code"].engine().add_adapter("new", lora).families == ("lora",)


@pytest.mark.parametrize("made_for", ["bigcode/starcoderbase-1b", "/srv/secret/starcoderbase-1b", "starcoderbase-1b"])
def test_an_adapter_of_another_model_is_named_even_if_it_fits(made_for, checkpoints, lora):
    engine = checkpoints["code"].engine("aa")
    say(lora, made_for)
    before = engine.adapters
    message = r"'new' was made for the base model 'starcoderbase-1b' and this engine serves 'code': .*=False \(--any-base-model"
    with pytest.raises(AdapterError, match=message) as caught:
        engine.add_adapter("new", [checkpoints["code"].adapters["bb"]["flora"], lora])
    assert "secret" not in str(caught.value) and engine.adapters == before
    with pytest.raises(AdapterError, match=message):
        Engine.from_pretrained(checkpoints["code"].model, {"new": lora}, device="cpu")
    assert "new" in Engine.from_pretrained(checkpoints["code"].model, {"new": lora}, device="cpu", check_base_model=False).adapters
    info = engine.add_adapter("new", lora, check_base_model=False)
    assert info.base_models == (made_for,) and info.any_base_model


@pytest.mark.parametrize(
    ("made_for", "names"),
    [
        ("meta-llama/Llama-2-7b-hf", ("llama-2-7b",)),
        ("llama-2-7b", ("meta-llama/Llama-2-7b-hf",)),
        ("/models/Llama-2-7b-hf", ("llama-2-7b", "meta-llama/Llama-2-7b-hf")),
        ("openai/whisper-large-v2", ("some-folder", "/models/whisper-large-v2")),
    ],
)
def test_short_names_hub_ids_and_folders_are_one_model(made_for, names):
    adapter = Adapter("flora", {}, made_for, "source")
    require_base_model("tag", [adapter], names)
    with pytest.raises(AdapterError, match="made for the base model"):
        require_base_model("tag", [adapter], ("another",))


def test_every_adapter_that_ships_is_of_the_model_that_ships():
    assets = Path(__file__).resolve().parents[2] / "assets"
    for kind in ("code", "speech"):
        sources = {"/".join(path.parts[-2:]): path for path in sorted((assets / "adapters" / kind).glob("*/*"))}
        engine = Engine.from_pretrained(assets / "models" / kind, sources, device="cpu")
        assert len(engine.adapters) == len(sources) >= 18
