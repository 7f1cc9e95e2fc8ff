"""The measuring command line: `python -m profiling compare|load|sweep|kernels|forms|targets …`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from profiling.options import add_base_model_check, add_weights

COMMANDS = {
    "compare": "profiling.compare_command",
    "load": "profiling.load_command",
    "sweep": "profiling.sweep_command",
    "kernels": "profiling.kernels_command",
    "forms": "profiling.forms",
    "int8": "profiling.int8",
    "targets": "profiling.dashboard.targets",
    "serving": "profiling.serving",
    "soak": "profiling.soak",
    "hardware": "profiling.peaks",
    "oplab": "profiling.op_lab_command",
    "agreement": "profiling.agreement",
    "gpu": "profiling.gpu.command",
}
"""Sub-command → the module whose `run(options)` does it, imported once it is asked for."""

REPORT_HELP = "write a report; the suffix says which: .html, a page that needs nothing else, .md, .csv or .jsonl"


class _Parser(argparse.ArgumentParser):
    """Bad input: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m profiling", description="Measure fLoRA beside other ways to serve many adapters at once.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        help="methods side by side on one batch, their steps taking turns",
        description="Run one batch under several methods, paired and interleaved, and print what each did. "
        "Without --batch or --row: the ready batch, four code prompts and four clips with an adapter each.",
    )
    compare.add_argument("--methods", nargs="+", default=["flora", "bmm-lora"], metavar="METHOD", help="default: flora bmm-lora")
    compare.add_argument(
        "--base",
        action="store_true",
        help="take part with the bare base model too: each decode step relative to its step",
    )
    _add_models(compare)
    compare.add_argument("--batch", metavar="FILE", help="JSON or JSONL rows {prompt or audio, adapter, max_new_tokens}")
    compare.add_argument("--row", action="append", metavar="JSON", help="one such row; may be given many times")
    compare.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="for rows that do not say; default: 48")
    compare.add_argument("--warmup", type=int, default=5, metavar="STEPS", help="decode steps before the clocks start; default: 5")
    compare.add_argument("--repeats", type=int, default=1, metavar="N", help="generate the batch so often; default: 1")
    compare.add_argument("--seed", type=int, default=0, metavar="N")
    _add_machine(compare)
    compare.add_argument("--json", metavar="FILE", help="write a JSONL row per method and kind")
    compare.add_argument("--report", metavar="FILE", help=REPORT_HELP)
    _add_load(commands)
    _add_sweep(commands)
    _add_kernels(commands)
    _add_forms(commands)
    _add_int8(commands)
    _add_targets(commands)
    _add_serving(commands)
    _add_soak(commands)
    _add_hardware(commands)
    _add_op_lab(commands)
    _add_agreement(commands)
    _add_gpu(commands)
    return parser


def _add_models(command: argparse.ArgumentParser, with_adapters: bool = True) -> None:
    """Which models, and which adapters of them."""
    for kind in ("code", "speech"):
        command.add_argument(
            f"--{kind}-model", metavar="MODEL", help=f"folder, hub id or short name; default: the embedded {kind} one"
        )
        if with_adapters:
            command.add_argument(
                f"--{kind}-adapters",
                nargs="+",
                metavar="TAG=FOLDER",
                help="a tag may be given twice, once per family; default: the adapters that ship",
            )
    if with_adapters:
        add_base_model_check(command)
    add_weights(command)


def _add_machine(command: argparse.ArgumentParser) -> None:
    """Where and how it computes."""
    command.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps; default: auto")
    command.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16; default: auto")


