"""The run: transformers' Trainer around PEFT's model, with checkpoints that are whole or not there, and a stop at the first NaN.

The Trainer writes into a folder of its own inside the run's, and a finished checkpoint is moved out of it by one rename: a run that
is killed at any moment finds its last whole checkpoint, and continues from there with the examples that come next.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from flora.errors import DivergenceError, TrainingError
from flora.finetune.adapters import settle
from flora.finetune.recipe import Recipe
from flora.finetune.tasks import RunData, Task
from flora.formats import WEIGHTS_FILE

IDENTITY_FILE = "run.json"
WRITING = "writing"  # the Trainer's own folder: whatever is in it is not finished
LOCK_FILE = "lock"
PLAIN_ARRAYS = [np._core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]  # what a random state is made of
FULL_DISK = re.compile("No space left|os error 28|Disk quota|PytorchStreamWriter|file write failed|inline_container")


# --------------------------------------------------------------------------------------------------------------- the run's folder


@contextmanager
def run_folder(folder: Path, identity: dict, restart: bool = False) -> Iterator[None]:
    """The folder of a run, for one process at a time. TrainingError where it holds another run, or one that is at work.

    identity: what makes it the same run. restart: forget what an earlier run left there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK_FILE).touch()
    except OSError as error:
        raise TrainingError(
            f"run folder {folder} cannot be written to ({error.strerror}): name another with --run-folder"
        ) from error
    with _locked(folder):
        path = folder / IDENTITY_FILE
        if restart:
            for checkpoint in _checkpoints(folder):
                shutil.rmtree(checkpoint)
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / WRITING, ignore_errors=True)
        if path.exists():
            _refuse_other_run(folder, path, identity)
        elif _checkpoints(folder):
            raise TrainingError(f"run folder {folder} holds checkpoints of an unknown run: name another one, or give --restart")
        else:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(partial, path)
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out; a killed one lets go by itself. Where the system has no such locks, nothing is kept out."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"another run is at work in {folder}: wait for it, or name another --run-folder") from error
        yield


def _refuse_other_run(folder: Path, path: Path, identity: dict) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        recipe = before["recipe"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} cannot be read: give --restart to begin again") from error
    changed = [f"{name} {recipe.get(name)} → {value}" for name, value in identity["recipe"].items() if recipe.get(name) != value]
    changed += [f"another {name}" for name in ("model", "data") if before.get(name) != identity[name]]
    if changed:
        raise TrainingError(
            f"run folder {folder} holds another run ({', '.join(changed)}): name another one, or give --restart to begin again"
        )


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> tuple[Path | None, int]:
    """The newest whole checkpoint of a run and its step; None and 0 where there is none."""
    found = _checkpoints(folder)
    return (found[-1], _step_of(found[-1])) if found else (None, 0)


def refuse_broken(checkpoint: Path) -> None:
    """TrainingError for a checkpoint with a file that is missing or cannot be read: found before anything is loaded from it."""
    try:
        load_file(checkpoint / WEIGHTS_FILE)
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for name in ("optimizer.pt", "scheduler.pt"):
            torch.load(checkpoint / name, map_location="cpu", weights_only=True)
        with torch.serialization.safe_globals(PLAIN_ARRAYS):
            torch.load(checkpoint / "rng_state.pth", map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise TrainingError(f"{checkpoint} cannot be read ({type(error).__name__}): give --restart to begin again") from error


@contextmanager
def explained_full_disk(folder: Path) -> Iterator[None]:
    """Turn the many ways in which libraries say that a disk is full into one sentence. folder: that is written to."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # torch's and safetensors' writers raise errors of their own, with the system's number in the text, or without.
        if not full and not FULL_DISK.search(str(error)):
            raise
        raise TrainingError(
            f"the disk that holds {folder} is full: make room and give the same command again; the last whole checkpoint is kept"
        ) from error


# --------------------------------------------------------------------------------------------------------------------- the Trainer


class _Trainer(Trainer):
    """The Trainer, on the run's examples in their order, with a stop at a loss that is no number."""

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise DivergenceError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}: lower --learning-rate; "
                "the last good checkpoint is kept"
            )
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # would count the model's parameters at every step, for a number that nobody reads


def _refuse_diverged(model: PeftModel, step: int) -> None:
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters() if parameter.requires_grad):
        raise DivergenceError(
            f"the adapter's values became NaN or infinite by step {step}: lower --learning-rate; the last good checkpoint is kept"
        )


