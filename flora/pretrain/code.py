"""The embedded code model: a small GPTBigCode (StarCoder's architecture) and its tokenizer, trained on `flora.corpus.code`.

The base sees mostly Python and little of each other language, so that a language's adapter has something to add.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, GPTBigCodeConfig, GPTBigCodeForCausalLM, PreTrainedTokenizerFast

from flora.corpus.code import LANGUAGES, Program, problems, render
from flora.pretrain.loop import cooled_rate_at, train

END_OF_TEXT = "<|endoftext|>"
IGNORED = -100  # a label that has no loss
CONTEXT_LENGTH = 512
EXAMPLES_PER_POOL = 2048  # sorted by length before they are cut into batches
PACKED_SHARE = 0.15  # of the batches, which train every position and what follows an end of text
HELD_OUT_SEED = 1


@dataclass(frozen=True)
class Scores:
    """How the model does on held-out problems of one language."""

    loss: float  # nats per token of the completion
    accuracy: float  # share of greedy completions that are the reference, letter for letter


def draw_tag(rng: random.Random, python_share: float) -> str:
    """A language tag: Python, or one of the nine others, equally often."""
    if rng.random() < python_share:
        return "py"
    return rng.choice([tag for tag in LANGUAGES if tag != "py"])


def programs(split: str, seed: int, python_share: float) -> Iterator[Program]:
    """An endless mix of programs of a split."""
    rng = random.Random(seed)
    for problem in problems(split, seed):
        yield render(problem, draw_tag(rng, python_share))


def train_tokenizer(vocabulary_size: int, num_programs: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE, digits apart, as StarCoder's; any text comes back unchanged. `<|endoftext|>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = itertools.islice(programs("train", seed=0, python_share=0.3), num_programs)
    tokenizer.train_from_iterator((program.prompt + program.completion for program in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT_LENGTH,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int, heads: int) -> GPTBigCodeForCausalLM:
    """A randomly initialised model, with multi-query attention and tied embeddings, as StarCoder's."""
    config = GPTBigCodeConfig(
        vocab_size=len(tokenizer),
        n_positions=CONTEXT_LENGTH,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=3 * width,
        activation_function="gelu_pytorch_tanh",
        multi_query=True,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # Eager attention is the faster one for short sequences in bfloat16 on a CPU; it is not saved with the model.
    model = GPTBigCodeForCausalLM._from_config(config, attn_implementation="eager")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Program]) -> list[tuple[list[int], list[int]]]:
    """(tokens of the prompt, tokens of the completion with its end of text) of each program."""
    prompts = tokenizer([program.prompt for program in batch])["input_ids"]
    completions = tokenizer([program.completion for program in batch])["input_ids"]
    return [(p, [*c, tokenizer.eos_token_id]) for p, c in zip(prompts, completions, strict=True)]


