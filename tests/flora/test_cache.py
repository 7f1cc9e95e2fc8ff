"""Keys and values by row: whoever joins, moves or grows, the logits are those of transformers' own cache."""

from __future__ import annotations

import random

import pytest
import tiny_models
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from flora.engine import cache as cache_module
from flora.engine.cache import RowCache, SpeechCache, prompt_mask, token_mask

CPU = torch.device("cpu")


def assert_close(logits: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    difference = (logits - expected).abs().max().item()
    assert difference < 2e-4, f"{what}: max_diff {difference:.3g}"


class Sequence:
    """One running text: in a row here, and alone in a DynamicCache of its own."""

    def __init__(self, model, ids: list[int]) -> None:
        self.model, self.ids, self.num_read = model, ids, 0
        self.own = DynamicCache(config=model.config)

    def reference(self, length: int) -> torch.Tensor:
        """(vocabulary,): the logits after the next `length` tokens."""
        piece = torch.tensor([self.ids[self.num_read : self.num_read + length]])
        return self.model(input_ids=piece, past_key_values=self.own, use_cache=True).logits[0, -1]


@pytest.fixture(scope="module")
def models(checkpoints):
    return {name: tiny_models.load_plain(checkpoints[name].model) for name in ("code", "llama", "speech")}


def layers_of(model) -> int:
    return model.config.num_hidden_layers


@torch.no_grad()
def read_pieces(model, cache: RowCache, rows: list[Sequence], first_row: int, lengths: list[int]) -> None:
    """A piece of each text's prompt, in one forward."""
    starts = [row.num_read for row in rows]
    expected = [row.reference(length) for row, length in zip(rows, lengths, strict=True)]
    longest = max(lengths)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[place, :length] = torch.tensor(row.ids[row.num_read : row.num_read + length])
    cache.begin_prompts(first_row, starts, lengths, CPU)
    positions = torch.tensor(starts)[:, None] + torch.arange(longest)
    logits = model(
        input_ids=ids,
        attention_mask=prompt_mask(starts, longest, cache.window.width, CPU),
        position_ids=positions.clamp_max(95),
        past_key_values=cache,
        use_cache=True,
    ).logits
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert_close(logits[place, length - 1], expected[place], f"piece {row.num_read} + {length} in row {first_row + place}")
        row.num_read += length


@torch.no_grad()
def read_tokens(model, cache: RowCache, rows: list[Sequence], first_row: int = 0) -> None:
    """One more token of each text, in one forward."""
    positions = torch.tensor([row.num_read for row in rows])
    tokens = torch.tensor([[row.ids[row.num_read]] for row in rows])
    expected = [row.reference(1) for row in rows]
    width = int(positions.max()) + 1
    cache.begin_tokens(first_row, positions, width)
    logits = model(
        input_ids=tokens,
        attention_mask=token_mask(positions, width, torch.float32),
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    for place, row in enumerate(rows):
        assert_close(logits[place, 0], expected[place], f"token {row.num_read} in row {first_row + place}")
        row.num_read += 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["code", "llama"])
def test_texts_that_join_move_and_leave_at_random(name, seed, models):
    """Up to five rows; prompts in pieces of odd sizes; a row that leaves is filled by the last; what is reserved grows."""
    model, choose = models[name], random.Random(f"{name} {seed}")
    cache = RowCache(layers_of(model), max_rows=5, max_positions=96)
    decoding: list[Sequence] = []
    for _ in range(25):
        free = 5 - len(decoding)
        joining = [
            Sequence(model, [choose.randrange(1, 257) for _ in range(choose.choice((34, 47, 65, 96)))])
            for _ in range(min(free, choose.choice((0, 1, 1, 2, 3))))
        ]
        prompts = [choose.choice((1, 3, 7, 31, 32)) for _ in joining]
        if joining:
            for place, row in enumerate(joining):
                cache.reserve(len(decoding) + place + 1, len(row.ids))
            first = [choose.randint(1, length) for length in prompts]
            read_pieces(model, cache, joining, len(decoding), first)
            if decoding:
                read_tokens(model, cache, decoding)
            rest = [(row, length - row.num_read) for row, length in zip(joining, prompts, strict=True)]
            for place, (row, left) in enumerate(rest):
                if left:
                    read_pieces(model, cache, [row], len(decoding) + place, [left])
            decoding += joining
        for _ in range(choose.randint(1, 3)):
            going = [row for row in decoding if row.num_read < len(row.ids)]
            if len(going) == len(decoding) and decoding:
                read_tokens(model, cache, decoding)
        leaving = [row for row in decoding if row.num_read == len(row.ids) or choose.random() < 0.15]
        for row in leaving:
            place, last = decoding.index(row), len(decoding) - 1
            if place < last:
                cache.move(last, place, decoding[last].num_read)
                decoding[place] = decoding[last]
            decoding.pop()


@pytest.mark.parametrize("name", ["code", "llama"])
def test_several_pieces_at_once_from_different_starts(name, models):
    model = models[name]
    rows = [Sequence(model, [1 + (7 * place + step) % 256 for step in range(40)]) for place in range(3)]
    cache = RowCache(layers_of(model), max_rows=4, max_positions=96)
    cache.reserve(4, 40)
    read_pieces(model, cache, rows[:2], 1, [5, 1])
    read_pieces(model, cache, rows, 1, [3, 12, 7])  # the third one begins beside the others' second pieces
    read_pieces(model, cache, rows, 1, [1, 2, 30])
    read_tokens(model, cache, rows, 1)


@pytest.mark.parametrize("name", ["code", "llama"])
def test_a_context_filled_to_its_last_position(name, models):
    model = models[name]
    long, short = Sequence(model, [5 + place % 99 for place in range(96)]), Sequence(model, [9] * 20)
    cache = RowCache(layers_of(model), max_rows=2, max_positions=96)
    cache.reserve(2, 96)
    read_pieces(model, cache, [long, short], 0, [92, 3])
    for _ in range(4):
        read_tokens(model, cache, [long, short])
    assert long.num_read == 96


def test_what_is_reserved_doubles_and_stops_at_the_most():
    cache = RowCache(1, max_rows=11, max_positions=300)
    sizes = []
    for rows, positions in ((1, 5), (2, 5), (3, 70), (5, 70), (3, 129), (9, 300), (11, 300), (4, 4)):
        cache.reserve(rows, positions)
        sizes.append((cache.window.num_rows, cache.window.num_positions))
    assert sizes == [(1, 64), (2, 64), (4, 128), (8, 128), (8, 256), (11, 300), (11, 300), (11, 300)]


def shapes_reserved(cache: RowCache, *asked: tuple[int, int]) -> list[tuple[int, int]]:
    sizes = []
    for rows, positions in asked:
        cache.reserve(rows, positions)
        sizes.append((cache.window.num_rows, cache.window.num_positions))
    return sizes


@pytest.mark.parametrize(
    ("free_rows", "expected"),
    [
        (1000, [(1, 64), (8, 64), (8, 64), (8, 128), (8, 256)]),  # once more than one came, all that there may ever be
        (6, [(1, 64), (3, 64), (4, 64), (2, 128), (2, 256)]),  # as many as half of what is free holds, or are needed
        (0, [(1, 64), (2, 64), (4, 64), (2, 128), (2, 256)]),
        (None, [(1, 64), (2, 64), (4, 64), (4, 128), (4, 256)]),  # it is not known: twice what there was
    ],
)
def test_padded_rows_are_reserved_once_where_the_device_has_the_memory(free_rows, expected, models, monkeypatch):
    """Whatever moves the cache, captured steps are lost. One row of 64 positions counts as one."""
    model = models["code"]
    cache = RowCache(layers_of(model), 8, 300, "rows and positions")
    sizes = shapes_reserved(cache, (1, 5))
    rows = [Sequence(model, [3 + place] * 30) for place in range(2)]
    read_pieces(model, cache, rows[:1], 0, [4])
    row_bytes = cache.row_bytes

    def free(device: torch.device) -> int | None:
        return None if free_rows is None else free_rows * row_bytes - cache.window.num_rows * cache.row_bytes

    monkeypatch.setattr(cache_module, "free_bytes", free)
    sizes += shapes_reserved(cache, (2, 5), (4, 5))
    read_pieces(model, cache, rows[1:], 1, [9])
    sizes += shapes_reserved(cache, (2, 70), (2, 129))
    read_tokens(model, cache, rows)
    assert sizes == expected


def test_widths_grow_by_quarters_of_a_doubling_where_steps_are_captured_by_cuda():
    cache = RowCache(1, 4, 8000, "rows and positions")
    cache.reserve(4, 8000)
    widths = cache.step_widths(8000)
    assert widths[:16] == [64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048]
    assert widths[-1] == 8000 and len(widths) == 24
    for width in range(1, 8001):
        padded = cache.step_shape(0, 1, width)[1]
        assert padded in widths and width <= padded < width + max(64, width / 4)
    assert cache.step_widths(65) == [64, 128]
    plain = RowCache(1, 4, 1000, "positions")
    plain.reserve(1, 1000)
    assert plain.step_widths(1000) == [*range(64, 1000, 64), 1000]


def test_a_cache_that_could_not_grow_grows_later(models, monkeypatch):
    """The device was full when half of its layers had grown; a smaller request comes next."""
    model = models["code"]
    cache = RowCache(layers_of(model), max_rows=8, max_positions=96)
    cache.reserve(2, 64)
    rows = [Sequence(model, [3 + place] * 30) for place in range(4)]
    read_pieces(model, cache, rows[:2], 0, [4, 9])
    resized, made = cache_module._resized, []

    def full(*args):
        made.append(args)
        if len(made) > 2:
            raise torch.OutOfMemoryError("x")
        return resized(*args)

    with monkeypatch.context() as patched:
        patched.setattr(cache_module, "_resized", full)
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve(8, 96)
    read_tokens(model, cache, rows[:2])
    cache.reserve(3, 64)
    read_pieces(model, cache, rows[2:3], 2, [7])
    read_tokens(model, cache, rows[:3])
    cache.reserve(4, 96)
    read_pieces(model, cache, rows[3:], 3, [2])
    read_tokens(model, cache, rows)


def test_a_row_that_is_cleared_holds_nothing(models):
    model = models["code"]
    cache = RowCache(layers_of(model), max_rows=2, max_positions=96)
    cache.reserve(2, 64)
    rows = [Sequence(model, [3] * 30), Sequence(model, [4] * 30)]
    read_pieces(model, cache, rows, 0, [9, 9])
    for layer in cache.layers:
        layer.keys[0], layer.values[0] = float("nan"), float("inf")
    cache.clear(0)
    after = Sequence(model, [8] * 30)
    read_pieces(model, cache, [after], 0, [2])
    read_tokens(model, cache, [after, rows[1]])


# --------------------------------------------------------------------------------------------------------------- speech


class Transcript:
    """One clip: in a row here, and alone in transformers' cache."""

    def __init__(self, model, features: torch.Tensor, ids: list[int]) -> None:
        self.model, self.ids, self.num_read = model, ids, 0
        self.states = model.get_encoder()(features[None]).last_hidden_state  # (1, frames, d)
        config = model.config
        self.own = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def reference(self, length: int) -> torch.Tensor:
        piece = torch.tensor([self.ids[self.num_read : self.num_read + length]])
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.states),
            decoder_input_ids=piece,
            past_key_values=self.own,
            use_cache=True,
        )
        return output.logits[0, -1]


