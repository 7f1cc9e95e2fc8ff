"""Every method as a pure function with one signature; the plain reference comes first and is what the others are tested against.

    x       (n, l, d_in)          n rows (requests) of l tokens
    weight  (d_out, d_in)         the base layer's matrix, shared by all rows
    A       (slots, r, d_in)      input side of every adapter on the device
    B       (slots, r, d_out)     output side, any scale folded in
    slots   (n,) int64            which adapter serves which row
    bias    (d_out,) or None      added once, after everything else
    returns (n, l, d_out)

flora family:  y[i] = Σ_k B[s_i,k] ∘ ((A[s_i,k] ∘ x[i]) @ weight.T) + bias         (Wen & Chaudhuri, ICLR 2024, Eq. 6)
lora family:   y[i] = x[i] @ weight.T + (x[i] @ A[s_i].T) @ B[s_i] + bias           (Hu et al., ICLR 2022)

The paper calls the input side B and the output side A; this project follows PEFT, as every checkpoint does: A = input side.

A and B may be of higher precision than x and weight, as in training: float32 factors of a bfloat16 layer. What is element by
element is then done in theirs, the product with the weight in the weight's, and y comes in that.

Adapters of different rank share one A and one B, padded to the largest. A `flora.routing.Routing` carries the true ranks, so that
no row pays for another row's rank. It depends on the batch alone: build it once a step and hand it to every layer (`routing=`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from flora.routing import Routing, gather_components, route

FAMILY: dict[str, str | None] = {
    "flora": "flora",
    "flora-expand": "flora",
    "flora-modulate": "flora",
    "bmm-lora": "lora",
    "loop-lora": "lora",
    "sgmv-lora": "lora",
    "mixed": None,
    "merged": None,
    "base": None,
}
"""Which family of adapters each method serves; `mixed` and `merged` take a tag's fLoRA adapter, else its LoRA one, `base` none."""

METHODS = tuple(FAMILY)

MODULATED_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Weights that `flora_modulate` forms at once: on a CPU what stays in the caches of a few cores, on a GPU a part of its memory.

Each core forms its adapters' and multiplies with them. One weight at a time is split between cores twice, once to form it and once
to multiply, which on two cores took twice as long."""


def _route_at_full_rank(A: Tensor, slots: Tensor, routing: Routing | None) -> Routing:
    if routing is not None:
        return routing
    num_slots, r, _ = A.shape
    return route(slots.tolist(), [r] * num_slots, r, A.device)


# ---------------------------------------------------------------------------------------------------------- reference


def flora_reference(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None) -> Tensor:
    """Eq. 6 read aloud, one example and one component at a time. For tests; pass float64."""
    y = x.new_zeros(*x.shape[:-1], weight.shape[0])
    for i, slot in enumerate(slots.tolist()):
        for k in range(A.shape[1]):
            y[i] += B[slot, k] * ((A[slot, k] * x[i]) @ weight.T)
    return y if bias is None else y + bias


def lora_reference(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None) -> Tensor:
    """LoRA one example at a time. For tests; pass float64."""
    y = x @ weight.T
    for i, slot in enumerate(slots.tolist()):
        y[i] += (x[i] @ A[slot].T) @ B[slot]
    return y if bias is None else y + bias


# --------------------------------------------------------------------------------------------------------------- flora


def expand_around(
    product: Callable[[Tensor], Tensor], x: Tensor, A: Tensor, B: Tensor, routing: Routing, bias: Tensor | None = None
) -> Tensor:
    """The expanded form around any layer: `product(x) = x @ weight.T`, for example a quantised layer, is called once.

    Every row is copied max(rank, 1) times: (n, l, d_in) → (m, l, d_in) → product → (m, l, d_out) → (n, l, d_out).
    """
    n, l, _ = x.shape
    rank = routing.uniform_rank
    if rank == 0:
        return _biased(product(x), bias)
    if rank is not None:
        a = routing.gather("A", A, rank, routing.slots)  # (n, rank, d_in)
        b = routing.gather("B", B, rank, routing.slots)  # (n, rank, d_out)
        if l == 1:
            return _expand_one_token(product, a, b, bias, x)
        copies = (x.unsqueeze(1) * a.unsqueeze(2)).flatten(0, 1)  # (n · rank, l, d_in)
        expanded = product(copies.to(x.dtype)).unflatten(0, (n, rank))  # (n, rank, l, d_out)
        scaled = _scaled(expanded, b.unsqueeze(2))
        y = scaled.sum(1) if rank > 1 else scaled.squeeze(1)
    else:
        a = routing.gather_expanded("A", A).unsqueeze(1)  # (m, 1, d_in)
        b = routing.gather_expanded("B", B).unsqueeze(1)  # (m, 1, d_out)
        expanded = product((x[routing.expanded_row] * a).to(x.dtype))  # (m, l, d_out)
        scaled = _scaled(expanded, b)
        y = scaled.new_zeros(n, l, scaled.shape[-1]).index_add_(0, routing.expanded_row, scaled)
    return _add_bias(y, bias).to(expanded.dtype)


def _expand_one_token(product: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """`expand_around` for rows of one token and one rank: a (n, rank, d_in), b (n, rank, d_out), x (n, 1, d_in) → (n, 1, d_out).

    Where the one token stands, stand its copies: nothing is laid out anew.
    """
    expanded = product((x * a).to(x.dtype))  # (n, rank, d_out)
    scaled = _scaled(expanded, b)
    y = scaled.sum(1, keepdim=True) if b.shape[1] > 1 else scaled
    return _add_bias(y, bias).to(expanded.dtype)


def _add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias, where y stands if it may: y is ours."""
    if bias is None:
        return y
    return y + bias if torch.is_grad_enabled() else y.add_(bias)


