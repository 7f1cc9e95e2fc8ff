"""Runs that are stopped, killed, that diverge, that meet a full disk: what is left of them, and how they go on."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flora.errors import DivergenceError, TrainingError
from flora.finetune import Recipe, finetune, training
from flora.finetune.training import Log, last_checkpoint, run_folder

from .conftest import write_lines

STEPS = 6
CHECKPOINT_FILES = ("adapter_model.safetensors", "trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state.pth")
PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def recipe(checkpoints, code_file) -> Recipe:
    """Six steps of two, with a checkpoint after each second one; what it learns is in `code_file`."""
    return Recipe("code", data=str(code_file), model=str(checkpoints["code"].model), rank=2, steps=STEPS, batch_size=2, held_out=2)


def run(recipe: Recipe, folder: Path, **options):
    where = {"run": folder / "run", "checkpoint_every": 2, "device": "cpu", "json_file": folder / "log.jsonl"}
    return finetune(recipe, options.pop("output", folder / "adapter"), **{**where, **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if row["kind"] == kind]


@contextmanager
def interrupted(step: int) -> Iterator[None]:
    """As by Ctrl-C when that step begins."""
    step_of = training._Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return step_of(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training._Trainer, "training_step", training_step)
        yield


@pytest.fixture(scope="module")
def finished_run(recipe, tmp_path_factory):
    """(the folder of a run that is done, its result, what it printed)"""
    folder, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    result = run(recipe, folder, progress=printed)
    return folder, result, printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def stopped_run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    with interrupted(4):
        run(recipe, folder)
    assert last_checkpoint(folder / "run")[1] == 2 and not (folder / "adapter").exists()
    return folder


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A copy of the folder of a run that is done."""
    return shutil.copytree(finished_run[0], tmp_path / "finished")


@pytest.fixture
def stopped(stopped_run, tmp_path) -> Path:
    """A copy of the folder of a run that was interrupted after its first checkpoint."""
    return shutil.copytree(stopped_run, tmp_path / "stopped")


# ------------------------------------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
def test_an_interrupted_run_ends_as_one_that_was_not(method, recipe, finished, stopped, tmp_path):
    if method != "flora":
        recipe, finished, stopped = replace(recipe, method=method, rank=None), tmp_path / "a", tmp_path / "b"
        finished.mkdir()
        stopped.mkdir()
        assert run(recipe, finished).resumed_at == 0
        with interrupted(4):
            run(recipe, stopped)
    assert run(recipe, stopped).resumed_at == 2
    expected, found = weights(finished), weights(stopped)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), f"{key} differs by {(tensor - found[key]).abs().max().item()}"
    assert [row["step"] for row in rows(finished, "log")] == list(range(1, STEPS + 1))
    assert rows(stopped, "log") == rows(finished, "log"), "the log of the part before the stop is there too"


def test_a_finished_run_is_written_again_without_training(recipe, finished, finished_run, monkeypatch):
    monkeypatch.setattr(training, "_Trainer", None)
    again, first = run(recipe, finished, overwrite=True), finished_run[1]
    assert (again.resumed_at, again.score, again.base_score) == (STEPS, first.score, first.base_score)


def test_one_checkpoint_is_kept_and_no_pickle_is_in_the_way(finished):
    (checkpoint,) = (finished / "run").glob("checkpoint-*")
    names = {path.name for path in checkpoint.iterdir()}
    assert checkpoint.name == f"checkpoint-{STEPS}"
    assert "adapter_model.safetensors" in names and "training_args.bin" not in names
    with torch.serialization.safe_globals(training.PLAIN_ARRAYS):
        for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            torch.load(path, weights_only=True)  # plain tensors and numbers


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_was_tampered_with_is_refused_and_runs_nothing(name, recipe, stopped):
    torch.save(Bomb(stopped / "exploded"), last_checkpoint(stopped / "run")[0] / name)
    with pytest.raises(TrainingError, match="checkpoint-2 cannot be read .*: give --restart to begin again"):
        run(recipe, stopped)
    assert not (stopped / "exploded").exists() and not (stopped / "adapter").exists()


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "trainer_state.json", "scheduler.pt", "optimizer.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("cut", [True, False])
def test_a_checkpoint_with_a_file_cut_short_or_missing_is_refused(name, cut, recipe, stopped):
    path = last_checkpoint(stopped / "run")[0] / name
    if cut:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(TrainingError, match="cannot be read"):
        training.refuse_broken(path.parent)


def test_restart_forgets_what_was_there(recipe, stopped):
    assert run(recipe, stopped, restart=True).resumed_at == 0


# --------------------------------------------------------------------------------------------------- killed, and a full disk