def collate(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the right; the loss is that of the completions. Causal attention never sees the padding, so there is no mask."""
    length = max(len(p) + len(c) for p, c in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.int64)  # (n, l)
    labels = torch.full((len(examples), length), IGNORED, dtype=torch.int64)  # (n, l)
    for i, (prompt, completion) in enumerate(examples):
        input_ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
    return {"input_ids": input_ids, "labels": labels}


def pack(examples: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """All examples one after another in rows as long as the context; the loss is that of every token."""
    stream = torch.tensor([token for prompt, completion in examples for token in prompt + completion])
    rows = max(1, len(stream) // CONTEXT_LENGTH)
    input_ids = stream[: rows * CONTEXT_LENGTH].view(rows, -1)  # (n, l)
    return {"input_ids": input_ids, "labels": input_ids}


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, python_share: float, tokens_per_batch: int
) -> Iterator[dict[str, torch.Tensor]]:
    """An endless stream of training batches of about `tokens_per_batch` tokens, of programs of like length."""
    rng = random.Random(seed)
    stream = programs("train", seed, python_share)
    while True:
        pool = encode(tokenizer, list(itertools.islice(stream, EXAMPLES_PER_POOL)))
        packed = int(PACKED_SHARE * len(pool))
        made = []
        packing: list[tuple[list[int], list[int]]] = []
        for example in pool[:packed]:
            packing.append(example)
            if sum(len(p) + len(c) for p, c in packing) >= tokens_per_batch:
                made.append(pack(packing))
                packing = []
        batch: list[tuple[list[int], list[int]]] = []
        for example in sorted(pool[packed:], key=lambda e: len(e[0]) + len(e[1])):
            if (len(batch) + 1) * (len(example[0]) + len(example[1])) > tokens_per_batch:
                made.append(collate(batch))
                batch = []
            batch.append(example)
        made.append(collate(batch))
        rng.shuffle(made)
        yield from made


def steps_done(run_folder: Path) -> int:
    """The steps a run that is about to resume has behind it; the data goes on from there."""
    path = run_folder / "checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"] if path.exists() else 0


def held_out(tag: str, num_problems: int) -> list[Program]:
    """The first held-out problems, in one language."""
    return [render(problem, tag) for problem in itertools.islice(problems("held-out", HELD_OUT_SEED), num_problems)]


@torch.inference_mode()
def complete(
    model: GPTBigCodeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int = 128
) -> list[str]:
    """Greedy completions, without what comes after the end of text."""
    texts = []
    for start in range(0, len(prompts), 128):
        encoded = tokenizer(prompts[start : start + 128])["input_ids"]
        length = max(len(tokens) for tokens in encoded)
        padded = torch.tensor([[0] * (length - len(tokens)) + tokens for tokens in encoded])  # (n, l), padded on the left
        mask = torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in encoded])
        made = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        texts += tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
    return texts


@torch.inference_mode()
def evaluate(model: GPTBigCodeForCausalLM, tokenizer: PreTrainedTokenizerFast, num_problems: int) -> dict[str, Scores]:
    """Loss and exact greedy answers on the same held-out problems in every language."""
    wanted = {tag: held_out(tag, num_problems) for tag in LANGUAGES}
    answers = complete(model, tokenizer, [program.prompt for tag in wanted for program in wanted[tag]])
    scores = {}
    for i, (tag, reference) in enumerate(wanted.items()):
        loss = model(**collate(encode(tokenizer, reference)), use_cache=False).loss.item()
        given = answers[i * num_problems : (i + 1) * num_problems]
        right = sum(answer == program.completion for answer, program in zip(given, reference, strict=True))
        scores[tag] = Scores(round(loss, 4), round(right / num_problems, 4))
    return scores


def save(
    model: GPTBigCodeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    card: str,
    scores: dict[str, Scores],
) -> None:
    """Write the model in float16 with its tokenizer, card and scores; files of a killed run never replace whole ones."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    half = GPTBigCodeForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    rows = [{"language": tag, "loss": score.loss, "exact": score.accuracy} for tag, score in scores.items()]
    (partial / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(partial.iterdir()):
        file.chmod(0o644)  # safetensors writes for the owner only
        file.replace(folder / file.name)
    partial.rmdir()


def write_card(arguments: argparse.Namespace, model: GPTBigCodeForCausalLM, scores: dict[str, Scores], num_problems: int) -> str:
    """The model card: what it is, what it learned from, the command, and its scores."""
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    others = (1 - arguments.python_share) / (len(LANGUAGES) - 1)
    table = "\n".join(f"| {LANGUAGES[tag].name} | {s.loss:.3f} | {100 * s.accuracy:.0f} % |" for tag, s in scores.items())
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The embedded code model of fLoRA Live

A GPTBigCode model (StarCoder's architecture) of {parameters / 1e6:.2f} M parameters: width {config.n_embd},
{config.n_layer} layers, {config.n_head} heads with multi-query attention, {config.n_positions} positions, a byte-level BPE of
{config.vocab_size} tokens. It ships with the repository, so that batched adapters can be served, compared and taught on a
laptop's CPU without a download. It is not a coding assistant: it knows the small functions of its corpus and nothing else.

## Corpus

Functions that `flora.corpus.code` generates: sums, filters, text formatting, digit loops and the like, with random
names, constants and compositions. A prompt is the task in English as a comment and the function's signature, as in
MultiPL-E; the answer is the body. {100 * arguments.python_share:.0f} % of the programs are Python, each of the nine other
languages has {100 * others:.1f} %; in the last {arguments.cooldown_steps} steps, {100 * arguments.cooldown_python_share:.3g} % are
Python. That is enough to read the others, and too little to be good at them, so that a language's adapter has something to
add. The model is a *base* for adapters.

## Recipe

    python -m flora.pretrain code

AdamW with a peak learning rate of {arguments.learning_rate:g}: linear warm-up and a cosine planned for
{arguments.planned_steps} steps, left for a straight fall to zero in the last {arguments.cooldown_steps} of
{arguments.steps}; batches of {arguments.tokens_per_batch} tokens, bfloat16 autocast, seed {arguments.seed}. The loss is that of
the answers, and of every token in the {100 * PACKED_SHARE:.0f} % of programs that are packed into whole contexts. The weights are
stored in float16.

## Scores

On {num_problems} held-out problems (other names, constants and compositions than in training, by construction), the same in
every language: loss in nats per token of the answer, and the share of greedy answers that equal the reference letter for
letter (`scores.jsonl`).

| language | loss | exact |
|---|---|---|
{table}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("assets/models/code"), help="folder of the finished model")
    parser.add_argument(
        "--run-folder",
        type=Path,
        default=Path("runs/pretrain-code"),
        help="checkpoints and log; a run resumes from here",
    )
    parser.add_argument("--steps", type=int, default=6900, help="in all")
    parser.add_argument("--cooldown-steps", type=int, default=900, help="the last of them, in which the rate falls to zero")
    parser.add_argument("--planned-steps", type=int, default=13000, help="that the first part's learning rate is for")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--python-share", type=float, default=0.85, help="share of Python among the programs")
    parser.add_argument("--cooldown-python-share", type=float, default=1.0, help="the same, in the cooldown")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary-size", type=int, default=1024)
    parser.add_argument("--tokens-per-batch", type=int, default=2560)
    parser.add_argument("--problems", type=int, default=100, help="held-out problems per language in the last evaluation")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        default=500,
        help="steps; each checkpoint is also saved as a model in the run folder",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError, in one sentence, for a number that makes no sense."""
    for name in ("python_share", "cooldown_python_share"):
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} is a share between 0 and 1, not {getattr(arguments, name):g}")
    if arguments.width % arguments.heads:
        raise ValueError(f"--width ({arguments.width}) must be a multiple of --heads ({arguments.heads})")
    if arguments.vocabulary_size < 257:
        raise ValueError("--vocabulary-size must be at least 257, for every byte and the end of text")
    if not 0 <= arguments.cooldown_steps < arguments.steps <= arguments.planned_steps:
        raise ValueError("the steps must be more than --cooldown-steps and at most --planned-steps")
    for name in ("steps", "layers", "heads", "width", "tokens_per_batch", "problems", "checkpoint_every", "threads"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")


def main(arguments: argparse.Namespace) -> int:
    check_arguments(arguments)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.vocabulary_size)
    model = build_model(tokenizer, arguments.width, arguments.layers, arguments.heads)

    def evaluate_early() -> dict[str, float]:
        scores = evaluate(model, tokenizer, num_problems=16)
        save(model, tokenizer, arguments.run_folder / "model", write_card(arguments, model, scores, 16), scores)
        losses = {f"{tag}_loss": score.loss for tag, score in scores.items()}
        return losses | {f"{tag}_exact": score.accuracy for tag, score in scores.items()}

    def data(seed: int, python_share: float, first_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """The batches of a part of the run that begins at `first_step`, from where the last checkpoint left it."""
        stream = batches(tokenizer, seed, python_share, arguments.tokens_per_batch)
        return itertools.islice(stream, max(0, steps_done(arguments.run_folder) - first_step), None)

    first_part = arguments.steps - arguments.cooldown_steps
    warmup = min(200, max(1, arguments.steps // 10))

    def rate_at(step: int) -> float:
        return cooled_rate_at(step, arguments.planned_steps, arguments.learning_rate, warmup, first_part, arguments.steps)

    common = {
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "rate_at": rate_at,
        "run_folder": arguments.run_folder,
        "checkpoint_every": arguments.checkpoint_every,
        "autocast_dtype": torch.bfloat16,
        "evaluate": evaluate_early,
    }
    train(model, data(arguments.seed, arguments.python_share, 0), stop=first_part, **common)
    train(model, data(arguments.seed + 1, arguments.cooldown_python_share, first_part), **common)
    scores = evaluate(model, tokenizer, arguments.problems)
    save(model, tokenizer, arguments.out, write_card(arguments, model, scores, arguments.problems), scores)
    for tag, score in scores.items():
        print(f"{LANGUAGES[tag].name:8} loss {score.loss:.3f}   exact {100 * score.accuracy:5.1f} %")
    return 0
