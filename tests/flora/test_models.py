"""Base models: what loads, what is refused and how it is said, random weights, quantised weights."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from tiny_bank import pinned_batch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from flora import AdapterError, Engine, ModelError, Request, models
from flora.engine.runner import PromptPiece
from flora.models import KNOWN_MODELS, choose_dtype, load_model

WEIGHTS = "model.safetensors"
CLEAR_PEAK = Path("/proc/self/clear_refs")  # Linux: a 5 in it starts the count of the peak anew


def assert_refused(message: str, name: str | Path, **options) -> None:
    """One line that does not tell where a folder lies."""
    with pytest.raises(ModelError, match=message) as caught:
        load_model(name, **options)
    said = str(caught.value)
    assert "\n" not in said
    if Path(name).is_absolute():
        assert str(Path(name).parent) not in said, f"tells a path: {said}"


# ------------------------------------------------------------------------------------------------------- names and folders


def test_a_missing_folder_is_an_error_that_names_what_there_is(tmp_path):
    assert_refused(
        "model 'nowhere' is neither a folder here nor a hub id; short names are starcoder, .*llama-2-7b", tmp_path / "nowhere"
    )
    assert_refused("model 'star coder' is neither a folder here nor a hub id", "star coder")
    assert_refused("model 'starcodr' is neither a folder here nor a hub id", "starcodr")


@pytest.mark.parametrize("name", ["someone/some-model", "starcoderbase-1b", "whisper-large-v2"])
def test_the_hub_without_a_network(name):
    assert_refused(f"model {name} could not be loaded: check the name, the network", name)


def test_short_names_are_hub_ids():
    assert len(KNOWN_MODELS) >= 5
    assert all(len(hub_id.split("/")) == 2 for hub_id in KNOWN_MODELS.values())


@pytest.mark.parametrize(
    ("name", "shown"),
    [("llama-2-7b", "its speed can be measured without it"), ("someone/some-model", "log in with `hf auth login`$")],
)
def test_a_gated_model_says_where_to_ask(name, shown, monkeypatch):
    """As transformers passes on what the hub answers: an OSError that has the refusal for its cause."""

    def refuse(*args, **options):
        raise GatedRepoError("403 Client Error: access is restricted", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", refuse)
    assert_refused(f"^model {name} is gated: accept its licence on huggingface.co/{KNOWN_MODELS.get(name, name)} .*{shown}", name)


def test_a_folder_loads_by_any_spelling(checkpoints, monkeypatch):
    folder = checkpoints["code"].model
    monkeypatch.chdir(folder.parent)
    for name in (folder, str(folder), f"{folder}/", "./code", "code"):
        assert load_model(name, device="cpu").name == "code"


def break_nothing(folder: Path) -> None:
    pass


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def keep_bytes(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size]) and None


def write(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


TENSOR = "transformer.h.1.mlp.c_fc.weight"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "could not be loaded"),
    "config cut": (keep_bytes("config.json", 30), "could not be loaded: check"),
    "config that is a list": (write("config.json", "[]"), "could not be loaded"),
    "config of nothing": (write("config.json", "{}"), "could not be loaded"),
    "unknown architecture": (write("config.json", '{"model_type": "perceptron"}'), "could not be loaded .*perceptron"),
    "an encoder": (write("config.json", '{"model_type": "vit"}'), "could not be loaded"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "could not be loaded"),
    "tokenizer cut": (keep_bytes("tokenizer.json", 100), "could not be loaded"),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), "could not be loaded"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "could not be loaded: check"),
    "weights cut": (keep_bytes(WEIGHTS, 5000), "its .safetensors file is truncated"),
    "weights empty": (keep_bytes(WEIGHTS, 0), "its .safetensors file is truncated"),
    "a tensor missing": (edit_tensors(lambda tensors: tensors.pop(TENSOR)), f"lacks 1 of its weights, {TENSOR} first"),
    "a tensor of another shape": (edit_tensors(lambda tensors: tensors.update({TENSOR: torch.zeros(3, 3)})), "could not be loaded"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_folders(how, checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["code"].model, tmp_path / "my-model"))
    damage, message = BROKEN[how]
    damage(folder)
    assert_refused(f"^model my-model.*{message}", folder, device="cpu")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("with_index", [False, True])
def test_a_model_that_is_only_a_pickle_is_refused_unopened(with_index, checkpoints, tmp_path):
    folder, trap = Path(shutil.copytree(checkpoints["code"].model, tmp_path / "my-model")), tmp_path / "trapped"
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(trap)))
    if with_index:
        index = {"metadata": {}, "weight_map": {TENSOR: "pytorch_model.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_refused(r"could not be loaded: check .*model\.safetensors", folder, device="cpu")
    assert not trap.exists(), "the pickle was run"


def test_code_in_a_model_folder_is_not_run(checkpoints, tmp_path):
    """A configuration may name a Python file of the folder (trust_remote_code); it is never imported."""
    folder, trap = Path(shutil.copytree(checkpoints["code"].model, tmp_path / "my-model")), tmp_path / "trapped"
    (folder / "custom.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    custom = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "custom", "auto_map": custom}))
    assert_refused("could not be loaded", folder, device="cpu")
    assert not trap.exists(), "the folder's code was run"


# ---------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "float99"}, "dtype 'float99' is unknown: use auto, float32, bfloat16 or float16"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"dtype": "nn"}, "dtype 'nn' is unknown"),
        ({"dtype": None}, "dtype None is unknown"),
        ({"dtype": torch.int8}, "dtype torch.int8 is unknown"),
        ({"device": "tpu"}, "device 'tpu' is unknown: use auto, cpu or cuda"),
        ({"device": ""}, "device '' is unknown"),
        ({"device": None}, "device None is unknown"),
        ({"device": "meta"}, "device meta is none that this machine can run a model on"),
        ({"device": "xpu"}, "device xpu is none that this machine can run a model on"),
        ({"device": "cuda:99"}, "cuda.* was asked for, but this machine has"),
        ({"quantize": "int3"}, "quantize 'int3' is unknown: use int8, nf4 or None"),
        ({"weights": "imagined"}, "weights 'imagined' is unknown: use pretrained or random"),
        ({"quantize": "int8", "llm_int8_threshold": -1.0}, "llm_int8_threshold -1.0 is no threshold: use a number above 0"),
        ({"quantize": "int8", "llm_int8_threshold": float("nan")}, "llm_int8_threshold nan is no threshold"),
        ({"quantize": "int8", "llm_int8_threshold": float("inf")}, "llm_int8_threshold inf is no threshold"),
        ({"quantize": "int8", "llm_int8_threshold": "6"}, "llm_int8_threshold '6' is no threshold"),
        ({"quantize": "int8", "llm_int8_threshold": True}, "llm_int8_threshold True is no threshold"),
        ({"quantize": "nf4", "llm_int8_threshold": 6.0}, "llm_int8_threshold is a setting of 8-bit weights"),
        ({"llm_int8_threshold": 0.0}, "llm_int8_threshold is a setting of 8-bit weights"),
    ],
    ids=str,
)
def test_bad_options(options, message, checkpoints):
    assert_refused(message, checkpoints["code"].model, **{"device": "cpu", **options})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["code", "speech"])
def test_the_dtype_is_the_whole_models(name, dtype, checkpoints):
    model = load_model(checkpoints[name].model, device="cpu", dtype=dtype).model
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


def test_auto_dtype():
    class Config:
        dtype = torch.float16

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", cpu, Config()) == torch.float32
    assert choose_dtype("auto", gpu, Config()) == torch.float16
    Config.dtype = torch.float32
    assert choose_dtype("auto", gpu, Config()) == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------- random weights


class Written(TorchDispatchMode):
    """Counts the float32 elements that operations write, outside of the meta device; empty memory costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        # Views and detached tensors share their elements.
        fresh = "empty" not in function.__name__ and not function.is_view and "detach" not in function.__name__
        if fresh and isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.device.type != "meta":
            self.elements += result.numel()
        return result


