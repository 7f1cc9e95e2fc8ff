"""What `python -m profiling oplab` does with its options."""

from __future__ import annotations

import argparse

import torch
from tqdm import tqdm

from flora.errors import RequestError
from flora.models import choose_device
from profiling import hardware, report
from profiling.calibration import machine_costs
from profiling.cost_model import METHODS, LayerShape, MachineCosts, predict
from profiling.document import text_table
from profiling.load_command import interruptible
from profiling.loading import set_threads
from profiling.op_lab import DTYPES, OpLabResult, Setting, checked_methods, measure
from profiling.op_lab_grid import GRID_MODELS, grid, measure_grid, summary
from profiling.op_lab_report import batch_words, milliseconds, report_of


def run(options: argparse.Namespace) -> int:
    """Measure, print and write; 0 for done, 1 where a method is wrong, 130 when interrupted. Raises a FloraError for bad input."""
    set_threads(options.threads)
    report.check(options)
    methods = checked_methods(options.methods or METHODS)
    settings = _settings(options)
    device = choose_device(options.device)
    said = report.said(options)
    facts = hardware.environment() | {"device": device.type, "device_name": hardware.device_name(device)}
    print(hardware.summary(facts), end="\n\n", file=said, flush=True)
    with interruptible() as interrupts:
        costs = machine_costs(device, getattr(torch, settings[0].dtype), options.fresh)
        if options.dry_run:
            print(_predicted(settings, methods, costs), file=said)
            return 0
        results: list[OpLabResult] = []
        bar = tqdm(total=len(settings), leave=False, disable=None, unit="point")
        if options.grid:
            for result in measure_grid(settings, device, costs, methods, report.own_command(), lambda: bool(interrupts)):
                results.append(result)
                bar.update()
        else:
            found = measure(settings[0], device, costs, methods, report.own_command(), options.seconds, lambda: bool(interrupts))
            results += [] if found is None else [found]
        bar.close()
    if results:
        found = summary(results) if options.grid else None
        report.deliver(report_of(results, report.own_command(), found), options)
    if interrupts:
        return 130
    return 0 if all(point.agrees for result in results for point in result.methods.values()) else 1


def _settings(options: argparse.Namespace) -> list[Setting]:
    """What the options ask to be measured; RequestError for what makes no sense."""
    if options.dtype not in DTYPES:
        raise RequestError(f"--dtype takes {', '.join(DTYPES)}, not {options.dtype!r}")
    if not options.seconds > 0 or options.seconds == float("inf"):
        raise RequestError(f"--seconds must be a number above 0, not {options.seconds:g}")
    if not 0 <= options.seed < 2**63:
        raise RequestError(f"--seed must be from 0 to {2**63 - 1}, not {options.seed}")
    widths = (options.d_in, options.d_out)
    if options.grid:
        if widths != (None, None) or options.layer:
            raise RequestError("--grid has layers of its own: give --model, or leave it out for all of them")
        return grid([options.model] if options.model else GRID_MODELS, options.dtype, seed=options.seed)
    sizes = {name: getattr(options, name) for name in ("rows", "length", "rank")}
    sizes["adapters"] = options.rows if options.adapters is None else options.adapters
    if widths == (None, None):
        return [Setting.of_model(options.model or GRID_MODELS[0], options.layer, options.dtype, options.seed, **sizes)]
    if options.model or options.layer or None in widths:
        raise RequestError("give --d-in and --d-out together, or --model and --layer instead")
    return [Setting(LayerShape(options.d_in, options.d_out, **sizes), options.dtype, seed=options.seed)]


def _predicted(settings: list[Setting], methods: tuple[str, ...], costs: MachineCosts) -> str:
    """What every method should take, where nothing is measured."""
    lines = []
    for setting in settings:
        times = [milliseconds(predict(method, setting.shape, costs).seconds) for method in methods]
        lines.append([setting.name, batch_words(setting.shape), *times])
    return "predicted ms, nothing was measured\n" + text_table(("layer", "batch", *methods), lines)