WORST_MOMENTS = """
import os, signal, sys
from pathlib import Path
from flora.finetune import Recipe, finetune, training
from flora.errors import TrainingError

recipe, folder, disk = Recipe(**eval(sys.argv[1])), Path(sys.argv[2]), sys.argv[3:]
if disk:
    try:
        finetune(recipe, folder / "from-full", run=disk[0], checkpoint_every=2, device="cpu")
    except TrainingError as error:
        print(error)
    print(training.last_checkpoint(Path(disk[0]))[1])

save = training._Trainer._save_checkpoint

def killed_while_saving(self, model, trial):
    if self.state.global_step == 4:
        self._save_optimizer_and_scheduler = lambda output: os.kill(os.getpid(), signal.SIGKILL)
    save(self, model, trial)

training._Trainer._save_checkpoint = killed_while_saving
finetune(recipe, folder / "adapter", run=folder / "run", checkpoint_every=2, device="cpu")
"""
NEW_DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


@pytest.fixture(scope="module")
def worst_moments(recipe, tmp_path_factory):
    """(a folder whose run was killed with a checkpoint half written, what a run on a disk of 150 kB printed or None)"""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "disk").mkdir()
    words = [sys.executable, "-c", WORST_MOMENTS, repr({**recipe.as_dict(), "target_layers": None}), str(folder)]
    mount = f"mount -t tmpfs -o size=150k none {shlex.quote(str(folder / 'disk'))}"
    can_mount = shutil.which("unshare") and not subprocess.run([*NEW_DISK, mount], capture_output=True).returncode
    if can_mount:
        words = [*NEW_DISK, f"{mount} && exec {shlex.join([*words, str(folder / 'disk')])}"]
    alike = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number would round in another way
    killed = subprocess.run(words, cwd=PROJECT, env=alike, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    return folder, killed.stdout.splitlines() if can_mount else None


def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before(recipe, worst_moments, finished):
    folder, _ = worst_moments
    half_written = folder / "run" / training.WRITING / "checkpoint-4"
    assert (half_written / "adapter_model.safetensors").exists() and not (half_written / "optimizer.pt").exists()
    assert last_checkpoint(folder / "run")[1] == 2 and not (folder / "adapter").exists()
    assert run(recipe, folder).resumed_at == 2
    assert not (folder / "run" / training.WRITING).exists() and last_checkpoint(folder / "run")[1] == STEPS
    expected, found = weights(finished), weights(folder)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def test_a_disk_that_really_is_full_stops_the_run_in_one_sentence(worst_moments):
    folder, printed = worst_moments
    if printed is None:
        pytest.skip("needs a mount namespace of one's own")
    message, last_step = printed
    assert message.startswith(f"the disk that holds {folder / 'disk'} is full: make room and give the same command again")
    assert last_step == "2"
    assert not (folder / "from-full").exists()


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WRITERS = {
    "peft.peft_model.safe_save_file": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "transformers.trainer_callback.TrainerState.save_to_json": NO_SPACE,
    "flora.finetune.training.settle": NO_SPACE,
}
"""Writer → how it says that the disk is full."""


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_writer_meets_a_full_disk_the_last_checkpoint_is_kept(writer, recipe, stopped, monkeypatch):
    def full(*args, **kwargs):
        raise WRITERS[writer]

    monkeypatch.setattr(writer, full)
    with pytest.raises(TrainingError, match="^the disk that holds .* is full: make room and give the same command again; the last"):
        run(recipe, stopped)
    assert last_checkpoint(stopped / "run")[1] == 2 and not (stopped / "adapter").exists()
    training.refuse_broken(last_checkpoint(stopped / "run")[0])


def test_a_disk_that_is_full_at_the_end_leaves_what_was_there(recipe, finished, monkeypatch):
    def full(*args, **kwargs):
        raise NO_SPACE

    before = {path.name: path.read_bytes() for path in (finished / "adapter").iterdir()}
    monkeypatch.setattr("flora.finetune.write_adapter", full)
    with pytest.raises(TrainingError, match="adapter is full: make room and give the same command again"):
        run(recipe, finished, overwrite=True)
    assert {path.name: path.read_bytes() for path in (finished / "adapter").iterdir()} == before
    assert sorted(path.name for path in finished.iterdir()) == ["adapter", "log.jsonl", "run"]


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(TrainingError, match=r"^--json x\.jsonl cannot be written \(File exists\): name another file$"):
        Log(Path(__file__) / "x.jsonl")
    with pytest.raises(TrainingError, match=r"^--json .* cannot be written \(Is a directory\)"):
        Log(tmp_path)
    if Path("/dev/full").is_char_device():
        log = Log(Path("/dev/full"))
        with pytest.raises(TrainingError, match="--json full cannot be written .No space left"):
            log.write("log", {"step": 1})
        log.close()


# ---------------------------------------------------------------------------------------------------------------- divergence


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(recipe, stopped, monkeypatch):
    step_of = training.Trainer.training_step

    def training_step(self, *args, **kwargs):
        loss = step_of(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 == 4 else loss

    monkeypatch.setattr(training.Trainer, "training_step", training_step)
    with pytest.raises(DivergenceError, match="the loss became nan at step 4: lower --learning-rate; the last good checkpoint"):
        run(recipe, stopped)
    checkpoint, step = last_checkpoint(stopped / "run")
    assert step == 2 and not (stopped / "adapter").exists()
    training.refuse_broken(checkpoint)
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "adapter_model.safetensors").values())


