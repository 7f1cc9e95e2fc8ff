"""fLoRA's two exact forms, one layer at a time: when is each cheaper, and does `flora` choose well?

For each width, number of tokens per adapter and rank, one call of the bare layer, of `flora-expand`, of `flora-modulate` and of
`flora` are timed in turn, round after round, on the same tensors. A method's figure is the median over rounds of its time over
the bare layer's.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import linear
from tqdm import tqdm

from flora import ops
from flora.cost import cheaper_form
from flora.errors import RequestError
from flora.models import choose_device
from profiling import hardware, report
from profiling.timing import median, timed

FORMS = ("flora-expand", "flora-modulate", "flora")


@dataclass(frozen=True)
class FormPoint:
    """One setting and what it measured. Ratios are to the bare layer's time."""

    dtype: str
    width: int  # d_in = d_out
    adapters: int  # rows of the batch, each with an adapter of its own
    tokens: int  # per adapter
    rank: int
    rounds: int
    base_s: float
    expand: float
    modulate: float
    flora: float
    chosen: str

    @property
    def slower_form(self) -> float:
        return max(self.expand, self.modulate)

    def as_dict(self) -> dict:
        return asdict(self)


def measure(
    widths: Sequence[int],
    tokens: Sequence[int],
    ranks: Sequence[int],
    dtypes: Sequence[torch.dtype],
    adapters: int = 4,
    rounds: int = 9,
    device: str = "cpu",
    seed: int = 0,
) -> Iterator[FormPoint]:
    """Measure every combination; one `FormPoint` as each is done. tokens: per adapter; adapters: distinct ones in the batch."""
    generator = torch.Generator(device).manual_seed(seed)
    for dtype, width, length, rank in itertools.product(dtypes, widths, tokens, ranks):
        x = torch.randn(adapters, length, width, generator=generator, device=device).to(dtype)
        weight = torch.randn(width, width, generator=generator, device=device).to(dtype)
        A = torch.randn(adapters, rank, width, generator=generator, device=device).to(dtype)
        B = torch.randn(adapters, rank, width, generator=generator, device=device).to(dtype)
        routing = ops.route(range(adapters), [rank] * adapters, rank, device)
        calls = {"base": lambda x=x, weight=weight: linear(x, weight)}
        for form in FORMS:
            function = ops.function_of(form)
            calls[form] = lambda f=function, x=x, w=weight, A=A, B=B, r=routing: f(x, w, A, B, r.slots, None, r)
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            for round_number in range(-2, rounds):  # two rounds of warm-up
                for name, call in calls.items():
                    _, taken = timed(call, torch.device(device))
                    if round_number >= 0:
                        seconds[name].append(taken)
        relative = {form: median([a / b for a, b in zip(seconds[form], seconds["base"], strict=True)]) for form in FORMS}
        yield FormPoint(
            dtype=str(dtype).removeprefix("torch."),
            width=width,
            adapters=adapters,
            tokens=length,
            rank=rank,
            rounds=rounds,
            base_s=median(seconds["base"]),
            expand=relative["flora-expand"],
            modulate=relative["flora-modulate"],
            flora=relative["flora"],
            chosen=cheaper_form([(length, rank)] * adapters, dtype.itemsize, torch.device(device).type),
        )


def verdict(points: Sequence[FormPoint], tolerance: float = 0.1) -> list[str]:
    """Sentences on the whole grid: is `flora` ever slower than the slower form, and what does it choose for long prefills?

    tolerance: by how much one median may exceed another and count as equal, since the same code ran twice.
    """
    slower = [point for point in points if point.flora > point.slower_form * (1 + tolerance)]
    long = [point for point in points if point.tokens >= 64 and point.rank >= 8]
    modulated = [point for point in long if point.chosen == "flora-modulate"]
    loss = median([point.flora / min(point.expand, point.modulate) for point in points])
    return [
        f"flora slower than the slower of its forms: in {len(slower)} of {len(points)} settings",
        f"prefill of 64 or more tokens per adapter at rank 8 or more: modulate chosen in {len(modulated)} of {len(long)}",
        f"flora over the faster form, median: {loss:.2f}",
    ]


def table(points: Sequence[FormPoint]) -> str:
    """The grid as aligned text: time over the bare layer's, and which form `flora` chose."""
    head = f"{'dtype':>9} {'width':>6} {'tokens':>7} {'rank':>5} {'base ms':>9} {'expand':>8} {'modulate':>9} {'flora':>7}  chosen"
    lines = [
        f"{p.dtype:>9} {p.width:>6} {p.tokens:>7} {p.rank:>5} {1e3 * p.base_s:>9.3f} {p.expand:>8.2f} {p.modulate:>9.2f} "
        f"{p.flora:>7.2f}  {p.chosen.removeprefix('flora-')}"
        for p in points
    ]
    return "\n".join([head, *lines])


def run(options: argparse.Namespace) -> int:
    """What `python -m profiling forms` does. Raises a FloraError for bad input."""
    for name in ("widths", "tokens", "ranks", "adapters", "rounds", "threads"):
        values = getattr(options, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            raise RequestError(f"--{name} must be at least 1")
    dtypes = [getattr(torch, name, None) for name in options.dtypes]
    if not all(dtype in (torch.float32, torch.bfloat16, torch.float16) for dtype in dtypes):
        raise RequestError(f"--dtypes takes float32, bfloat16 and float16, not {' '.join(options.dtypes)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    facts = hardware.environment() | {"device": device.type, "device_name": hardware.device_name(device)}
    print(hardware.summary(facts), end="\n\n")
    num_points = len(dtypes) * len(options.widths) * len(options.tokens) * len(options.ranks)
    settings = (options.widths, options.tokens, options.ranks, dtypes, options.adapters, options.rounds, str(device))
    points = list(tqdm(measure(*settings), total=num_points, leave=False, disable=None, unit="setting"))
    print(table(points), end="\n\n")
    print(*verdict(points), sep="\n")
    if options.json:
        shared = {"seed": 0, "hardware": facts, "command": report.own_command()}
        rows = [json.dumps(point.as_dict() | shared, ensure_ascii=False) for point in points]
        report.write_text(options.json, "\n".join(rows) + "\n")
    return 0
