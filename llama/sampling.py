"""From logits to the next token."""

import math

import torch
from torch import Tensor

# The nucleus is looked for among so many of the likeliest tokens before all of them are sorted.
_HEAD = 1024


def sample_top_p(probs: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row from its nucleus (Holtzman et al., 2020, section 3.1).

    The nucleus is the most likely tokens, each kept while the tokens before it sum up to at most
    ``p``; equally likely ones come in ascending order of their ids. The token is the one that
    ``torch.multinomial`` draws from the sorted nucleus: the largest of probability / exponential
    noise. Written out, because ``multinomial`` makes a CUDA device wait for its checks.

    Args:
        probs: [B, V], each row a distribution. Left as it is.
        generator: source of randomness; None is torch's global one.

    Returns:
        int64 [B, 1].
    """
    ranked, ids = _ranked_head(probs, p) or torch.sort(probs, dim=-1, descending=True, stable=True)
    before = torch.cumsum(ranked, dim=-1) - ranked
    nucleus = ranked.masked_fill(before > p, 0.0)
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    noise = torch.empty_like(nucleus).exponential_(generator=generator)
    choice = torch.argmax(nucleus / noise, dim=-1, keepdim=True)
    return torch.gather(ids, -1, choice)


def _ranked_head(probs: Tensor, p: float) -> tuple[Tensor, Tensor] | None:
    """The first of the sorted probabilities, with zeros behind them, and their ids; None if the
    nucleus may reach beyond them. Only for the CPU: sorting 128,000 numbers takes it 10 ms, and
    other devices would have to wait for the answer."""
    if probs.device.type != "cpu" or probs.shape[-1] <= _HEAD:
        return None
    head, ids = torch.topk(probs, _HEAD, dim=-1)  # in any order among equals
    kept = torch.cumsum(head, dim=-1) - head <= p
    smallest = head.masked_fill(~kept, math.inf).amin(dim=-1)
    if not (smallest > head[:, -1]).all():  # equals of the last one may have been left out
        return None
    ids, by_id = torch.sort(ids, dim=-1)
    head, by_rank = torch.sort(head.gather(-1, by_id), dim=-1, descending=True, stable=True)
    ranked = torch.zeros_like(probs)  # as long as the row: the noise and the sums are the same
    ranked[:, :_HEAD] = head
    return ranked, ids.gather(-1, by_rank)


def next_tokens(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Next token of every row of ``logits`` [B, V]: the likeliest at temperature 0, else a draw.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        return torch.argmax(logits, dim=-1)
    probs = torch.softmax(logits / temperature, dim=-1)
    return sample_top_p(probs, top_p, generator=generator)[:, 0]
