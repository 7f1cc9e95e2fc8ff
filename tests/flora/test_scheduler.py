"""Who runs in a step: budgets, pieces of prompts, turns of sessions, rows that stay in their places."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import flora.engine.scheduler
from flora.engine.scheduler import Scheduler, group_by_adapter


@dataclass(eq=False)
class Item:
    num_prompt_tokens: int = 1
    session: object = None
    divisible: bool = True
    adapter: str | None = None
    num_prefilled: int = 0
    num_passes: int = 0
    num_new_tokens: int = 0


def run(scheduler: Scheduler, admit=lambda item: True):
    """One step as the engine makes it: schedule, read the pieces, let those that have read all of theirs decode."""
    plan = scheduler.schedule(admit)
    for chunk in plan.prefill:
        assert chunk.start == chunk.item.num_prefilled and chunk.length > 0
        chunk.item.num_prefilled += chunk.length
        if chunk.is_last:
            assert scheduler.prefilling[0] is chunk.item, "its row is not the next behind those that decode"
            scheduler.prefilled(1)
    for item in plan.decode:
        item.num_new_tokens += 1
    return plan


def test_a_step_keeps_its_budget_and_reads_long_prompts_in_pieces():
    scheduler = Scheduler(max_rows=4, max_batch_tokens=10)
    short, long, later = Item(3), Item(25), Item(4)
    for item in (short, long, later):
        scheduler.add(item)
    pieces = []
    for _ in range(5):
        plan = run(scheduler)
        assert len(plan.decode) + sum(chunk.length for chunk in plan.prefill) <= 10
        pieces.append([(chunk.item, chunk.start, chunk.length) for chunk in plan.prefill])
    assert pieces == [
        [(short, 0, 3), (long, 0, 7)],
        [(long, 7, 9)],  # one token of the ten is decoded
        [(long, 16, 9)],
        [(later, 0, 4)],
        [],
    ]
    assert scheduler.decoding == [short, long, later]


def test_a_prompt_that_cannot_be_cut_waits_for_a_step_of_its_own():
    scheduler = Scheduler(max_rows=4, max_batch_tokens=10)
    small, large, last = Item(6, divisible=False), Item(50, divisible=False), Item(2, divisible=False)
    for item in (small, large, last):
        scheduler.add(item)
    assert [chunk.item for chunk in run(scheduler).prefill] == [small]
    assert [chunk.item for chunk in run(scheduler).prefill] == [large], "larger than the budget, it is read alone"
    assert [chunk.item for chunk in run(scheduler).prefill] == [last]


def test_no_more_run_than_there_are_rows():
    scheduler = Scheduler(max_rows=3, max_batch_tokens=100)
    items = [Item() for _ in range(8)]
    for item in items:
        scheduler.add(item)
    run(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (3, 5)
    scheduler.remove(items[1])
    run(scheduler)
    assert scheduler.decoding == [items[0], items[2], items[3]]
    assert scheduler.num_waiting == 4


def test_sessions_take_turns():
    """Who sends hundreds of requests does not keep out who sends one."""
    scheduler = Scheduler(max_rows=1, max_batch_tokens=100)
    crowd = [Item(session="crowd") for _ in range(200)]
    pair = [Item(session="pair") for _ in range(2)]
    for item in [*crowd, *pair]:
        scheduler.add(item)
    order = []
    for _ in range(6):
        run(scheduler)
        (item,) = scheduler.decoding
        scheduler.remove(item)
        order.append(item)
    assert order == [crowd[0], pair[0], crowd[1], pair[1], crowd[2], crowd[3]]


def test_a_request_without_a_slot_lets_others_pass_but_not_for_ever():
    scheduler = Scheduler(max_rows=2, max_batch_tokens=100)
    stuck = Item(adapter="stuck")
    others = [Item() for _ in range(20)]
    for item in [stuck, *others]:
        scheduler.add(item)
    served = []
    for _ in range(12):
        run(scheduler, admit=lambda item: item is not stuck)
        for item in list(scheduler.decoding):
            scheduler.remove(item)
            served.append(item)
    assert served == others[: scheduler.max_passes], "it has to be passed by so many, and no more"
    run(scheduler)
    assert scheduler.decoding[0] is stuck


@pytest.mark.parametrize("seed", range(30))
def test_rows_follow_the_moves(seed):
    """What `remove` says, done to an array of rows, keeps every running request's row under it, in a random run of 300 steps."""
    choose = random.Random(seed)
    scheduler = Scheduler(max_rows=choose.randint(1, 9), max_batch_tokens=choose.randint(10, 40))
    rows: dict[int, Item] = {}
    arrived, gone = [], []
    for _ in range(300):
        for _ in range(choose.choice((0, 0, 1, 2, 5))):
            arrived.append(Item(choose.randint(1, 60), session=choose.randint(0, 3), divisible=choose.random() < 0.7))
            scheduler.add(arrived[-1])
        plan = scheduler.schedule(lambda item: choose.random() < 0.8)
        assert plan.decode == tuple(scheduler.decoding[: len(plan.decode)])
        first = len(scheduler.decoding)
        for place, chunk in enumerate(plan.prefill):
            rows[first + place] = chunk.item if chunk.start == 0 else rows[first + place]
            assert rows[first + place] is chunk.item, "a prompt goes on in another row than it began in"
            chunk.item.num_prefilled += chunk.length
        for chunk in plan.prefill:
            if chunk.is_last:
                scheduler.prefilled(1)
        assert all(rows[place] is item for place, item in enumerate(scheduler.decoding))
        leaving = min(choose.choice((0, 0, 1, 3)), scheduler.num_running)
        for item in choose.sample([*scheduler.decoding, *scheduler.prefilling], leaving):
            moves = scheduler.remove(item)
            for source, target in moves:
                if source in rows:
                    rows[target] = rows[source]
            gone.append(item)
        running = [*scheduler.decoding, *scheduler.prefilling]
        assert all(rows[place] is item for place, item in enumerate(running) if item.num_prefilled)
        assert scheduler.num_running <= scheduler.max_rows
        assert len(arrived) == len(gone) + scheduler.num_running + scheduler.num_waiting, "a request is lost"
        assert scheduler.num_waiting == len(list(scheduler.waiting()))


@given(adapters=st.lists(st.sampled_from(["lua", "rb", "jl", None]), max_size=20))
def test_groups_hold_one_adapter_each_and_every_row_once(adapters):
    groups = group_by_adapter(adapters)
    assert sorted(index for group in groups for index in group) == list(range(len(adapters)))
    for group in groups:
        assert list(group) == sorted(group)
        assert len({adapters[index] for index in group}) == 1
    named = [adapters[group[0]] for group in groups]
    assert len(named) == len(set(named)), "an adapter is in two groups"
    assert [group[0] for group in groups] == sorted(group[0] for group in groups), "not in the order of first appearance"


def test_the_scheduler_runs_without_torch():
    """It is plain Python: loaded from its file alone, it brings in no tensor library."""
    path = Path(flora.engine.scheduler.__file__)
    program = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('scheduler', {str(path)!r}); "
        "module = importlib.util.module_from_spec(spec); sys.modules['scheduler'] = module; spec.loader.exec_module(module); "
        "assert not module.Scheduler(2, 8).schedule(lambda item: True); "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
