"""FloraConfig, how an adapter starts and what that start can learn, and how the method joins PEFT's."""

from __future__ import annotations

import enum
import json
from pathlib import Path

import peft
import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from flora import AdapterError, FloraConfig, ops
from flora.tuner import FloraModel, initial_factors
from flora.tuner.registration import TESTED, add_member, register

RANK, WIDTH = 4, 24

# ------------------------------------------------------------------------------------------------------- configuration


def test_config_survives_saving(tmp_path):
    options = {
        "r": 2,
        "init": "noise",
        "init_std": 0.3,
        "target_modules": ["c_attn", "c_proj"],
        "exclude_modules": ["lm_head"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "h",
        "rank_pattern": {"c_proj": 5},
        "modules_to_save": ["ln_f"],
        "task_type": "CAUSAL_LM",
    }
    FloraConfig(**options).save_pretrained(tmp_path)
    for loaded in (FloraConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, FloraConfig) and loaded.peft_type == "FLORA"
        assert {name: getattr(loaded, name) for name in options} == options
        assert loaded.combine == "mean", "the file does not say how components combine"


def test_the_file_is_the_same_every_time(tmp_path):
    """PEFT makes sets of what it finds, and a set of names has another order in every process."""
    config = FloraConfig()
    config.target_modules = {"v_proj", "q_proj", "fc1", "out_proj", "fc2", "k_proj"}
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]


