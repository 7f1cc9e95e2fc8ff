"""pass@k: how likely it is that one of k answers is right."""

from __future__ import annotations

import math


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate of pass@k from n answers of which c passed: 1 − C(n − c, k) / C(n, k).

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1. C(n − c, k) / C(n, k) is the product of
    1 − k / i for i from n − c + 1 to n; its logarithm is summed, so that nothing overflows and a small pass@k keeps its digits.
    ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 ≤ c ≤ n and 1 ≤ k ≤ n, not n = {n}, c = {c}, k = {k}")
    if n - c < k:
        return 1.0
    return -math.expm1(math.fsum(math.log1p(-k / i) for i in range(n - c + 1, n + 1)))
