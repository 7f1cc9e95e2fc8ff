"""The training loop of the embedded base models: AdamW, warm-up then cosine, atomic checkpoints, resume."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm


def learning_rate_at(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a tenth of a percent of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.001 + 0.999 * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def cooled_rate_at(step: int, planned: int, peak: float, warmup: int, first: int, last: int) -> float:
    """The plan's rate until step `first`, then down in a straight line to nothing at `last`."""
    rate = learning_rate_at(min(step, first), planned, peak, warmup)
    return rate if step < first else rate * (last - step) / (last - first)


def save_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write model, optimizer and step to `folder`/checkpoint.pt, atomically: a killed run keeps the last whole one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "checkpoint.pt.partial"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, partial)
    os.replace(partial, folder / "checkpoint.pt")


def load_checkpoint(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote (tensors only, no pickled objects) and return the next step, 0 if there is none."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train(
    model: torch.nn.Module,
    batches: Iterator[dict[str, torch.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    run_folder: Path,
    stop: int | None = None,
    warmup: int = 100,
    weight_decay: float = 0.01,
    clip_norm: float = 1.0,
    checkpoint_every: int = 500,
    autocast_dtype: torch.dtype | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    rate_at: Callable[[int], float] | None = None,
) -> None:
    """Train `model` in place on an endless iterator of keyword batches; `model(**batch).loss` is minimised.

    The learning rate is planned for `steps` steps; with `stop`, training leaves that plan after so many of them, and a
    second call with fewer `steps` cools down from there. `rate_at`, step → learning rate, is a plan of the caller's own.

    The log goes to `run_folder`/log.jsonl, a row per 50 steps and one per evaluation (every `checkpoint_every` steps).
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    first = load_checkpoint(run_folder, model, optimizer)
    run_folder.mkdir(parents=True, exist_ok=True)
    log = (run_folder / "log.jsonl").open("a", encoding="utf-8")
    started, running = time.perf_counter(), None
    model.train()
    last = steps if stop is None else min(stop, steps)
    progress = tqdm(range(first, last), initial=first, total=last, mininterval=5.0)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step) if rate_at else learning_rate_at(step, steps, learning_rate, warmup)
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = model(**next(batches)).loss
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss became {loss.item()} at step {step}; the last checkpoint is kept")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            row = {"step": step + 1, "loss": round(running, 4), "seconds": round(time.perf_counter() - started, 1)}
            log.write(json.dumps(row) + "\n")
            log.flush()
            progress.set_postfix(loss=f"{running:.3f}")
        if (step + 1) % checkpoint_every == 0 or step + 1 == last:
            save_checkpoint(run_folder, model, optimizer, step + 1)
            if evaluate is not None:
                model.eval()
                log.write(json.dumps({"step": step + 1, **evaluate()}) + "\n")
                log.flush()
                model.train()
    log.close()
    model.eval()