def _add_load(commands: argparse._SubParsersAction) -> None:
    load = commands.add_parser(
        "load",
        help="an engine under load: requests arrive at a rate, each method is given the same",
        description="Send requests to the engine as clients would, give every method the same ones at the same times, one method "
        "after the other, and print latencies, throughput and queue. Without options: 200 of the corpus' held-out prompts at "
        "the paper's 8 requests a second.",
    )
    load.add_argument("--methods", nargs="+", default=["flora", "bmm-lora"], metavar="METHOD", help="default: flora bmm-lora")
    _add_models(load)
    arrivals = load.add_argument_group("arrivals")
    arrivals.add_argument("--rate", type=float, metavar="N", help="requests a second, inf: all at once; default: 8")
    _add_burstiness(arrivals)
    arrivals.add_argument("--concurrency", type=int, metavar="N", help="instead of a rate: N requests at a time, a closed loop")
    arrivals.add_argument("--requests", type=int, metavar="N", help="of each run; default: 200")
    arrivals.add_argument("--duration", type=float, metavar="SECONDS", help="of each run, instead of a number of requests")
    asked = load.add_argument_group("what is asked")
    _add_lengths(asked)
    asked.add_argument("--prompts", metavar="FILE", help="JSON or JSONL rows {prompt or audio, max_new_tokens} to ask instead")
    asked.add_argument("--mix", default="code", metavar="SHARES", help="such as code=0.8,speech=0.2; default: code")
    asked.add_argument(
        "--popularity",
        default="zipf:1.5",
        metavar="NAME",
        help="identical, distinct, uniform, zipf:1.5 or skewed, as Punica defines them, or power:1.5, a power law over all "
        "adapters; default: zipf:1.5",
    )
    asked.add_argument(
        "--adapters",
        type=int,
        metavar="N",
        help="how many to ask for, uniform then over all of them; random ones where there are fewer; default: those there are, "
        "uniform then over as many as the square root of the requests",
    )
    asked.add_argument(
        "--rank", type=int, metavar="R", help="ask for random adapters only, of this rank; default: 4 for random ones"
    )
    asked.add_argument(
        "--adapter-folder",
        metavar="FOLDER",
        help="write random adapters there, to be read again from disk; default: kept in memory",
    )
    engine = load.add_argument_group("engine")
    engine.add_argument("--adapter-slots", type=int, default=64, metavar="N", help="adapters on the device at once; default: 64")
    engine.add_argument(
        "--host-adapters-mb", type=int, default=2048, metavar="MB", help="of adapters kept in memory besides; default: 2048"
    )
    engine.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        help="requests that may wait, more are refused; default: 256, or all that come at once",
    )
    _add_batch(engine)
    _add_machine(engine)
    measuring = load.add_argument_group("measuring")
    measuring.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count the requests that keep every limit: ttft, tpot, e2e in milliseconds, such as ttft:500 tpot:50",
    )
    _add_measuring(measuring)
    output = load.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write a JSONL row per method and kind; - for standard output")
    output.add_argument("--csv", metavar="FILE", help="write the same figures as a table")
    output.add_argument("--per-request", metavar="FILE", help="write a table with a line per request")
    output.add_argument("--report", metavar="FILE", help=REPORT_HELP)


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="step time, throughput and latency by rank, with random adapters: where fLoRA stops winning",
        description="For each rank, serve requests with random adapters of it: one full batch for the step time, paired step by "
        "step; all requests at once for throughput; at a rate for latency; the methods in turn. The shape of the paper's Figures 2 "
        "and 3.",
    )
    sweep.add_argument("--methods", nargs="+", default=["flora", "bmm-lora"], metavar="METHOD", help="default: flora bmm-lora")
    _add_models(sweep, with_adapters=False)
    asked = sweep.add_argument_group("what is asked")
    asked.add_argument("--kind", choices=("code", "speech"), default="code", help="of the model; default: code")
    asked.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="R", help="default: 1 2 4 8 16")
    measures = ["step", "throughput", "latency"]
    asked.add_argument("--measures", nargs="+", default=measures, metavar="MEASURE", help=f"default: {' '.join(measures)}")
    asked.add_argument("--steps", type=int, default=32, metavar="N", help="new tokens of a row whose steps are timed; default: 32")
    asked.add_argument(
        "--rate",
        nargs="+",
        default=["8", "15"],
        metavar="N",
        help="requests a second at which latency is measured, or auto: half and four fifths of what the slowest method served at "
        "the lowest rank; default: 8 15, the paper's",
    )
    _add_burstiness(asked)
    asked.add_argument("--requests", type=int, default=100, metavar="N", help="of each run; default: 100, the paper's were 1000")
    _add_lengths(asked)
    asked.add_argument("--popularity", default="distinct", metavar="NAME", help="of the adapters, as in load; default: distinct")
    asked.add_argument("--adapters", type=int, default=8, metavar="N", help="random ones of each rank; default: 8")
    engine = sweep.add_argument_group("engine")
    _add_batch(engine)
    _add_machine(engine)
    _add_measuring(sweep.add_argument_group("measuring"))
    output = sweep.add_argument_group("output")
    output.add_argument(
        "--resume",
        metavar="FILE",
        help="keep the points that FILE holds, measure those it lacks, and write each there as it comes; it need not exist yet",
    )
    output.add_argument("--json", metavar="FILE", help="write a JSONL row per rank, measure and method; - for standard output")
    output.add_argument("--csv", metavar="FILE", help="write the same figures as a table")
    output.add_argument("--report", metavar="FILE", help=REPORT_HELP)