def _scaled(expanded: Tensor, b: Tensor) -> Tensor:
    """expanded ∘ b, where it stands if it may: at decode sizes, what is written anew costs as much as the arithmetic."""
    if torch.is_grad_enabled() or expanded.dtype != b.dtype:
        return expanded * b
    return expanded.mul_(b)


def flora_expand(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None, routing: Routing | None = None
) -> Tensor:
    """fLoRA as the paper computes it (Eq. 6): Σ rank rows through one shared product. Multiply-adds ≈ r · n · l · d_in · d_out."""
    routing = _route_at_full_rank(A, slots, routing)
    if routing.uniform_rank == 0:
        return linear(x, weight, bias)  # to the last bit: a bias added later rounds differently
    return expand_around(partial(linear, weight=weight), x, A, B, routing, bias)


def flora_modulate(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None, routing: Routing | None = None
) -> Tensor:
    """fLoRA with each adapter's weight ∘ (Bᵀ A) formed once for its rows. Multiply-adds ≈ (r + n · l) · d_in · d_out each."""
    routing = _route_at_full_rank(A, slots, routing)
    bytes_each = weight.numel() * max(weight.element_size(), A.element_size())
    at_once = max(1, MODULATED_BYTES["cpu" if x.device.type == "cpu" else "cuda"] // bytes_each)
    parts = []
    for block in routing.blocks:
        rows = x if block.rows is None else x.index_select(0, block.rows)
        if block.rank == 0:
            parts.append(linear(rows, weight, bias))
            continue
        of_each = rows.unflatten(0, (block.slots.shape[0], -1)).flatten(1, 2)  # (c, rows of each · l, d_in)
        for some_rows, some_slots in zip(of_each.split(at_once), block.slots.split(at_once), strict=True):
            factors = (gather_components(side, some_slots, block.rank) for side in (A, B))
            modulated = merge_flora(weight, *factors)
            parts.append(_products(some_rows, modulated, bias).unflatten(1, (-1, x.shape[1])).flatten(0, 1))
    y = parts[0] if len(parts) == 1 else torch.cat(parts)
    return y if routing.restore is None else y.index_select(0, routing.restore)


def _products(rows: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Each one's rows through its own weight: rows (c, m, d_in), weights (c, d_out, d_in) → (c, m, d_out)."""
    if rows.shape[0] == 1:
        return linear(rows, weights[0], bias)
    return torch.bmm(rows, weights.mT) if bias is None else torch.baddbmm(bias, rows, weights.mT)


def flora(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None, routing: Routing | None = None
) -> Tensor:
    """fLoRA in the form that `flora.cost` expects to be cheaper for this batch. Both forms are exact."""
    routing = _route_at_full_rank(A, slots, routing)
    form = routing.cheaper_form(x.shape[1], weight.element_size(), x.device.type)
    chosen = flora_modulate if form == "flora-modulate" else flora_expand
    return chosen(x, weight, A, B, slots, bias, routing)


def merge_flora(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """weight ∘ (Bᵀ A) of one adapter or several, in the weight's dtype: weight (d_out, d_in), A (…, r, d_in), B (…, r, d_out).

    Bᵀ A keeps the factors' precision, under autocast too: it lies around one, where bfloat16 has steps of a percent.
    """
    by_input = weight.T.is_contiguous()  # stored that way: what is formed has its layout
    with torch.autocast(weight.device.type, enabled=False):
        modulation = (A.mT @ B).mT if by_input else B.mT @ A
    # In place saves a pass over memory; a weight that is trained itself needs the modulation for its gradient.
    merged = modulation * weight if weight.requires_grad else modulation.mul_(weight)
    return merged.to(weight.dtype)


# ---------------------------------------------------------------------------------------------------------------- lora


def bmm_lora_around(
    product: Callable[[Tensor], Tensor], x: Tensor, A: Tensor, B: Tensor, routing: Routing, bias: Tensor | None = None
) -> Tensor:
    """`bmm_lora` around any layer: `product(x) = x @ weight.T`."""
    return _add_bmm(x, _biased(product(x), bias), A, B, routing)


def bmm_lora(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None, routing: Routing | None = None
) -> Tensor:
    """The paper's baseline: gather every row's factors, two batched products (torch.bmm), added to the layer's output.

    Rows of equal rank share one pair of products, so that a low rank is never padded to a high one.
    """
    return _add_bmm(x, linear(x, weight, bias), A, B, _route_at_full_rank(A, slots, routing))


def _add_bmm(x: Tensor, y: Tensor, A: Tensor, B: Tensor, routing: Routing) -> Tensor:
    for group in routing.rank_groups:
        rows = x if group.rows is None else x[group.rows]
        a = routing.gather("A", A, group.rank, group.slots)  # (n_group, rank, d_in)
        b = routing.gather("B", B, group.rank, group.slots)  # (n_group, rank, d_out)
        if group.rows is None:
            return torch.baddbmm(y, torch.bmm(x, a.transpose(1, 2)), b)
        y.index_add_(0, group.rows, torch.bmm(torch.bmm(rows, a.transpose(1, 2)), b))  # y is ours: fresh from the product
    return y


def loop_lora_around(
    product: Callable[[Tensor], Tensor], x: Tensor, A: Tensor, B: Tensor, routing: Routing, bias: Tensor | None = None
) -> Tensor:
    """`loop_lora` around any layer: `product(x) = x @ weight.T`."""
    return _add_by_loop(x, _biased(product(x), bias), A, B, routing)


def loop_lora(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None, routing: Routing | None = None
) -> Tensor:
    """Adapter by adapter, as PEFT serves a mixed batch: one gather, two products and one scatter per adapter."""
    return _add_by_loop(x, linear(x, weight, bias), A, B, _route_at_full_rank(A, slots, routing))


def _add_by_loop(x: Tensor, y: Tensor, A: Tensor, B: Tensor, routing: Routing) -> Tensor:
    for segment in routing.segments:
        if segment.rank > 0:
            a, b = A[segment.slot, : segment.rank], B[segment.slot, : segment.rank]
            y.index_add_(0, segment.rows, (segment.of(x) @ a.T) @ b)  # y is ours: fresh from the product
    return y


def sgmv_lora_around(
    product: Callable[[Tensor], Tensor], x: Tensor, A: Tensor, B: Tensor, routing: Routing, bias: Tensor | None = None
) -> Tensor:
    """`sgmv_lora` around any layer: `product(x) = x @ weight.T`."""
    return _add_by_segment(x, _biased(product(x), bias), A, B, routing)


def sgmv_lora(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, slots: Tensor, bias: Tensor | None = None, routing: Routing | None = None
) -> Tensor:
    """Segment by segment (Punica, Chen et al., MLSys 2024): rows are put in adapter order once, no adapter's factors are copied.

    The plain form of what `flora.kernels` does in two launches.
    """
    return _add_by_segment(x, linear(x, weight, bias), A, B, _route_at_full_rank(A, slots, routing))


def _add_by_segment(x: Tensor, y: Tensor, A: Tensor, B: Tensor, routing: Routing) -> Tensor:
    if not routing.rank_groups:
        return y
    in_order = x.index_select(0, routing.order).split([segment.rows.shape[0] for segment in routing.segments])
    adapted = [(segment, rows) for segment, rows in zip(routing.segments, in_order, strict=True) if segment.rank > 0]
    added = [(rows @ A[one.slot, : one.rank].T) @ B[one.slot, : one.rank] for one, rows in adapted]
    places = routing.order
    if len(adapted) < len(routing.segments):
        places = torch.cat([segment.rows for segment, _ in adapted])
    return y.index_add_(0, places, torch.cat(added))  # y is ours: fresh from the product


def merge_lora(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """weight + Bᵀ A of one adapter: weight (d_out, d_in), A (r, d_in), B (r, d_out), scale already folded into B."""
    return weight + B.T @ A


# --------------------------------------------------------------------------------------------------------------- mixed


@dataclass(frozen=True)
class AddedRows:
    """What `mixed` adds: the factors of the lora family and which of them serve which row, the other rows by the identity."""

    A: Tensor  # (slots, r, d_in)
    B: Tensor  # (slots, r, d_out)
    routing: Routing


def mixed_around(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    A: Tensor,
    B: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    added: AddedRows | None = None,
) -> Tensor:
    """`mixed` around any layer: `product(x) = x @ weight.T`, called once."""
    y = expand_around(product, x, A, B, routing, bias)
    return y if added is None else _add_bmm(x, y, added.A, added.B, added.routing)


def mixed(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    slots: Tensor,
    bias: Tensor | None = None,
    routing: Routing | None = None,
    added: AddedRows | None = None,
) -> Tensor:
    """Rows of both families in one batch and one product with the weight: those of the flora family as `flora_expand`, to the
    others, which the identity serves there, LoRA is added as by `bmm_lora`."""
    y = flora_expand(x, weight, A, B, slots, bias, routing)
    return y if added is None else _add_bmm(x, y, added.A, added.B, added.routing)


# -------------------------------------------------------------------------------------------------------------- shared


def _biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "flora": flora,
    "flora-expand": flora_expand,
    "flora-modulate": flora_modulate,
    "bmm-lora": bmm_lora,
    "loop-lora": loop_lora,
    "sgmv-lora": sgmv_lora,
    "mixed": mixed,
}

_AROUND: dict[str, Callable[..., Tensor]] = {
    "flora": expand_around,
    "flora-expand": expand_around,
    "bmm-lora": bmm_lora_around,
    "loop-lora": loop_lora_around,
    "sgmv-lora": sgmv_lora_around,
    "mixed": mixed_around,
}


def function_of(method: str) -> Callable[..., Tensor]:
    """The function of a batched method, by its name."""
    return _FUNCTIONS[method]


def around_function_of(method: str) -> Callable[..., Tensor] | None:
    """The form of a method that needs no weight, only the layer's product, or None where there is none (`flora-modulate`)."""
    return _AROUND.get(method)
