"""From logits to the next token."""

import torch
from torch import Tensor


def sample_top_p(probs: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row from its nucleus (Holtzman et al., 2020, section 3.1).

    The nucleus is the most likely tokens, each kept while the tokens before it sum up to at most
    ``p``; equally likely ones come in ascending order of their ids.

    Args:
        probs: [B, V], each row a distribution. Left as it is.
        generator: source of randomness; None is torch's global one.

    Returns:
        int64 [B, 1].
    """
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs
    nucleus = sorted_probs.masked_fill(before > p, 0.0)
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    choice = torch.multinomial(nucleus, num_samples=1, generator=generator)
    return torch.gather(ids, -1, choice)


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