@torch.no_grad()
def read_clips(model, cache: SpeechCache, rows: list[Transcript], first_row: int, is_start: bool) -> None:
    """The start tokens of new clips, or one token more of each."""
    length = 2 if is_start else 1
    expected = [row.reference(length) for row in rows]
    ids = torch.tensor([row.ids[row.num_read : row.num_read + length] for row in rows])
    positions = torch.tensor([row.num_read for row in rows])
    if is_start:
        cache.begin_prompts(first_row, [0] * len(rows), [2] * len(rows), CPU)
        states, mask = torch.cat([row.states for row in rows]), prompt_mask((0,), 2, 2, CPU)
        places = torch.arange(2).expand_as(ids)
    else:
        width = int(positions.max()) + 1
        cache.begin_tokens(first_row, positions, width)
        states, places = torch.empty(len(rows), 0, model.config.d_model), positions[:, None]
        mask = token_mask(positions, width, torch.float32)
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=ids,
        decoder_attention_mask=mask,
        decoder_position_ids=places,
        past_key_values=cache,
        use_cache=True,
    ).logits
    for place, row in enumerate(rows):
        assert_close(logits[place, -1], expected[place], f"token {row.num_read} in row {first_row + place}")
        row.num_read += length


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_clips_that_join_move_and_leave_at_random(seed, models):
    model, choose = models["speech"], random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    cache = SpeechCache(model.config.decoder_layers, max_rows=4, max_positions=40)
    running: list[Transcript] = []
    for _ in range(20):
        joining = [
            Transcript(model, torch.randn(20, 100, generator=generator), [1, *(choose.randrange(2, 257) for _ in range(39))])
            for _ in range(min(4 - len(running), choose.choice((0, 1, 1, 2))))
        ]
        if joining:
            cache.reserve(len(running) + len(joining), choose.choice((12, 40)) if not running else 40)
            read_clips(model, cache, joining, len(running), is_start=True)
            running += joining
        for _ in range(choose.randint(1, 4)):
            if running and all(row.num_read < 12 for row in running):
                read_clips(model, cache, running, 0, is_start=False)
        for row in [row for row in running if row.num_read >= 12 or choose.random() < 0.2]:
            place, last = running.index(row), len(running) - 1
            if place < last:
                cache.move(last, place, running[last].num_read)
                running[place] = running[last]
            running.pop()
