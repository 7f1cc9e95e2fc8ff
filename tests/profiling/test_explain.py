"""The sentences that say why a decode step costs what it costs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flora.ops import METHODS
from profiling.explain import why


def result_of(ranks: dict[str, tuple[int, ...]]) -> SimpleNamespace:
    rows = ({"adapter": "lua"}, {"adapter": "rb"}, {"adapter": None})
    return SimpleNamespace(methods={method: SimpleNamespace(ranks=r) for method, r in ranks.items()}, rows=rows)


def test_rows_and_ranks_are_the_batch_s():
    said = why(result_of({"flora": (4, 4, 0), "bmm-lora": (4, 4, 0)}))
    assert "fLoRA at rank 4 sends 4 rows per request" in said
    assert "two small batched products of rank 4" in said
    assert "CPU in float32" in said


def test_rank_one_has_no_extra_rows_to_explain():
    said = why(result_of({"flora": (1, 1, 0), "bmm-lora": (1, 1, 0)}))
    assert "sends one row per request" in said and "Extra rows" not in said


def test_mixed_ranks_are_a_range():
    assert "rank 1 to 8 sends 1 to 8 rows" in why(result_of({"flora": (8, 1, 0), "base": (0, 0, 0)}))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_words_with_and_without_adapters(method):
    other = "base" if method != "base" else "flora"
    assert why(result_of({method: (4, 2, 0), other: (0, 0, 0)})).count(".") >= 2
    assert why(result_of({method: (0, 0, 0), other: (0, 0, 0)})).count(".") >= 2


def test_nothing_measured_says_nothing():
    assert why(result_of({})) == ""