@pytest.mark.parametrize("name", ["code", "llama", "speech"])
def test_random_weights_have_the_true_shapes_and_never_were_float32(name, checkpoints):
    plain = tiny_models.load_plain(checkpoints[name].model)
    with Written() as written:
        loaded = load_model(checkpoints[name].model, device="cpu", dtype="bfloat16", weights="random")
    shapes = {key: tuple(tensor.shape) for key, tensor in plain.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in loaded.model.state_dict().items()} == shapes
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert all(parameter.device.type == "cpu" for parameter in loaded.model.parameters())
    assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())
    num_parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert written.elements < 0.1 * num_parameters, f"{written.elements} float32 elements beside {num_parameters} parameters"
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert (head.weight is embedding.weight) == tied


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="this system does not tell a process's peak of memory")
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_random_weights_are_allocated_once(quantize, monkeypatch):
    """The peak of memory is the finished model and one layer in halves, never a second copy of the model."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, bos_token_id=1, eos_token_id=2
    )  # 68 million parameters, 136 MB in bfloat16
    monkeypatch.setattr(models, "SHAPES", {KNOWN_MODELS["llama-2-7b"]: lambda: config})
    gc.collect()
    before = resident("VmRSS")
    CLEAR_PEAK.write_text("5")
    model = load_model("llama-2-7b", "cpu", "bfloat16", quantize, "random").model
    peak, tensors = resident("VmHWM") - before, [*model.parameters(), *model.buffers()]
    finished = sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())
    half_precision = 2 * model.num_parameters()
    assert finished < {None: 1.01, "int8": 0.6, "nf4": 0.4}[quantize] * half_precision
    allowed = {None: 1.3, "int8": 1.0, "nf4": 1.0}[quantize] * half_precision
    assert peak < allowed, f"a peak of {peak / 1e6:.0f} MB for a model of {finished / 1e6:.0f} MB"


def resident(field: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at most (VmHWM)."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["code", "llama", "speech"])
def test_random_weights_give_finite_answers_and_serve_adapters(name, dtype, checkpoints, clips):
    made = checkpoints[name]
    engine = made.engine(weights="random", dtype=dtype)
    inputs = {"audio": clips[0]} if name == "speech" else {"prompt": "def f("}
    requests = [Request(**inputs, adapter=tag, max_new_tokens=4, ignore_eos=True) for tag in ("aa", "cc", None)]
    for method in ("flora", "bmm-lora"):
        generation = engine.start(requests, method)
        while not generation.done:
            generation.step()
        assert [len(completion.token_ids) for completion in generation.completions] == [4, 4, 4]
        assert torch.tensor(generation.chosen_logits).isfinite().all()


@pytest.mark.parametrize("name", ["code", "llama"])
def test_random_weights_keep_what_is_computed_not_learnt(name, checkpoints):
    """Rotary frequencies and causal masks are buffers: they must be those of a model built in the ordinary way, unrounded."""
    plain = tiny_models.load_plain(checkpoints[name].model)
    random = load_model(checkpoints[name].model, device="cpu", dtype="bfloat16", weights="random").model
    buffers = dict(random.named_buffers())
    assert buffers and buffers.keys() == dict(plain.named_buffers()).keys()
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffers[key], buffer), key
    weights = random.state_dict()
    assert not torch.equal(next(iter(weights.values())), next(iter(plain.state_dict().values()))), "the weights were read"


def test_random_weights_are_the_seeds(checkpoints):
    first, same, other = (
        load_model(checkpoints["code"].model, device="cpu", weights="random", seed=seed).model.state_dict()[TENSOR]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------------- quantised weights


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantised(request, tmp_path_factory) -> tuple[Engine, Engine]:
    """An engine on weights quantised by bitsandbytes, on the CPU, and one on the same weights as they were."""
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("quantised")
    # On a CPU bitsandbytes takes widths that are multiples of 64 only.
    folder = tiny_models.save_code_model(root / "model", width=128, inner_width=192)
    plain = tiny_models.load_plain(folder)
    adapters = {
        "aa": [
            tiny_models.save_flora_adapter(root / "flora", plain, tiny_models.CODE_LAYERS, rank=3, seed=0),
            tiny_models.save_peft_lora(root / "lora", folder, tiny_models.CODE_LAYERS, rank=2, seed=0),
        ]
    }
    return tuple(Engine.from_pretrained(folder, adapters, device="cpu", quantize=quantize) for quantize in (request.param, None))


QUANTISED_BATCH = [
    Request("def f(", adapter="aa", max_new_tokens=6, ignore_eos=True),
    Request("x", max_new_tokens=9, ignore_eos=True),
]


def first_logits(engine: Engine, method: str) -> torch.Tensor:
    """(2, vocabulary) after the two prompts."""
    encoded = [engine.runner.encode(request) for request in QUANTISED_BATCH]
    tags = [request.adapter for request in QUANTISED_BATCH]
    with pinned_batch(engine.bank, tags, method) as batch, torch.inference_mode():
        cache = engine.runner.new_cache(max_rows=2)
        cache.reserve(2, 32)
        pieces = [PromptPiece(row, 0, len(row.prompt_ids)) for row in encoded]
        return engine.runner.prefill(pieces, cache, 0, batch)


@pytest.mark.parametrize("method", ["flora", "flora-expand", "bmm-lora", "loop-lora", "base"])
def test_quantised_weights_serve_adapters(method, quantised):
    engine, exact = quantised
    assert all(layer.is_black_box for layer in engine.bank.layers.values())
    generation = engine.start(QUANTISED_BATCH, method)
    while not generation.done:
        generation.step()
    assert [len(completion.token_ids) for completion in generation.completions] == [6, 9]
    tokens = [completion.token_ids for completion in generation.completions]
    agreement = engine.verify(QUANTISED_BATCH, tokens, method, generation.chosen_logits)
    assert agreement.tokens == 15
    ours, truth, other = first_logits(engine, method), first_logits(exact, method), first_logits(exact, "base")
    likeness = torch.cosine_similarity(ours, truth).tolist()
    assert min(likeness) > 0.9, f"cosine similarity of the logits {likeness}"
    if method != "base":  # nearer to the adapter's answer than to the base model's
        assert torch.cosine_similarity(ours[:1], other[:1]).item() < likeness[0]


@pytest.mark.parametrize("method", ["flora-modulate", "merged"])
def test_quantised_weights_cannot_be_modulated_or_merged(method, quantised):
    engine, _ = quantised
    with pytest.raises(AdapterError, match=r"layer transformer\.h\.\d.* is quantised \(.*\) and has no plain weight: use flora, "):
        engine.generate(QUANTISED_BATCH, method)
    assert not engine.bank._users
    with pytest.raises(AdapterError, match="is quantised"):
        engine.validate(QUANTISED_BATCH[0], method)
