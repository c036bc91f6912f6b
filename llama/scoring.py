"""Log-probabilities of given tokens, and of the most likely ones."""

import torch
from torch import Tensor

from llama.request import Request

# Maximum number of float32 logits in a pass that scores prompts: 128 MiB.
SCORING_LOGITS = 2**25


def score_prompt(request: Request, start: int, logits: Tensor) -> bool:
    """Add the log-probabilities of the prompt's tokens after ``start``, given the logits [S, V]
    from ``start`` on.

    Returns:
        Whether they are finite, except for individual tokens of probability 0.
    """
    targets = request.prompt[start + 1 : start + 1 + len(logits)]
    if not targets:
        return True
    logits = logits[: len(targets)]
    log_total = torch.logsumexp(logits, dim=-1)
    index = torch.tensor(targets, device=logits.device)[:, None]
    scores = logits.gather(-1, index)[:, 0] - log_total
    request.prompt_logprobs += scores.tolist()
    request.prompt_top += top_logprobs(
        logits, log_total, [request.params.top_logprobs] * len(targets)
    )
    return bool(log_total.isfinite().all())


def top_logprobs(
    logits: Tensor, log_total: Tensor, counts: list[int]
) -> list[dict[int, float] | None]:
    """The ``counts[i]`` most likely tokens of each row i of logits; None if 0."""
    k = min(max(counts), logits.shape[-1])
    if k == 0:
        return [None] * len(counts)
    values, ids = logits.topk(k, dim=-1)
    rows = zip(counts, ids.tolist(), (values - log_total[:, None]).tolist(), strict=True)
    return [dict(zip(i[:n], v[:n], strict=True)) if n else None for n, i, v in rows]