class _Checkpoints(TrainerCallback):
    """Moves each finished checkpoint from the Trainer's folder into the run's, and removes the one before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any) -> None:
        _refuse_diverged(model, state.global_step)
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
        settle(written)
        before = _checkpoints(self.folder)
        os.replace(written, self.folder / written.name)
        for checkpoint in before:  # taken out of sight by one rename too
            os.replace(checkpoint, Path(args.output_dir) / f"old-{checkpoint.name}")
        shutil.rmtree(args.output_dir)
        Path(args.output_dir).mkdir()


class _Progress(TrainerCallback):
    """A bar with loss and remaining time on a terminal; elsewhere a line at each logging step."""

    def __init__(self, title: str, stream: TextIO) -> None:
        self.title, self.stream = title, stream
        self.bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.started, self.first = time.perf_counter(), state.global_step
        if self.stream.isatty():
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", file=self.stream, dynamic_ncols=True
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            return
        done = state.global_step - self.first
        left = (time.perf_counter() - self.started) / max(1, done) * (state.max_steps - state.global_step)
        print(
            f"{self.title}: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.3f}, {left:.0f} s left",
            file=self.stream,
            flush=True,
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Log:
    """Rows of JSON in a file, one a line, written as they come; or nowhere. TrainingError where the file cannot be written."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.file = path, None
        if path is not None:
            with self._explained():
                path.parent.mkdir(parents=True, exist_ok=True)
                self.file = path.open("w", encoding="utf-8")

    def write(self, kind: str, facts: dict[str, Any]) -> None:
        if self.file is not None:
            with self._explained():
                self.file.write(json.dumps({"kind": kind, **facts}, ensure_ascii=False) + "\n")
                self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written was said when it was tried
                self.file.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(f"--json {self.path.name} cannot be written ({error.strerror}): name another file") from error


class _Rows(TrainerCallback):
    """A "log" row at each logging step; those before a resumed run's checkpoint come first."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for entry in state.log_history:
            self._write(entry, entry["step"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        self._write(logs, state.global_step)

    def _write(self, logs: dict[str, Any], step: int) -> None:
        if "loss" in logs:
            shown = {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            self.log.write("log", {"step": step, **{name: value for name, value in shown.items() if math.isfinite(value)}})


def train(
    model: PeftModel,
    task: Task,
    recipe: Recipe,
    folder: Path,
    checkpoint_every: int | None = 100,
    log: Log | None = None,
    title: str = "",
    progress: TextIO | None = None,
) -> int:
    """Train the adapter in `model`, in place, and return the step it went on from: 0, or that of the run's last checkpoint.

    recipe: complete. folder: of the run; checkpoints come into it every `checkpoint_every` steps and at the end, with None none.
    progress: where to show it. TrainingError for a loss that is no number, a full disk, or a checkpoint that cannot be read.
    """
    checkpoint, step = last_checkpoint(folder)
    if checkpoint is not None:
        refuse_broken(checkpoint)
    if step >= recipe.steps:
        set_peft_model_state_dict(model, load_file(checkpoint / WEIGHTS_FILE))
        model.eval()
        return step
    callbacks: list[TrainerCallback] = [] if checkpoint_every is None else [_Checkpoints(folder)]
    callbacks += [] if log is None else [_Rows(log)]
    shown = None if progress is None else _Progress(title, progress)
    callbacks += [] if shown is None else [shown]
    trainer = _Trainer(
        model=model,
        args=_arguments(model, recipe, folder, checkpoint_every),
        train_dataset=RunData(task, recipe),
        data_collator=task.collate,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with explained_full_disk(folder):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if shown is not None:
            shown.close()
        shutil.rmtree(folder / WRITING, ignore_errors=True)
    _refuse_diverged(model, recipe.steps)
    model.eval()
    return step


def _arguments(model: PeftModel, recipe: Recipe, folder: Path, checkpoint_every: int | None) -> TrainingArguments:
    on_cpu = model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder / WRITING),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        seed=recipe.seed,
        bf16=recipe.bfloat16,
        use_cpu=on_cpu,
        save_strategy="no" if checkpoint_every is None else "steps",
        save_steps=checkpoint_every or recipe.steps,
        logging_steps=max(1, min(50, recipe.steps // 20)),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        label_names=["labels"],
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else the Trainer would copy the model to every GPU, which a quantised one does not bear
    return arguments
