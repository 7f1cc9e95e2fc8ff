"""Train an adapter of an embedded model on one language of its corpus (python -m flora.finetune code lua --method flora).

The base model is frozen. The adapter's factors are the only parameters; the forward is the engine's own layer and op, so that
what is trained is what is served. The result is a PEFT-format folder with a card that tells the recipe and the held-out score.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flora import ops
from flora.errors import FloraError
from flora.formats import write_flora, write_lora
from flora.layers import AdaptedLinear, LayerPlan, ServingHolder, inject
from flora.models import LoadedModel, load_model
from flora.pretrain.loop import train
from flora.tuner import FloraConfig, initial_factors

MODELS = {"code": Path("assets/models/code"), "speech": Path("assets/models/speech")}
METHODS = {"flora": "flora", "lora": "loop-lora"}
"""Method of the adapter → the op that trains it: with one adapter in the batch, loop-lora is two plain products."""

LEARNING_RATES = {("code", "flora"): 1e-2, ("code", "lora"): 5e-3, ("speech", "flora"): 3e-2, ("speech", "lora"): 5e-3}
"""A multiplicative adapter wants the larger rate (PAPER: 8e-3 to 1e-4 at StarCoder's size; here the layers are narrow)."""


class AdapterTraining(nn.Module):
    """A frozen base model and one trainable adapter; `forward(**batch)` is the base model's, with the adapter serving every row.

    Its parameters and its state are the adapter's alone.
    """

    def __init__(self, loaded: LoadedModel, method: str, rank: int, config: FloraConfig, seed: int) -> None:
        super().__init__()
        self.method = METHODS[method]
        self._model = (loaded.model,)  # in a tuple: not a submodule, so neither trained nor saved
        self._holder = ServingHolder()
        self._layers = inject(loaded.model, self._holder, skip=(loaded.model.get_output_embeddings(),))
        self._routings: dict[int, ops.Routing] = {}
        self.rank = rank
        self.scale = 1.0 / rank if method == "flora" and config.combine == "mean" else 1.0  # of B: the mean over components
        generator = torch.Generator().manual_seed(seed)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in self._layers.items():
            A, B = self._initial(layer, method, config, generator)
            self.A[_key(name)], self.B[_key(name)] = nn.Parameter(A), nn.Parameter(B)

    def _initial(self, layer: AdaptedLinear, method: str, config: FloraConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if method == "flora":
            return initial_factors(config, layer.in_features, layer.out_features, generator)
        bound = layer.in_features**-0.5  # as PEFT starts LoRA: A uniform in ±1/√d_in, B zero
        A = torch.empty(self.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        return A, torch.zeros(self.rank, layer.out_features)

    def plan(self, layer: str) -> LayerPlan:
        """Every row of the batch is served by the one adapter: slot 0 of A (1, r, d_in) and B (1, r, d_out)."""
        A, B = self.A[_key(layer)], self.B[_key(layer)]
        return LayerPlan(A[None], (B if self.scale == 1.0 else self.scale * B)[None], self._routing)

    @contextmanager
    def serving(self, num_rows: int, adapted: bool = True) -> Iterator[nn.Module]:
        """The base model, with the adapter at work on batches of `num_rows` or, not `adapted`, without it."""
        if num_rows not in self._routings:
            self._routings[num_rows] = ops.route([0] * num_rows, [self.rank], self.rank)
        self._routing = self._routings[num_rows]
        self._holder.current = self if adapted else None
        try:
            yield self._model[0]
        finally:
            self._holder.current = None

    def forward(self, **batch: Tensor) -> Any:
        with self.serving(batch["labels"].shape[0]) as model:
            return model(**batch)

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """layer → A (r, d_in), B (r, d_out), on the CPU."""
        return {name: (self.A[_key(name)].detach().cpu(), self.B[_key(name)].detach().cpu()) for name in self._layers}


def _key(layer: str) -> str:
    return layer.replace(".", "/")  # a ParameterDict's keys hold no dots


def save_adapter(folder: Path, training: AdapterTraining, method: str, config: FloraConfig, base: str, card: str) -> None:
    """Write the PEFT-format folder, factors in float16 (under a megabyte each)."""
    factors = {name: (A.half(), B.half()) for name, (A, B) in training.factors().items()}
    targets = sorted({name.rsplit(".", 1)[-1] for name in factors})
    shared = {"base_model_name_or_path": base, "r": training.rank, "target_modules": targets}
    if method == "flora":
        write_flora(folder, factors, {**shared, "combine": config.combine, "init": config.init})
    else:
        write_lora(folder, factors, {**shared, "lora_alpha": training.rank, "bias": "none", "task_type": None})
    (folder / "README.md").write_text(card, encoding="utf-8")


def adapter_card(options: argparse.Namespace, language: str, score: dict[str, float], base_score: dict[str, float]) -> str:
    """The adapter's README: what it is, how it was made, what it scores beside the base model."""
    rows = "\n".join(f"| {name} | {base_score[name]:.3f} | {value:.3f} |" for name, value in score.items())
    family = "fLoRA" if options.method == "flora" else "LoRA"
    rate = options.learning_rate
    computed = ", computed in bfloat16" if options.bfloat16 else ""
    return f"""---
license: apache-2.0
library_name: peft
base_model: {options.model.as_posix()}
---
# {family} adapter: {language}

Rank {options.rank} on all linear layers of the embedded {options.kind} model. Trained on the `{options.language}` part of
`flora/corpus`, {options.steps} steps of {options.batch_size}, learning rate {rate:g}, seed {options.seed}{computed}.

    python -m flora.finetune {options.kind} {options.language} --method {options.method}{" --bfloat16" if options.bfloat16 else ""}

| {options.held_out} held-out items | base model | with this adapter |
|---|---|---|
{rows}
"""


class CodeTask:
    """One programming language of the code corpus: batches to learn from, and a held-out score."""

    def __init__(self, loaded: LoadedModel, tag: str, options: argparse.Namespace) -> None:
        from flora.corpus import code as corpus

        self.corpus, self.tokenizer, self.tag, self.options = corpus, loaded.tokenizer, tag, options
        self.language = corpus.language(tag).name

    def _ids(self, problem: Any) -> tuple[list[int], list[int]]:
        program = self.corpus.render(problem, self.tag)
        prompt, completion = (self.tokenizer(text)["input_ids"] for text in (program.prompt, program.completion))
        return prompt, [*completion, self.tokenizer.eos_token_id]

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """{input_ids, attention_mask, labels}, each (n, t), padded on the right; only the completion is predicted."""
        stream = self.corpus.problems("train", self.options.seed)
        while True:
            rows = [self._ids(problem) for problem in itertools.islice(stream, self.options.batch_size)]
            longest = max(len(prompt) + len(completion) for prompt, completion in rows)
            ids = torch.full((len(rows), longest), self.tokenizer.eos_token_id)
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for row, (prompt, completion) in enumerate(rows):
                end = len(prompt) + len(completion)
                ids[row, :end] = torch.tensor(prompt + completion)
                labels[row, len(prompt) : end] = ids[row, len(prompt) : end]
                mask[row, :end] = 1
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @torch.inference_mode()
    def score(self, training: AdapterTraining, adapted: bool) -> dict[str, float]:
        """Share of held-out completions of which every token is the model's own first choice, given the true ones before it."""
        held_out = itertools.islice(self.corpus.problems("held-out", 1), self.options.held_out)
        right = tokens = right_tokens = 0
        for problem in held_out:
            prompt, completion = self._ids(problem)
            ids = torch.tensor([prompt + completion])
            with training.serving(1, adapted) as model:
                chosen = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            right += chosen == completion
            tokens += len(completion)
            right_tokens += sum(a == b for a, b in zip(chosen, completion, strict=True))
        return {"whole completions right": right / self.options.held_out, "next tokens right": right_tokens / tokens}


class SpeechTask:
    """One language of the spoken corpus: batches to learn from, and a held-out score."""

    def __init__(self, loaded: LoadedModel, tag: str, options: argparse.Namespace) -> None:
        from flora.corpus.speech import LANGUAGES, build_dataset
        from flora.pretrain import speech

        if tag not in LANGUAGES:
            raise KeyError(f"no language {tag!r}; there are {', '.join(LANGUAGES)}")
        self.speech, self.processor, self.tag, self.options = speech, loaded.processor, tag, options
        self.language = LANGUAGES[tag].name
        counts = {(tag, "train"): options.clips, (tag, "held-out"): max(200, options.held_out)}
        self.clips = build_dataset(options.dataset, counts, seed=0, processes=1)
        self.held_out_features = speech.log_mel_features(self.processor, self.clips[tag, "held-out"])

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """{input_features (n, 80, 400), labels (n, t)}."""
        clips = {self.tag: self.clips[self.tag, "train"]}
        features = {self.tag: self.speech.log_mel_features(self.processor, clips[self.tag])}
        return self.speech.batches(self.processor, clips, features, {self.tag: 1.0}, self.options.batch_size, self.options.seed)

    @torch.inference_mode()
    def score(self, training: AdapterTraining, adapted: bool) -> dict[str, float]:
        """Word error rate of greedy transcripts of held-out clips."""
        errors = words = 0
        texts = self.clips[self.tag, "held-out"].texts[: self.options.held_out]
        for first in range(0, len(texts), 50):
            part = texts[first : first + 50]
            features = self.held_out_features[first : first + len(part)]
            with training.serving(len(part), adapted) as model:
                rate = self.speech.word_error_rate(model, self.processor, features, part)
            count = sum(len(text.split()) for text in part)
            errors, words = errors + rate * count, words + count
        return {"word error rate": errors / words}


TASKS = {"code": CodeTask, "speech": SpeechTask}


def finetune(options: argparse.Namespace) -> dict[str, float]:
    """Train one adapter as the options say, save it, and return its held-out score."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    loaded = load_model(options.model, device="cpu", dtype="float32")
    loaded.model.set_attn_implementation("eager")  # at this width the fused attention's backward pass is the slower one on a CPU
    task = TASKS[options.kind](loaded, options.language, options)
    config = FloraConfig(r=options.rank, init=options.init)
    training = AdapterTraining(loaded, options.method, options.rank, config, options.seed)
    base_score = task.score(training, adapted=False)
    train(
        training,
        task.batches(),
        steps=options.steps,
        learning_rate=options.learning_rate,
        run_folder=options.run_folder,
        warmup=max(1, options.steps // 20),
        weight_decay=0.0,
        checkpoint_every=options.checkpoint_every,
        autocast_dtype=torch.bfloat16 if options.bfloat16 else None,
    )
    score = task.score(training, adapted=True)
    card = adapter_card(options, task.language, score, base_score)
    save_adapter(options.output, training, options.method, config, options.model.as_posix(), card)
    for name, value in score.items():
        print(f"{options.kind} {options.language} {options.method}: {name} {base_score[name]:.3f} → {value:.3f}", flush=True)
    return score


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flora.finetune", description="Train an adapter of an embedded model.")
    parser.add_argument("kind", choices=sorted(TASKS))
    parser.add_argument("language", help="tag of the corpus: lua, rb, … or cs, hi, …")
    parser.add_argument("--method", choices=sorted(METHODS), default="flora")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--init", choices=("identity", "noise", "ones"), default="identity", help="start of a fLoRA adapter")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=None, help="by default what suits the method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="folder of the base model (default: the embedded one)")
    parser.add_argument("--output", type=Path, default=None, help="default: assets/adapters/KIND/LANGUAGE/METHOD")
    parser.add_argument("--run-folder", type=Path, default=None, help="checkpoints and log; an interrupted run resumes from it")
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--clips", type=int, default=2000, help="spoken training clips")
    parser.add_argument("--held-out", type=int, default=100, help="held-out items to score on")
    parser.add_argument("--dataset", type=Path, default=Path("runs/speech"), help="folder of cached clips")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where that is safe: faster on a recent CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    for name in ("rank", "steps", "batch_size", "held_out", "checkpoint_every", "threads", "clips"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    options.model = options.model or MODELS[options.kind]
    options.output = options.output or Path("assets/adapters") / options.kind / options.language / options.method
    options.run_folder = options.run_folder or Path("runs") / f"finetune-{options.kind}-{options.language}-{options.method}"
    options.learning_rate = options.learning_rate or LEARNING_RATES[options.kind, options.method]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        finetune(options)
    except (FloraError, KeyError) as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
