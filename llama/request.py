"""Requests: sequences that the engine continues, and the events that report their tokens."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llama.chat_template import AnyChatFormat
from llama.config import ModelArgs
from llama.detokenizer import Detokenizer
from llama.sampling import SamplingParams
from llama.tokenizer import AnyTokenizer


class TokenEvent(NamedTuple):
    """One token of one sequence.

    Attributes:
        row: index of the prompt.
        token: its id.
        text: the text that it adds. May be empty: a character that spans several tokens comes with
            the last of them, and a possible start of a stop string is held back until it is ruled
            out.
        logprob: natural logarithm of its probability under the model (before temperature and
            top_p); None unless requested. 0.0 for a prompt's first token.
        finish_reason: "stop" for a stop token, and for the last token of a stop string; "length"
            for the last token allowed; else None.
        top_logprobs: log-probabilities of the most likely tokens by id, in descending order; None
            unless requested.
    """

    row: int
    token: int
    text: str
    logprob: float | None
    finish_reason: Literal["stop", "length"] | None
    top_logprobs: dict[int, float] | None = None


class Constraint(Protocol):
    """Which tokens may come next, such as those of a grammar."""

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of all other tokens to -inf."""

    def accept(self, token: int) -> None:
        """Go on after this token."""


@dataclasses.dataclass(eq=False)
class Request:
    """One sequence.

    Attributes:
        row: the caller's index of it, used in events and messages.
        limit: maximum number of tokens to generate.
        scored_from: index of the first token of the prompt whose log-probability is computed; None:
            of none.
        tokens: generated so far, including a stop token.
        n_reused: prompt tokens found in the prefix cache.
        finish_reason: None while it runs.
    """

    prompt: list[int]
    params: SamplingParams
    row: int
    limit: int
    stop_ids: set[int]
    detokenizer: Detokenizer
    scored_from: int | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    n_reused: int = 0
    finish_reason: Literal["stop", "length", "cancelled"] | None = None
    # used by the engine:
    slot: int | None = None
    n_prefilled: int = 0  # prompt tokens whose keys and values are in the slot
    logits: Tensor | None = None  # [V], of the prompt's last token
    prompt_logprobs: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    prompt_top: list[dict[int, float] | None] = dataclasses.field(default_factory=lambda: [None])
    # of ``Llama.score``: the token after the prompt, and the ranks of the scored tokens
    last: list[int] = dataclasses.field(default_factory=list)
    ranks: list[int] | None = None
    constraint: Constraint | None = None  # on the first rank, which samples

    @property
    def n_unscored(self) -> int:
        """Tokens at the start of the prompt whose logits aren't needed."""
        return (len(self.prompt) if self.scored_from is None else self.scored_from) - 1

    @property
    def waits_for_prefill(self) -> bool:
        is_needed = self.limit > 0 or self.scored_from is not None
        return is_needed and not self.finish_reason and self.n_prefilled < len(self.prompt)

    def next_chunk(self) -> tuple[int, bool]:
        """The number of tokens to prefill together, and whether the logits of all are needed."""
        if self.scored_from is not None and self.n_prefilled < self.n_unscored:
            return self.n_unscored - self.n_prefilled, False
        return len(self.prompt) - self.n_prefilled, self.scored_from is not None

    def add_token(
        self, token: int, logprob: float | None, top: dict[int, float] | None
    ) -> TokenEvent:
        """Append a generated token."""
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        reason: Literal["stop", "length"] | None = None
        if token in self.stop_ids:
            reason, text = "stop", self.detokenizer.add(None, final=True)
        else:
            reason = "length" if len(self.tokens) == self.limit else None
            text = self.detokenizer.add(token, final=reason is not None)
            if self.detokenizer.stopped:
                reason = "stop"
        return TokenEvent(self.row, token, text, logprob, reason, top)

    def is_stop_token(self, event: TokenEvent) -> bool:
        """Whether the token of its last event is a stop token, and not the end of a stop string."""
        return event.finish_reason == "stop" and event.token in self.stop_ids

    def prompt_events(self) -> list[TokenEvent]:
        """The prompt's own tokens, for ``echo``."""
        events = []
        for i, token in enumerate(self.prompt):
            is_last = i == len(self.prompt) - 1 and self.limit == 0
            text = self.detokenizer.add(token, final=is_last)
            logprob = self.prompt_logprobs[i] if self.params.logprobs else None
            top = self.prompt_top[i] if self.params.top_logprobs else None
            reason: Literal["length"] | None = "length" if is_last else None
            events.append(TokenEvent(self.row, token, text, logprob, reason, top))
        return events


@dataclasses.dataclass(eq=False)
class Group:
    """Requests that start decoding together and draw from one generator."""

    requests: list[Request]
    generator: torch.Generator | None
    is_echoed: bool = False


def constrained(rows: Sequence[tuple[Request, Group]], logits: Tensor) -> Tensor:
    """The logits [R, V], with -inf for tokens that the constraints of their requests exclude."""
    if all(request.constraint is None for request, _ in rows):
        return logits
    logits = logits.clone()
    for row, (request, _) in zip(logits, rows, strict=True):
        if request.constraint is not None:
            request.constraint.mask(row)
    return logits


def token_ids(tokens: Sequence[int], row: int) -> list[int]:
    """The ids as ints. Raises TypeError if they aren't integers."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise TypeError(
            f"prompt {row} is {tokens!r:.60}, expected a list of token ids ({error})"
        ) from None


def check_vocabulary(prompt: Sequence[int], row: int, vocab_size: int) -> None:
    """Raise ValueError if an id is outside the vocabulary."""
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt {row} has the token id {token}, but the vocabulary is 0 to "
                f"{vocab_size - 1}"
            )


def new_request(
    tokens: Sequence[int],
    params: SamplingParams,
    row: int,
    truncate: bool,
    args: ModelArgs,
    tokenizer: AnyTokenizer,
    formatter: AnyChatFormat,
) -> Request:
    """Create a request to continue a prompt.

    Args:
        truncate: drop the start of a prompt that is too long; see ``Llama.stream``.

    Raises:
        TypeError: the prompt isn't a list of ids.
        ValueError: it is empty, too long, or has an id outside the vocabulary.
    """
    prompt = token_ids(tokens, row)
    if not prompt:
        raise ValueError(f"prompt {row} has no tokens, expected at least one (such as bos_id)")
    if truncate and len(prompt) > args.max_seq_len:
        half = args.max_seq_len // 2
        n = args.max_seq_len - min(half, half if params.max_gen_len is None else params.max_gen_len)
        start = prompt[:1] if prompt[0] == tokenizer.bos_id and n > 1 else []
        prompt = start + prompt[len(prompt) - n + len(start) :]
    if len(prompt) > args.max_seq_len:
        raise ValueError(
            f"prompt {row} has {len(prompt)} tokens, but max_seq_len is {args.max_seq_len}: "
            "shorten it, build with a larger max_seq_len, or let truncate=True keep the end of "
            "a text"
        )
    check_vocabulary(prompt, row, args.vocab_size)
    is_scored = params.echo and (params.logprobs or params.top_logprobs > 0)
    limit = args.max_seq_len - 1 if params.max_gen_len is None else params.max_gen_len
    starts_text = prompt[-1] == tokenizer.bos_id or formatter.starts_answer(prompt)
    return Request(
        prompt,
        params,
        row,
        min(limit, args.max_seq_len - len(prompt)),
        tokenizer.stop_tokens | params.stop_ids,
        Detokenizer(tokenizer, starts_text=params.echo or starts_text),
        scored_from=1 if is_scored else None,
    )