def _add_burstiness(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="SHAPE",
        help="of the gamma distribution of the times between arrivals, as in vLLM's bench serve; 1 is a Poisson process, "
        "less comes in bursts; default: 1",
    )


def _add_lengths(group: argparse._ArgumentGroup) -> None:
    """How long prompts and answers are."""
    group.add_argument(
        "--prompt-tokens",
        default="given",
        metavar="LENGTHS",
        help="given (as they are), N, uniform:FEWEST-MOST, normal:MEAN,STD or lognormal:MEAN,STD; default: given",
    )
    group.add_argument(
        "--new-tokens",
        default="uniform:16-64",
        metavar="LENGTHS",
        help="the same; given: as many as the known answer has; default: uniform:16-64",
    )


def _add_batch(group: argparse._ArgumentGroup) -> None:
    """How much runs at once."""
    group.add_argument("--max-batch-size", type=int, default=32, metavar="N", help="requests that run at once; default: 32")
    group.add_argument("--max-batch-tokens", type=int, default=2048, metavar="N", help="read and written in a step; default: 2048")


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    """How runs are repeated, and when one ends early."""
    group.add_argument("--warmup", type=int, default=16, metavar="N", help="requests before each run, not counted; default: 16")
    group.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of each method, in turns; default: 1")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    group.add_argument(
        "--no-saturation-stop",
        action="store_true",
        help="go on where queue and TTFT both grow significantly, so that the numbers tell only how long the run was",
    )


def _add_kernels(commands: argparse._SubParsersAction) -> None:
    kernels = commands.add_parser(
        "kernels",
        help="prefill and decode steps of two or more methods under torch.profiler: which kernels, how long, what instead",
        description="Profile steps of each method on one batch, in turn, with ranges by phase and layer, and print where their "
        "time went and what one launches instead of another. On a CPU, operators are the kernels. Or open a trace that was "
        "recorded elsewhere.",
    )
    kernels.add_argument("--methods", nargs="+", default=["flora", "bmm-lora"], metavar="METHOD", help="default: flora bmm-lora")
    _add_models(kernels)
    asked = kernels.add_argument_group("what is profiled")
    asked.add_argument("--kind", choices=("code", "speech"), default="code", help="of the model; default: code")
    asked.add_argument("--rows", type=int, default=8, metavar="N", help="of the batch, each with an adapter; default: 8")
    asked.add_argument("--rank", type=int, metavar="R", help="with random adapters of this rank; default: the model's adapters")
    asked.add_argument("--prefills", type=int, default=4, metavar="N", help="of each method; default: 4")
    asked.add_argument("--steps", type=int, default=8, metavar="N", help="decode steps of each method; default: 8")
    asked.add_argument("--warmup", type=int, default=3, metavar="STEPS", help="decode steps before, not measured; default: 3")
    asked.add_argument(
        "--captured",
        action="store_true",
        help="profile decode steps as they are served: captured, and without what tells of each layer; default: through each layer",
    )
    _add_machine(kernels)
    kernels.add_argument("--open", metavar="TRACE", help="a Chrome trace, .json or .json.gz, to be read instead of recording one")
    output = kernels.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write a JSONL row per phase and method; - for standard output")
    output.add_argument("--report", metavar="FILE", help=REPORT_HELP)
    output.add_argument("--trace", metavar="FILE", help="write the Chrome trace, .json or .json.gz, which ui.perfetto.dev opens")
    output.add_argument("--tensorboard", metavar="FOLDER", help="write a run for TensorBoard's profiler plugin: make tensorboard")


