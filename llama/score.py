"""Log-probabilities of continuations, for evaluation: ``Llama.score``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama.completions import run
from llama.distributed import collectives
from llama.distributed.collectives import (
    check_same_on_all_ranks,
    fail_fast,
    raise_on_all_ranks,
)
from llama.request import Request, check_vocabulary, token_ids
from llama.sampling import SamplingParams, new_generator

Text = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-probabilities of a continuation.

    Attributes:
        tokens: the continuation's ids.
        logprobs: of each token, natural logarithm, in float32.
        ranks: of each token: 0 for the likeliest one; ties are ordered by ascending id.
        top: the ``top_logprobs`` highest log-probabilities at each token by id, in descending
            order.
    """

    tokens: list[int]
    logprobs: list[float]
    ranks: list[int]
    top: list[dict[int, float]]

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation."""
        return sum(self.logprobs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding gives this continuation."""
        return not any(self.ranks)


def score(llm: Any, pairs: Sequence[tuple[Text, Text]], *, top_logprobs: int = 0) -> list[Score]:
    """The log-probabilities of continuations, each given its context, in the order of ``pairs``.

    A prefix that contexts share is computed once. Both parts of a pair have at least one token, and
    together at most max_seq_len + 1.

    Args:
        pairs: (context, continuation), each of ids or a text. Texts are encoded as one, after a
            begin-of-text token, and divided where the context's own encoding ends; spaces at the
            end of the context belong to the continuation.
        top_logprobs: see ``Score.top``.

    Raises:
        TypeError: a part is neither a text nor a list of ids, or the parts differ in kind.
        ValueError: a part is empty, a pair is too long, an id is outside the vocabulary, or ranks
            have different pairs.
        FloatingPointError, RankError: as in ``Llama.stream``.
    """
    params = SamplingParams(0, temperature=0, top_logprobs=top_logprobs)
    requests = [_request(llm, i, pair, params) for i, pair in enumerate(pairs)]
    # so that neighbours share a prefix
    requests.sort(key=lambda request: (request.prompt, request.last))
    with fail_fast():
        every = {"pairs": [(r.row, r.prompt, r.last, r.scored_from) for r in requests]}
        check_same_on_all_ranks("Llama.score", every, collectives.world)
    groups = llm.model.groups
    n_here = -(-len(requests) // groups.n_replicas)
    own = requests[groups.replica * n_here :][:n_here]
    with raise_on_all_ranks(), llm.model.lock:
        for _ in run(llm.engine, "Llama.score", own, params, new_generator(0, llm.model.device)):
            pass
    found = [(r.row, r.prompt_logprobs[1:], r.ranks, r.prompt_top[1:]) for r in own]
    scores: list[Any] = [None] * len(requests)
    by_row = {request.row: request for request in requests}
    every_part = groups.gather_from_replicas(found)
    for row, logprobs, ranks, tops in (each for part in every_part for each in part):
        request = by_row[row]
        ids = (request.prompt + request.last)[request.scored_from :]
        top = [{int(token): x for token, x in (each or {}).items()} for each in tops]
        scores[row] = Score(ids, logprobs, ranks or [], top)
    return scores


def score_rolling(llm: Any, texts: Sequence[Text], *, top_logprobs: int = 0) -> list[Score]:
    """The log-probabilities of whole texts, of any length, after a begin-of-text token.

    A text is divided into windows of max_seq_len tokens, the last of which overlaps with the one
    before. Each token counts once, in the first window that has it; the first token of a window is
    given the token before it (the rolling log-likelihood of lm-evaluation-harness).

    For errors, see ``score``.
    """
    if isinstance(texts, str):
        raise TypeError("texts is a str, expected a list of them: write [text]")
    args = llm.model.params
    width = args.max_seq_len
    pairs: list[tuple[list[int], list[int]]] = []
    counts = []
    for row, text in enumerate(texts):
        ids = _encode(llm, text) if isinstance(text, str) else token_ids(text, row)
        check_vocabulary(ids, row, args.vocab_size)
        tokens = [llm.tokenizer.bos_id, *ids]
        starts = range(1, len(tokens), width)
        counts.append(len(starts))
        for start in starts:
            end = min(start + width, len(tokens))
            pairs.append((tokens[max(0, end - 1 - width) : start], tokens[start:end]))
    found = iter(score(llm, pairs, top_logprobs=top_logprobs))
    return [_joined([next(found) for _ in range(n)]) for n in counts]


def _joined(parts: list[Score]) -> Score:
    fields = ("tokens", "logprobs", "ranks", "top")
    return Score(*([x for part in parts for x in getattr(part, name)] for name in fields))


def _request(llm: Any, row: int, pair: tuple[Text, Text], params: SamplingParams) -> Request:
    try:
        context, continuation = () if isinstance(pair, str) else pair
    except (TypeError, ValueError):
        raise TypeError(
            f"pair {row} is {pair!r:.60}, expected (context, continuation), two texts or two lists "
            "of ids"
        ) from None
    shortage = "expected at least one"
    if isinstance(context, str) and isinstance(continuation, str):
        ids = _encode(llm, context + continuation)
        n = len(_encode(llm, context.rstrip()))
        if continuation:
            whole = context + continuation
            shortage = f"as the last token of {whole[-20:]!r} begins in the context: give ids"
        context, continuation = [llm.tokenizer.bos_id, *ids[:n]], ids[n:]
    elif isinstance(context, str) or isinstance(continuation, str):
        raise TypeError(f"pair {row} has a text and ids, expected two texts or two lists of ids")
    context, continuation = token_ids(context, row), token_ids(continuation, row)
    if not context or not continuation:
        part = "continuation" if context else "context"
        raise ValueError(f"the {part} of pair {row} has no tokens, {shortage}")
    args = llm.model.params
    if (n_tokens := len(context) + len(continuation)) > args.max_seq_len + 1:
        raise ValueError(
            f"pair {row} has {n_tokens} tokens, but max_seq_len is {args.max_seq_len}, expected at "
            "most one more: drop the start of the context, or build with a larger max_seq_len"
        )
    # the last token isn't fed: its log-probability needs the logits before it
    check_vocabulary(continuation[-1:], row, args.vocab_size)
    request: Request = llm.engine.request([*context, *continuation[:-1]], params, row)
    request.last, request.ranks, request.scored_from = continuation[-1:], [], len(context)
    return request


def _encode(llm: Any, text: str) -> list[int]:
    ids: list[int] = llm.tokenizer.encode(text, bos=False, eos=False)
    return ids
