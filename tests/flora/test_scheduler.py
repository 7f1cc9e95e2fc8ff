"""Batches are cut in order, and grouped by adapter where the weights hold one at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import flora.engine.scheduler
from flora.engine.scheduler import group_by_adapter, schedule


@given(items=st.lists(st.integers(), max_size=40), max_batch_size=st.integers(1, 12))
def test_every_item_runs_once_in_order_in_full_batches(items, max_batch_size):
    batches = list(schedule(items, max_batch_size))
    assert [index for batch in batches for index in batch.indices] == list(range(len(items)))
    assert [item for batch in batches for item in batch.items] == items
    assert all(len(batch.indices) == len(batch.items) for batch in batches)
    assert all(len(batch.items) == max_batch_size for batch in batches[:-1])
    assert all(1 <= len(batch.items) <= max_batch_size for batch in batches)


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
        "import sys, runpy; "
        f"module = runpy.run_path({str(path)!r}); "
        "assert [batch.items for batch in module['schedule']('abc', 2)] == [('a', 'b'), ('c',)]; "
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