def _add_forms(commands: argparse._SubParsersAction) -> None:
    forms = commands.add_parser(
        "forms",
        help="fLoRA's two exact forms on one layer: when is each cheaper, and does flora choose well",
        description="Time flora-expand, flora-modulate and flora against the bare layer, in turn, over a grid of settings.",
    )
    forms.add_argument("--widths", nargs="+", type=int, default=[192, 768, 2048], metavar="D", help="d_in = d_out")
    forms.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256], metavar="N", help="per adapter")
    forms.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="R")
    forms.add_argument("--adapters", type=int, default=4, metavar="N", help="distinct ones in the batch; default: 4")
    forms.add_argument("--dtypes", nargs="+", default=["float32"], metavar="DTYPE", help="float32, bfloat16; default: float32")
    forms.add_argument("--rounds", type=int, default=9, metavar="N", help="each setting is measured so often; default: 9")
    forms.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    forms.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    forms.add_argument("--json", metavar="FILE", help="write a JSONL row per setting")


def _add_int8(commands: argparse._SubParsersAction) -> None:
    parts = ["cost", "batch"]
    int8 = commands.add_parser(
        "int8",
        help="the methods in 8 bits: what they cost over the bare layer, by rank, and what depends on the batch",
        description="Time flora and bmm-lora against the bare layer, all on bitsandbytes' 8-bit weights and in turn, by rank; and "
        "run the embedded models' requests alone and together. Both with bitsandbytes' threshold of outliers and without.",
    )
    int8.add_argument("--part", nargs="+", choices=parts, default=parts, metavar="PART", help=f"default: {' '.join(parts)}")
    int8.add_argument(
        "--layers",
        nargs="+",
        default=["256x768", "768x256", "2048x8192"],
        metavar="INxOUT",
        help="widths; default: 256x768 768x256 2048x8192, the embedded code model's and StarCoderBase-1B's feed-forward layers",
    )
    int8.add_argument("--tokens", nargs="+", type=int, default=[1, 8], metavar="N", help="of each row; default: 1 8")
    int8.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="R", help="default: 1 2 4 8 16")
    int8.add_argument("--rows", type=int, default=8, metavar="N", help="of the batch, each with an adapter of its own; default: 8")
    int8.add_argument("--rounds", type=int, default=9, metavar="N", help="each setting is measured so often; default: 9")
    int8.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    int8.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    int8.add_argument("--json", metavar="FILE", help="write a JSONL row per figure")


def _add_targets(commands: argparse._SubParsersAction) -> None:
    targets = commands.add_parser(
        "targets",
        help="the app against its promises: first page, ready batch, memory, decode step beside the base model's, an open page",
        description="Start the app in a process of its own, run the ready batch, compare decode steps with the base model's, and "
        "tokens/s with and without an open page; --draw-here has a real browser draw it, which needs playwright and Chromium.",
    )
    parts = ["app", "steps", "page"]
    targets.add_argument("--part", nargs="+", choices=parts, default=parts, metavar="PART", help=f"default: {' '.join(parts)}")
    targets.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="per request; default: 48")
    targets.add_argument("--repeats", type=int, default=3, metavar="N", help="of the decode comparison; default: 3")
    targets.add_argument("--rounds", type=int, default=5, metavar="N", help="with and without an open page; default: 5")
    targets.add_argument(
        "--draw-here",
        action="store_true",
        help="the open page's charts are drawn on this machine too, on the engine's cores; without, only served, as to a visitor",
    )
    targets.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads, but the app's; default: torch's own choice")
    targets.add_argument("--json", metavar="FILE", help="write a JSONL row per promise")


