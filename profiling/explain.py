"""Why one method's decode step costs what it costs, in words: the rows and products that a step sends through a layer."""

from __future__ import annotations

from profiling.comparison import ComparisonResult
from profiling.figures import METHOD_STYLES

EXPANDING = ("flora", "flora-expand")  # a decode step has a row or two per adapter: `flora` expands there


def why(result: ComparisonResult) -> str:
    """A few sentences on the two first methods, plain text; empty where nothing was measured."""
    if len(result.methods) < 2:
        return ""
    said = [words for method in list(result.methods)[:2] if (words := _work(result, method))]
    expanded = [method for method in list(result.methods)[:2] if method in EXPANDING and max(result.methods[method].ranks) > 1]
    if expanded:
        said.append(
            "Extra rows are nearly free where a step waits for the weights to be read (a GPU, half precision), "
            "and cost arithmetic where it does not (a CPU in float32)."
        )
    return " ".join(["Why: in a decode step,", *said]) if said else ""


def _work(result: ComparisonResult, method: str) -> str:
    """What a decode step of one method sends through every adapted layer."""
    label = METHOD_STYLES[method].label
    ranks = sorted({rank for rank in result.methods[method].ranks if rank})
    rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "0"
    adapters = len({row["adapter"] for row in result.rows if row["adapter"]})
    if not ranks or method == "base":
        return f"{label} sends one row per request through every layer."
    if method in EXPANDING:
        rows = "one row" if rank == "1" else f"{rank} rows"
        return f"{label} at rank {rank} sends {rows} per request through every layer, scaled before and after."
    if method == "flora-modulate":
        return f"{label} forms a weight of its own in every layer for each of the {adapters} adapters."
    if method == "bmm-lora":
        return f"{label} sends one row per request through every layer and adds two small batched products of rank {rank}."
    if method == "mixed":
        return f"{label} sends one row per request through every layer, one per component where it multiplies, and adds LoRA."
    if method == "loop-lora":
        return f"{label} sends one row per request through every layer and adds two small products for each adapter."
    if method == "sgmv-lora":
        return f"{label} sends one row per request through every layer and adds two products over its rows in adapter order."
    return f"{label} runs the whole model once for each of the {adapters} adapters, its weights merged."
