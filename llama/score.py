"""Log-probabilities of continuations, for evaluation: ``Llama.score``."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama.completions import run
from llama.distributed import collectives
from llama.distributed.collectives import check_same_on_all_ranks, raise_on_all_ranks
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
        ValueError: a part is empty, a pair is too long, or an id is outside of the vocabulary.
        FloatingPointError, RankError: as in ``Llama.stream``.
    """
    params = SamplingParams(0, temperature=0, top_logprobs=top_logprobs)
    requests = [_request(llm, i, pair, params) for i, pair in enumerate(pairs)]
    # so that neighbours share a prefix
    requests.sort(key=lambda request: (request.prompt, request.last))
    groups = llm.model.groups
    if groups.n_replicas > 1:
        every = {"pairs": [[request.prompt, request.last] for request in requests]}
        check_same_on_all_ranks("Llama.score", every, collectives.world)
    n_here = -(-len(requests) // groups.n_replicas)
    own = requests[groups.replica * n_here :][:n_here]
    with raise_on_all_ranks(), llm.model.lock:
        for _ in run(llm.engine, "Llama.score", own, params, new_generator(0, llm.model.device)):
            pass
    found = [(r.row, r.prompt_logprobs[1:], r.ranks, r.prompt_top[1:]) for r in own]
    scores: list[Any] = [None] * len(requests)
    parts = groups.gather_from_replicas(found) if groups.n_replicas > 1 else [found]
    by_row = {request.row: request for request in requests}
    for row, logprobs, ranks, tops in (each for part in parts for each in part):
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
    width = llm.model.params.max_seq_len
    pairs: list[tuple[list[int], list[int]]] = []
    counts = []
    for text in texts:
        tokens = [llm.tokenizer.bos_id, *_encode(llm, text)]
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
    context, continuation = pair
    if isinstance(context, str) and isinstance(continuation, str):
        ids = _encode(llm, context + continuation)
        n = len(_encode(llm, context.rstrip()))
        context, continuation = [llm.tokenizer.bos_id, *ids[:n]], ids[n:]
    elif isinstance(context, str) or isinstance(continuation, str):
        raise TypeError(f"pair {row} has a text and ids, expected two texts or two lists of ids")
    else:
        context, continuation = [*context], [*continuation]
    if not context or not continuation:
        part = "continuation" if context else "context"
        raise ValueError(f"the {part} of pair {row} has no tokens, expected at least one")
    # the last token isn't fed: its log-probability needs the logits before it
    tokens = token_ids([*context, *continuation], row)
    check_vocabulary(tokens[-1:], row, llm.model.params.vocab_size)
    request: Request = llm.engine.request(tokens[:-1], params, row)
    request.last, request.ranks, request.scored_from = tokens[-1:], [], len(context)
    return request


def _encode(llm: Any, text: Text) -> list[int]:
    if not isinstance(text, str):
        return [*text]
    ids: list[int] = llm.tokenizer.encode(text, bos=False, eos=False)
    return ids