def _add_serving(commands: argparse._SubParsersAction) -> None:
    serving = commands.add_parser(
        "serving",
        help="the engine beside PEFT's mixed batch and its HiRA, merged weights and few adapters; its own time; goodput",
        description="Measure the engine on the embedded code model beside what it has to beat, the contestants taking turns.",
    )
    parts = ["peft", "hira", "overhead", "merged", "adapters", "goodput"]
    serving.add_argument("--part", nargs="+", choices=parts, default=parts, metavar="PART", help=f"default: {' '.join(parts)}")
    serving.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="per request; default: 64")
    serving.add_argument("--rounds", type=int, default=5, metavar="N", help="of each comparison; default: 5")
    serving.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    serving.add_argument("--json", metavar="FILE", help="write a JSONL row per figure")


def _add_soak(commands: argparse._SubParsersAction) -> None:
    soak = commands.add_parser(
        "soak",
        help="long serving near capacity with cancels, disconnects and adapters that change: is anything lost or leaked",
        description="Measure the capacity, serve at a fraction of it for a long time while requests are cancelled, readers leave "
        "and adapters are added, replaced and removed, and say each minute what became of the requests. Exit 1 if anything was "
        "lost or leaked.",
    )
    soak.add_argument("--minutes", type=float, default=30.0, metavar="N", help="default: 30")
    soak.add_argument("--load", type=float, default=0.9, metavar="F", help="fraction of the capacity; default: 0.9")
    soak.add_argument("--calibrate", type=float, default=30.0, metavar="SECONDS", help="of measuring the capacity; default: 30")
    soak.add_argument("--method", default="flora", metavar="METHOD", help="default: flora")
    soak.add_argument("--mix", default="code=0.8,speech=0.2", metavar="SHARES", help="default: code=0.8,speech=0.2")
    soak.add_argument("--new-tokens", default="uniform:8-48", metavar="LENGTHS", help="of each answer; default: uniform:8-48")
    soak.add_argument("--adapter-slots", type=int, default=4, metavar="N", help="adapters on the device at once; default: 4")
    soak.add_argument("--max-batch-size", type=int, default=16, metavar="N", help="requests that run at once; default: 16")
    _add_models(soak)
    _add_machine(soak)
    soak.add_argument("--seed", type=int, default=0, metavar="N")
    soak.add_argument("--json", metavar="FILE", help="write a JSONL row per minute")


def _add_hardware(commands: argparse._SubParsersAction) -> None:
    limits = commands.add_parser(
        "hardware",
        help="what this machine allows: copy bandwidth, matrix rate by dtype, launch overhead, memory",
        description="Measure what this machine allows, in a few seconds, or print what was measured before: it is kept in the "
        "user's cache folder, for this device, these versions and as many threads.",
    )
    limits.add_argument("--fresh", action="store_true", help="measure anew")
    limits.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    limits.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    limits.add_argument("--json", metavar="FILE", help="write a JSONL row")


def _add_op_lab(commands: argparse._SubParsersAction) -> None:
    lab = commands.add_parser(
        "oplab",
        help="one layer at true widths: every method in turn, beside float64, what the machine allows and what was predicted",
        description="Measure every method on one layer of a known model, or of free widths, without any weights. The first time on "
        "a machine, what its stages take is measured too, some ten seconds for a dtype, and kept in the user's cache folder. "
        "Without options: StarCoderBase-1B's c_attn, eight rows decoding. Exit 1 where a method is wrong.",
    )
    layer = lab.add_argument_group("layer")
    layer.add_argument("--model", metavar="NAME", help="such as starcoder, starcoderbase-1b, llama-2-7b, whisper-large-v3")
    layer.add_argument("--layer", metavar="NAME", help="such as c_attn or q_proj; default: the model's first")
    layer.add_argument("--d-in", type=int, metavar="D", help="free widths, instead of a model")
    layer.add_argument("--d-out", type=int, metavar="D")
    batch = lab.add_argument_group("batch")
    batch.add_argument("--rows", type=int, default=8, metavar="N", help="default: 8")
    batch.add_argument("--length", type=int, default=1, metavar="N", help="tokens of each row, 1 is a decode step; default: 1")
    batch.add_argument("--rank", type=int, default=4, metavar="R", help="default: 4")
    batch.add_argument("--adapters", type=int, metavar="N", help="distinct ones among the rows; default: one for each")
    batch.add_argument("--dtype", default="float32", help="float32, bfloat16, float16; default: float32")
    measuring = lab.add_argument_group("measuring")
    measuring.add_argument("--methods", nargs="+", metavar="METHOD", help="beside the bare layer; default: all")
    measuring.add_argument("--grid", action="store_true", help="many points: are predictions right, and are winners named")
    measuring.add_argument("--dry-run", action="store_true", help="print what is predicted, and measure nothing")
    measuring.add_argument("--seconds", type=float, default=1.2, metavar="N", help="of a point's timed calls; default: 1.2")
    measuring.add_argument("--fresh", action="store_true", help="measure anew what the machine's stages take")
    measuring.add_argument("--seed", type=int, default=0, metavar="N")
    measuring.add_argument("--device", default="auto", help="auto, cpu, cuda; default: auto")
    measuring.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")
    lab.add_argument("--json", metavar="FILE", help="write a JSONL row per method and point; - for standard output")
    lab.add_argument("--csv", metavar="FILE", help="write the same figures as a table")
    lab.add_argument("--report", metavar="FILE", help=REPORT_HELP)


