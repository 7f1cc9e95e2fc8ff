"""The model's tokens: which may be chosen, which end an answer, and what text they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flora.models import LoadedModel

CONTEXT_TOKENS = 5
"""How many of the prompt's tokens the new ones are decoded behind: one would do, were it not for tokens that show nothing."""


@dataclass(frozen=True)
class Vocabulary:
    """The model's special tokens and how its tokens become text."""

    stop_ids: frozenset[int]
    suppressed: tuple[int, ...]  # never chosen
    suppressed_at_begin: tuple[int, ...]  # not chosen as the first new token
    decode: Callable[[Sequence[int]], str]

    def text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text of the tokens after a prompt.

        They are decoded behind the prompt's last tokens, since some tokenizers (Llama-2's) drop the space that a text begins with.
        """
        context = [*prompt_ids[-CONTEXT_TOKENS:]]
        before, whole = self.decode(context), self.decode([*context, *token_ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(token_ids)

    def text_so_far(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """`text`, without a last character of which not all bytes have come."""
        return self.text(prompt_ids, token_ids).rstrip("\ufffd")

    def masked(self, logits: Tensor, first: bool) -> Tensor:
        """Logits (n, vocabulary) with the model's own suppressions (Whisper's generation configuration): -inf cannot be chosen.

        first: these are the logits of a first new token.
        """
        suppressed = self.suppressed + (self.suppressed_at_begin if first else ())
        if suppressed:
            logits = logits.clone()
            logits[:, list(suppressed)] = float("-inf")
        return logits


def vocabulary_of(loaded: LoadedModel) -> Vocabulary:
    """As the model's generation configuration and its tokenizer have it."""
    generation = loaded.model.generation_config
    stop = generation.eos_token_id if generation.eos_token_id is not None else loaded.tokenizer.eos_token_id
    stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    return Vocabulary(
        stop_ids=frozenset(stops),
        suppressed=tuple(getattr(generation, "suppress_tokens", None) or ()),
        suppressed_at_begin=tuple(getattr(generation, "begin_suppress_tokens", None) or ()),
        decode=partial(loaded.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )


def choose_tokens(
    logits: Tensor, vocabulary: Vocabulary, first: bool, temperatures: Sequence[float], samplers: Sequence[torch.Generator | None]
) -> tuple[list[int], list[float]]:
    """A token for each row of logits (n, vocabulary), and the logit it was chosen by; a row without sampler takes the likeliest.

    The value is NaN or infinite for a row whose logits are.
    """
    logits = vocabulary.masked(logits.float(), first)
    best, tokens = logits.max(-1)
    token_ids, values = tokens.tolist(), best.tolist()
    for row, (temperature, sampler) in enumerate(zip(temperatures, samplers, strict=True)):
        if sampler is not None and abs(values[row]) < float("inf"):
            below_best = (logits[row] - best[row]).cpu().double()  # at most 0: no temperature, however low, overflows
            probabilities = torch.softmax(below_best / temperature, -1)
            token_ids[row] = int(torch.multinomial(probabilities, 1, generator=sampler))
            values[row] = float(logits[row, token_ids[row]])
    return token_ids, values
