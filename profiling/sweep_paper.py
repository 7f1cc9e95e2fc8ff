"""What the paper reports of speed by rank, and how far a sweep's set-up is the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from profiling.sweep_points import LATENCY, STEP_TIME, THROUGHPUT, Measure

SOURCE = "Batched Low-Rank Adaptation of Foundation Models, Figures 2 and 3; read off plots where they say about"


AT_ONCE = Measure(THROUGHPUT, math.inf)


@dataclass(frozen=True)
class PaperFigure:
    """One panel. models: short names. crossover: the rank at which bmm-LoRA overtakes, in the paper's words."""

    figure: str
    models: tuple[str, ...]
    measure: Measure
    crossover: str
    says: str


FIGURES = (
    PaperFigure(
        "2, left",
        ("starcoder",),
        AT_ONCE,
        "8",
        "rank 1: more than 3 times bmm-LoRA's throughput, rank 2: about 2.5 times",
    ),
    PaperFigure("2, left", ("starcoderbase-3b", "starcoderbase-1b"), AT_ONCE, "above 8", "later than at 15B"),
    PaperFigure(
        "2, right",
        ("starcoder",),
        Measure(LATENCY, 8.0),
        "about 6",
        "ranks 1 to 8: about 0.35 0.45 0.65 1.0 1.35 1.8 2.2 2.5 s/token, bmm-LoRA about 1.8",
    ),
    PaperFigure("3, left", ("llama-2-13b", "llama-2-7b"), AT_ONCE, "about 6", "earlier than StarCoder 15B"),
    PaperFigure("3, right", ("starcoderbase-3b",), Measure(LATENCY, 15.0), "about 12", "at 15 requests/s"),
    PaperFigure("3, right", ("starcoderbase-3b",), Measure(LATENCY, 8.0), "below 12", "at 8 requests/s, earlier than at 15"),
)

SET_UP = "one H100, vLLM, float16, 1,000 requests of 50 to 2,000 tokens"


def figures_for(model: Mapping[str, Any], measures: Sequence[Measure]) -> list[PaperFigure]:
    """Those panels whose model and measure a sweep has. model: as `hardware.model_facts` describes it."""
    name = str(model.get("name", "")).lower().rpartition("/")[2]
    return [one for one in FIGURES if any(short == name for short in one.models) and one.measure in measures]


def differences(model: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
    """What is not as in the paper, in words; empty where the machine and the precision are."""
    said = []
    device = str(environment.get("device_name", "an unknown device"))
    if "H100" not in device:
        said.append(f"{device[:60]} instead of an H100")
    if model.get("dtype") != "float16" or model.get("quantize"):
        said.append(f"{model.get('quantize') or model.get('dtype')} instead of float16")
    if model.get("weights") == "random":
        said.append("random weights")
    return said


def beside(model: Mapping[str, Any], environment: Mapping[str, Any], measures: Sequence[Measure]) -> str:
    """The paper's figures where the set-up is its own, and in any case how far it is not; a few sentences."""
    matching = figures_for(model, measures)
    if not matching:
        reason = (
            "its figures are of StarCoder and Llama-2"
            if any(measure.name != STEP_TIME for measure in measures)
            else "it has no figure of step times: measure throughput, or latency at 8 or 15 requests/s"
        )
        return (
            f"The paper measured nothing that compares with this ({reason}; {SET_UP}). For orientation: it found fLoRA ahead of "
            "bmm-LoRA with StarCoder 15B below rank 8, with Llama-2 below about 6, with StarCoderBase 3B at 15 requests/s below "
            "about 12."
        )
    found = "; ".join(f"Figure {one.figure}: bmm-LoRA overtakes at rank {one.crossover} ({one.says})" for one in matching)
    not_as = differences(model, environment)
    caution = f" Not the same here: {', '.join(not_as)}." if not_as else ""
    return f"The paper, same model and measure ({SET_UP}): {found}.{caution}"
