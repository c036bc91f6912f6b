"""Log-probabilities of given tokens, and of the most likely ones."""

import math

import torch
from torch import Tensor

from llama.cache import on_device
from llama.request import Request

# Maximum number of float32 logits in a pass that scores prompts: 128 MiB.
SCORING_LOGITS = 2**25


def score_prompt(request: Request, start: int, logits: Tensor) -> bool:
    """Add the log-probabilities of the request's tokens after ``start``, given the logits [S, V]
    from ``start`` on; and their ranks, if wanted: 0 for the likeliest, ties by ascending id.

    Returns:
        Whether they are finite, except for individual tokens of probability 0.
    """
    targets = (request.prompt + request.last)[start + 1 : start + 1 + len(logits)]
    if not targets:
        return True
    tokens = on_device(targets, logits.device)
    counts = [request.params.top_logprobs] * len(targets)
    logits = logits[: len(targets)]
    _, totals, logprobs, tops = fetch(logits, tokens, counts)
    if request.ranks is not None:
        own = logits.gather(-1, tokens[:, None])
        ids = torch.arange(logits.shape[-1], device=logits.device)
        is_before = (logits > own) | ((logits == own) & (ids < tokens[:, None]))
        request.ranks += is_before.sum(-1).tolist()
    request.prompt_logprobs += logprobs
    request.prompt_top += tops
    return all(map(math.isfinite, totals))


def fetch(
    logits: Tensor, tokens: Tensor, counts: list[int]
) -> tuple[list[int], list[float], list[float], list[dict[int, float] | None]]:
    """Log-probabilities of each row i of logits [R, V], in one copy to the host: the only moment
    of a step in which the host waits for the device.

    Returns:
        - ``tokens`` [R];
        - log(sum(exp(logits))): finite if the logits are, except for individual -inf;
        - the tokens' log-probabilities;
        - the ``counts[i]`` highest log-probabilities by id, None if that is 0.
    """
    log_total = torch.logsumexp(logits, dim=-1)  # [R]
    scores = logits.gather(-1, tokens[:, None])[:, 0] - log_total
    columns = torch.stack((tokens.float(), log_total, scores))  # exact for ids < 2^24
    k = min(max(counts), logits.shape[-1])
    if k > 0:
        values, ids = logits.topk(k, dim=-1)
        columns = torch.cat((columns, ids.t().float(), values.t() - log_total))  # [3 + 2 k, R]
    chosen, totals, logprobs, *tops = columns.tolist()
    top = [
        {int(tops[j][i]): tops[k + j][i] for j in range(min(k, n))} or None
        for i, n in enumerate(counts)
    ]
    return [int(token) for token in chosen], totals, logprobs, top