def test_what_is_left_open_fits_the_start():
    chosen = {init: FloraConfig(init=init) for init in ("identity", "noise", "ones")}
    assert {init: config.combine for init, config in chosen.items()} == {"identity": "sum", "noise": "mean", "ones": "mean"}
    assert {init: config.init_std for init, config in chosen.items()} == {"identity": 1.0, "noise": 0.1, "ones": 0.0}
    assert FloraConfig().init == "identity"
    assert FloraConfig(init="noise", combine="sum", init_std=0.0).combine == "sum"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "rank 0 is not possible: r must be"),
        ({"r": 2.0}, "rank 2.0 is not possible"),
        ({"rank_pattern": {"fc1": -1}}, r"rank -1 is not possible: rank_pattern\['fc1'\] must be"),
        ({"init": "zeros"}, "init 'zeros' is unknown: choose one of identity, noise, ones"),
        ({"init_std": -1.0}, "init_std -1.0 is not possible"),
        ({"init_std": float("nan")}, "init_std nan is not possible"),
        ({"combine": "product"}, "combine 'product' is unknown"),
        ({"target_modules": ".*fc1", "layers_to_transform": [1]}, "give target_modules as a list"),
        ({"layers_pattern": "h"}, "layers_pattern says where layers_to_transform counts"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(AdapterError, match=message):
        FloraConfig(**options)


# ----------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize("rank", [1, 3])
def test_identity_start_is_the_base_layer(rank, combine):
    A, B = initial_factors(FloraConfig(r=rank, combine=combine), 5, 7, torch.Generator().manual_seed(0))
    assert A.shape == (rank, 5) and B.shape == (rank, 7)
    scale = 1.0 / rank if combine == "mean" else 1.0
    weight = torch.randn(7, 5)
    difference = (ops.merge_flora(weight, A, scale * B) - weight).abs().max().item()
    assert difference < 1e-6, f"max_diff {difference}"


@pytest.mark.parametrize("init, deviation", [("identity", 2.0), ("noise", 2.0), ("ones", 0.0)])
def test_init_std_is_the_deviation_of_the_random_part(init, deviation):
    A, B = initial_factors(FloraConfig(r=3, init=init, init_std=2.0), 5000, 5000, torch.Generator().manual_seed(0))
    assert A[1:].std().item() == pytest.approx(deviation, rel=0.05)
    assert B[1:].std().item() == pytest.approx(deviation if init == "noise" else 0.0, rel=0.05)


class Task:
    """Regression on a linear layer whose weight was modulated by a matrix of rank 4."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(WIDTH, WIDTH, generator=generator)
        target_A, target_B = (torch.randn(RANK, WIDTH, generator=generator) for _ in range(2))
        self.target = ops.merge_flora(self.weight, target_A, target_B)
        self.x = torch.randn(256, WIDTH, generator=generator)

    def train(self, config: FloraConfig, steps: int = 300) -> tuple[PeftModel, float]:
        """The model and its last loss."""
        torch.manual_seed(1)
        base = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
        base[0].weight.data.copy_(self.weight)
        model = get_peft_model(base, config)
        optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=3e-2)
        for _ in range(steps):
            loss = (model(self.x) - self.x @ self.target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.equal(model.base_model.model[0].base_layer.weight, self.weight), "the base weight was trained too"
        return model, loss.item()


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, int], tuple[PeftModel, float]]:
    task = Task()
    runs = [("identity", RANK), ("identity", 1), ("noise", RANK), ("ones", RANK), ("ones", 1)]
    return {(init, rank): task.train(FloraConfig(r=rank, init=init, target_modules=["0"])) for init, rank in runs}


def independent_components(model: PeftModel) -> tuple[int, int]:
    """The numerical rank of the components (A_k, B_k) as vectors, and of the modulation Bᵀ A that they make together."""
    layer = model.base_model.model[0]
    A, B = (side["default"].detach().double() for side in (layer.flora_A, layer.flora_B))
    ranks = []
    for matrix in (torch.cat([A, B], dim=1), B.T @ A):
        values = torch.linalg.svdvals(matrix)
        ranks.append(int((values > 1e-3 * values[0]).sum()))
    return tuple(ranks)


@pytest.mark.parametrize("init", ["identity", "noise"])
def test_a_trained_rank_4_adapter_has_4_components(init, trained):
    model, loss = trained[init, RANK]
    assert independent_components(model) == (RANK, RANK)
    _, loss_of_rank_one = trained["identity", 1]
    assert loss < 0.3 * loss_of_rank_one, f"rank 4 ends at {loss}, rank 1 at {loss_of_rank_one}"


def test_all_ones_stays_at_rank_one(trained):
    """The trap of the paper's released code: equal components get equal gradients for ever."""
    model, loss = trained["ones", RANK]
    assert independent_components(model) == (1, 1)
    _, loss_of_rank_one = trained["ones", 1]
    assert loss > 0.95 * loss_of_rank_one, f"all ones ends at {loss} with rank 4, at {loss_of_rank_one} with rank 1"
    assert loss > 3 * trained["identity", RANK][1]


# -------------------------------------------------------------------------------------------------------- registration


def test_the_range_of_versions_is_the_requirements():
    """What a message tells people to install, what pip installs for them, and what runs here."""
    lines = (Path(__file__).parents[2] / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (required,) = [Requirement(line) for line in lines if line.startswith("peft")]
    assert required.specifier == SpecifierSet(TESTED) and peft.__version__ in required.specifier


def test_the_type_is_found_as_any_of_pefts():
    assert PeftType("FLORA") is PeftType["FLORA"] is PeftType.FLORA
    assert PeftType.FLORA in list(PeftType) and PeftType.FLORA == "FLORA" and PeftType.FLORA.value == "FLORA"
    assert str(PeftType.FLORA) == "PeftType.FLORA" and json.dumps(PeftType.FLORA) == '"FLORA"'
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING["FLORA"] is FloraConfig and peft.PEFT_TYPE_TO_TUNER_MAPPING["FLORA"] is FloraModel


def test_pefts_own_types_are_untouched():
    assert PeftType("LORA") is PeftType.LORA and PeftType.LORA.name == "LORA"
    assert len(set(PeftType)) == len(list(PeftType)) == len(PeftType.__members__)
    with pytest.raises(ValueError):
        PeftType("FLORAL")


def test_an_enum_takes_a_member():
    class Colour(str, enum.Enum):
        RED = "RED"

    add_member(Colour, "BLUE")
    add_member(Colour, "BLUE")
    assert [colour.name for colour in Colour] == ["RED", "BLUE"]
    assert Colour("BLUE") is Colour["BLUE"] is Colour.BLUE and isinstance(Colour.BLUE, Colour)
    assert {Colour.BLUE: 1}["BLUE"] == 1, "a lookup by the plain string, as a file gives it, misses"


@pytest.fixture
def unregistered(monkeypatch):
    """PEFT's tables as they are before `register`."""
    for table in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        monkeypatch.delitem(getattr(peft.mapping, table), "FLORA")


def test_registering_fills_pefts_tables(unregistered):
    register(FloraConfig, FloraModel)
    assert peft.PEFT_TYPE_TO_TUNER_MAPPING["FLORA"] is FloraModel


def test_a_peft_without_the_tables_is_named(unregistered, monkeypatch):
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_TUNER_MAPPING")
    with pytest.raises(
        ImportError, match=rf"cannot join the methods of peft {peft.__version__} \(ImportError: .*install peft>=0.18"
    ):
        register(FloraConfig, FloraModel)


def test_a_peft_that_does_not_fill_the_tables_is_named(unregistered, monkeypatch):
    monkeypatch.setattr(peft.utils, "register_peft_method", lambda **_: None)
    with pytest.raises(ImportError, match=r"its tables of methods are not where they were\): install peft>=0.18,<0.22$"):
        register(FloraConfig, FloraModel)


def test_a_peft_whose_types_are_no_enum_is_named(unregistered, monkeypatch):
    monkeypatch.setattr(peft, "PeftType", type("PeftType", (str,), {}))
    with pytest.raises(ImportError, match="AttributeError"):
        register(FloraConfig, FloraModel)


def test_a_peft_with_a_method_of_that_name_is_named():
    with pytest.raises(ImportError, match=r"\(KeyError: .*already.*flora.*\): install peft"):
        register(FloraConfig, FloraModel)