def test_a_rate_that_is_far_too_large_diverges_for_real(recipe, tmp_path):
    with pytest.raises(DivergenceError, match="lower --learning-rate"):
        run(replace(recipe, learning_rate=1e30, warmup=0), tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_with_values_that_are_no_numbers_is_not_saved(recipe, stopped, monkeypatch):
    """The loss of a step tells what the step before it did; a checkpoint does not wait for that."""
    step_of, steps = torch.optim.AdamW.step, []

    def diverging(self, *args, **kwargs):
        step_of(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 2:  # the fourth of the run
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", diverging)
    with pytest.raises(DivergenceError, match="values became NaN or infinite by step 4"):
        run(recipe, stopped)
    assert last_checkpoint(stopped / "run")[1] == 2


# ------------------------------------------------------------------------------------------------------------- the run's folder


def test_the_folder_of_another_run_is_refused_and_says_what_differs(recipe, stopped):
    other, run_before = replace(recipe, learning_rate=0.5), (stopped / "run" / "run.json").read_bytes()
    with pytest.raises(TrainingError, match=r"holds another run \(learning_rate 0.01 → 0.5\): name another one, or give --restart"):
        run(other, stopped)
    assert (stopped / "run" / "run.json").read_bytes() == run_before and last_checkpoint(stopped / "run")[1] == 2


def test_other_data_in_the_same_file_is_another_run(recipe, stopped, code_file):
    changed = write_lines(stopped / code_file.name, [{"prompt": "-- other\n", "completion": f"x{n}"} for n in range(40)])
    identity = json.loads((stopped / "run" / "run.json").read_text())
    identity["recipe"]["data"] = str(changed)
    (stopped / "run" / "run.json").write_text(json.dumps(identity))
    with pytest.raises(TrainingError, match="holds another run .another data."):
        run(replace(recipe, data=str(changed)), stopped)


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
    identity = {"recipe": {}, "model": "m", "data": "d"}
    with run_folder(tmp_path, identity):
        with pytest.raises(TrainingError, match="another run is at work"), run_folder(tmp_path, identity):
            pass
    with run_folder(tmp_path, identity):
        pass


def test_checkpoints_of_nobody_knows_what_are_not_touched(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(TrainingError, match="checkpoints of an unknown run"), run_folder(tmp_path, {"recipe": {}}):
        pass
    assert (tmp_path / "checkpoint-7").exists()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrainingError, match=r"run\.json cannot be read: give --restart"), run_folder(tmp_path, {"recipe": {}}):
        pass


def test_an_output_that_is_in_use_is_refused_before_anything_is_done(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("flora.finetune.load_base", None)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("precious")
    with pytest.raises(TrainingError, match="output folder adapter is not empty"):
        run(recipe, tmp_path)
    assert not (tmp_path / "run").exists() and (tmp_path / "adapter" / "mine.txt").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------- what can be watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_loss_and_remaining_time(recipe, stopped):
    screen = Terminal()
    run(recipe, stopped, progress=screen)
    first, *_, last = [part for part in screen.getvalue().split("\r") if part.strip()]
    assert f"2/{STEPS}" in first, "a run that goes on begins where it was"
    assert f"{STEPS}/{STEPS}" in last and "loss=" in last and "programs flora" in last and "<00:00" in last


def test_elsewhere_there_are_lines_and_rows(finished_run):
    folder, _, lines = finished_run
    assert len(lines) == STEPS and lines[0].startswith(f"programs flora: step 1 of {STEPS}, loss ") and lines[0].endswith(" s left")
    (recipe_row,), logs, (score,) = (rows(folder, kind) for kind in ("recipe", "log", "score"))
    assert recipe_row["recipe"]["steps"] == STEPS and recipe_row["recipe"]["learning_rate"] == 0.01
    assert all(row["loss"] > 0 and row["learning_rate"] <= 0.01 for row in logs)
    assert set(score["score"]) == set(score["base_score"]) and score["items"] == 2 and score["resumed_at"] == 0


WAYS = [{"gradient_accumulation": 3}, {"bfloat16": True}, {"quantize": "int8", "method": "lora"}, {"quantize": "nf4"}]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_it_learns_in_every_way(options, recipe, tmp_path):
    result = run(replace(recipe, steps=12, warmup=1, held_out=20, **options), tmp_path, checkpoint_every=100)
    assert result.score["loss"] < 0.95 * result.base_score["loss"], f"{result.base_score} → {result.score}"
