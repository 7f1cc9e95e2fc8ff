"""The training command line: `python -m flora.finetune code|speech …`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

EXAMPLES = """examples:
  python -m flora.finetune code lua                                     an adapter of the embedded code model, in two minutes
  python -m flora.finetune speech cs --method ia3 --output runs/cs-ia3
  python -m flora.finetune code --data mine.jsonl --model bigcode/starcoderbase-1b --quantize nf4 --output adapters/mine
  python -m flora.finetune speech cs --data clips/ --model openai/whisper-large-v2 --output adapters/cs

A run that was stopped or killed goes on from its last checkpoint: give the same command again.
"""


class Parser(argparse.ArgumentParser):
    """Bad input: one line, exit 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flora.finetune",
        usage="python -m flora.finetune code|speech [LANGUAGE] [--method flora|lora|ia3] [--data SOURCE] [--output FOLDER] …",
        description="Train an adapter of a frozen base model, and write it as a PEFT folder with a card that tells its score.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", metavar="code|speech", help="what the base model does: write code, or transcribe speech")
    parser.add_argument(
        "language", nargs="?", metavar="LANGUAGE", help="of the project's corpus: lua, rb, … or cs, hi, …; or of --data"
    )

    base = parser.add_argument_group("base model")
    base.add_argument("--model", metavar="MODEL", help="folder, hub id or short name; default: the embedded one")
    base.add_argument("--quantize", metavar="int8|nf4", help="load the base model in 8 or 4 bits, with bitsandbytes")
    base.add_argument("--llm-int8-threshold", type=float, metavar="SIZE", help="of --quantize int8, see docs/int8.md; default: 6")
    base.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")

    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--method", default="flora", metavar="flora|lora|ia3", help="default: flora")
    adapter.add_argument("--rank", type=int, metavar="R", help="of fLoRA and LoRA; default: 4")
    adapter.add_argument("--init", metavar="identity|noise|ones", help="how a fLoRA adapter starts; default: identity")
    adapter.add_argument("--init-std", type=float, metavar="σ", help="of the start's random part; default: what fits --init")
    adapter.add_argument(
        "--target-layers",
        nargs="+",
        metavar="NAME",
        help="all: every linear layer but the output head, the default of Whisper and of small models; "
        "default: PEFT's choice for the architecture, the default of the others; or the layers' names",
    )

    data = parser.add_argument_group("data of your own, instead of the corpus")
    data.add_argument(
        "--data",
        metavar="SOURCE",
        help="a JSONL, CSV or Parquet file, a folder of them, a folder of sound with metadata.csv or metadata.jsonl, a folder that "
        "datasets saved, or a data set's hub id",
    )
    data.add_argument("--text-column", metavar="NAME", help="default: text, content, code, sentence or transcription")
    data.add_argument("--prompt-column", metavar="NAME", help="code: what is given, not learnt; default: prompt or instruction")
    data.add_argument("--completion-column", metavar="NAME", help="code: what is learnt; default: completion or response")
    data.add_argument("--audio-column", metavar="NAME", help="speech: the sound, or its file; default: audio, file_name or path")
    data.add_argument(
        "--validation", default="0.05", metavar="SHARE|SOURCE", help="what is held out to score on; default: 0.05 of the texts"
    )
    data.add_argument(
        "--limit", type=int, metavar="N", help="read at most so many rows; default: all; of the hub, what a run takes"
    )
    data.add_argument("--max-length", type=int, metavar="N", help="code: tokens of an example; default: 1024, or the context")
    data.add_argument("--data-split", default="train", metavar="NAME", help="of a data set; default: train")
    data.add_argument("--data-config", metavar="NAME", help="of a data set on the hub")
    data.add_argument("--data-dir", metavar="FOLDER", help="inside a data set on the hub, such as data/lua of The Stack")

    training = parser.add_argument_group("training; the defaults suit the method and the model's size")
    training.add_argument("--steps", type=int, metavar="N", help="default: 800 for code, 400 for speech; large models 1500, 5000")
    training.add_argument("--batch-size", type=int, metavar="N", help="examples at once; default: 16; large models 8 and 6")
    training.add_argument("--gradient-accumulation", type=int, default=1, metavar="N", help="batches in a step; default: 1")
    training.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="default: the paper's for the method, or for a small model the one tuned on the embedded models",
    )
    training.add_argument("--warmup", type=int, metavar="N", help="steps until the full rate; default: a twentieth of the steps")
    training.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where that is safe: faster, on new hardware")
    training.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    training.add_argument("--threads", type=int, metavar="N", help="torch's CPU threads; default: torch's own choice")

    where = parser.add_argument_group("what comes out")
    where.add_argument(
        "--output", type=Path, metavar="FOLDER", help="empty or not there yet; default: assets/adapters/KIND/LANGUAGE/METHOD"
    )
    where.add_argument("--overwrite", action="store_true", help="replace the adapter in the output folder")
    where.add_argument("--json", type=Path, metavar="FILE", help="write the recipe, the log and the score as rows of JSONL")
    where.add_argument("--held-out", type=int, default=100, metavar="N", help="items to score on, at most; default: 100")
    where.add_argument("--run-folder", type=Path, metavar="FOLDER", help="of checkpoints; default: one under runs/")
    where.add_argument("--checkpoint-every", type=int, default=100, metavar="N", help="steps; default: 100")
    where.add_argument("--restart", action="store_true", help="begin again, whatever checkpoints there are")
    where.add_argument("--clips", type=int, default=2000, metavar="N", help="of the spoken corpus, to train on; default: 2000")
    where.add_argument(
        "--dataset", type=Path, default=Path("runs/speech"), metavar="FOLDER", help="of the corpus's clips; default: runs/speech"
    )
    return parser


def quiet(threads: int | None) -> None:
    """Keep to oneself what libraries say to callers of their functions, and set torch's threads, None for its own choice."""
    import torch
    import transformers

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT asks transformers so
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train an adapter; 0 for done, 2 with one line on stderr for bad input, 130 when interrupted."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("checkpoint_every", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    quiet(options.threads)
    from flora.errors import FloraError
    from flora.finetune import Recipe, finetune

    if options.target_layers is not None:
        options.target_layers = tuple(options.target_layers)
    try:
        recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
        if options.output is None and (recipe.data is not None or recipe.model is not None):
            parser.error("say where the adapter goes: --output FOLDER")
        result = finetune(
            recipe,
            options.output or Path("assets/adapters") / recipe.kind / recipe.language / recipe.method,
            run=options.run_folder,
            overwrite=options.overwrite,
            restart=options.restart,
            checkpoint_every=options.checkpoint_every,
            device=options.device,
            json_file=options.json,
            clips_folder=options.dataset,
            progress=sys.stderr,
        )
    except FloraError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    for name, value in result.score.items():
        print(f"{name}: base {result.base_score[name]:.3f}, with the adapter {value:.3f}")
    print(f"written to {result.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
