"""pass@k against exact combinatorics."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora.evaluate.pass_at_k import pass_at_k


@st.composite
def counts(draw):
    n = draw(st.integers(1, 200))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@given(counts())
def test_equals_the_ratio_of_binomials(drawn):
    n, c, k = drawn
    exact = 1 - Fraction(comb(n - c, k), comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-12, abs=0)


@pytest.mark.parametrize("n", (1, 3, 7))
def test_is_the_mean_over_all_choices_of_k_answers(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        passed = [True] * c + [False] * (n - c)
        chosen = [any(group) for group in itertools.combinations(passed, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(chosen) / len(chosen), abs=1e-15)


def test_keeps_its_digits_where_binomials_overflow():
    n = 100_000
    assert pass_at_k(n, 1, 1) == pytest.approx(1 / n, rel=1e-12)
    assert pass_at_k(n, 1, 7) == pytest.approx(7 / n, rel=1e-12)
    assert pass_at_k(n, n // 2, n // 2 + 1) == 1.0


def test_of_one_answer_is_whether_it_passed():
    assert (pass_at_k(1, 0, 1), pass_at_k(1, 1, 1)) == (0.0, 1.0)


@pytest.mark.parametrize(("n", "c", "k"), [(0, 0, 1), (5, 6, 1), (5, -1, 1), (5, 2, 6), (5, 2, 0)])
def test_nonsense_is_refused(n, c, k):
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)