def _add_agreement(commands: argparse._SubParsersAction) -> None:
    agreement = commands.add_parser(
        "agreement",
        help="the same comparison many times: how often do two runs agree within their intervals",
        description="Run the same measurement again and again, each time in a process of its own, and say how often the intervals "
        "of two runs' ratios overlap. Exit 1 where they do less often than is promised. What is run: a small batch of the embedded "
        "code model, and layers of the Op lab; or what stands behind --.",
    )
    agreement.add_argument("--pairs", type=int, default=10, metavar="N", help="of runs, of each measurement; default: 10")
    agreement.add_argument("--json", metavar="FILE", help="write a JSONL row per ratio and pair")
    agreement.add_argument("words", nargs="*", metavar="-- WORDS", help="such as: -- compare --repeats 5")


def _add_gpu(commands: argparse._SubParsersAction) -> None:
    gpu = commands.add_parser(
        "gpu",
        help="everything on a GPU, in minutes and without a network: kernels, single layers, whole models",
        description="Check every kernel against float64, measure single layers and whole models of the paper's shapes with random "
        "weights, and hold what was found against what is promised. --part figures measures throughput and latency by rank, as in "
        "the paper's Figures 2 and 3, in a run of its own. Needs a GPU; --dry-run takes every path on a CPU. Exit 1 where a kernel "
        "is wrong, something could not be measured, or a promise is not kept.",
    )
    parts, default = ["kernels", "layers", "models", "figures"], ["kernels", "layers", "models"]
    gpu.add_argument(
        "--part", nargs="+", choices=parts, default=default, metavar="PART", help=f"also: figures; default: {' '.join(default)}"
    )
    gpu.add_argument("--minutes", type=float, default=8.0, metavar="N", help="for everything; the rest is left out; default: 8")
    gpu.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, kernels interpreted: nothing is measured")
    gpu.add_argument("--seed", type=int, default=0, metavar="N")
    gpu.add_argument(
        "--json",
        metavar="FILE",
        help="where JSONL rows go as they come, so that what was measured before an end is kept; never over a file that is there; "
        "default: gpu_ and the device's name, in this folder, such as gpu_nvidia_h200.jsonl",
    )


FILES = ("json", "csv", "per_request", "report", "resume", "trace")
"""Options that name a file to be written."""


def _unwritable(options: argparse.Namespace) -> str | None:
    """Why one of the files that are to be written cannot be, as far as can be told before hours of measuring; None: they can."""
    for path in [Path(getattr(options, name)) for name in FILES if getattr(options, name, None) not in (None, "", "-")]:
        if path.is_dir() or not path.name:
            return f"cannot write {str(path)[-80:]!r}: it is a folder"
        if not path.parent.is_dir():
            return f"cannot write {path.name!r}: there is no such folder"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; 0 for done, 2 with one line on stderr for bad input, 130 when interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unwritable := _unwritable(options):
        parser.error(unwritable)
    # Torch and the models' libraries take seconds to import: --help and a mistyped option answer at once.
    from flora.errors import FloraError

    command = importlib.import_module(COMMANDS[options.command])
    try:
        return command.run(options)
    except FloraError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    sys.exit(main())
