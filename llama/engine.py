"""The engine: continuous batching of requests over the slots of the KV cache.

- Each request gets a free slot. Decoding requests are kept in slots 0, 1, ..., so that a decoding
  pass reads the cache without a gather; slots are swapped when a request starts or finishes.
- A slot keeps its keys and values after its request has finished. A new request reuses the longest
  prefix cached in any slot (prefix caching) and prefills the rest, at least its last token.
- A prefill pass has at most ``max_prefill_tokens`` tokens: longer prompts are prefilled in chunks,
  interleaved with the decoding of other requests.
- Requests that are added together (a ``Group``) start decoding together and draw from one
  generator, like the rows of a batch in the published sampler.

``step`` runs at most one prefill pass and one decoding pass. With tensor parallelism, all ranks
must make the same calls in the same order.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from llama.cache import Decode, Prefill, on_device
from llama.chat_template import AnyChatFormat
from llama.distributed.collectives import fail_fast
from llama.model import Transformer
from llama.request import Group, Request, TokenEvent, constrained, new_request
from llama.sampling import SamplingParams
from llama.scoring import SCORING_LOGITS, fetch, score_prompt
from llama.slots import Slots
from llama.tokenizer import AnyTokenizer

MAX_PREFILL_TOKENS = 2048

SampleFunction = Callable[[Tensor, float, float, torch.Generator | None], Tensor]


class Engine:
    """Runs requests on one model.

    Args:
        sample: maps logits [B, V], temperature, top_p and a generator to tokens [B].
        max_prefill_tokens: limit per prefill pass, which also bounds the activation memory.
        prefix_caching: reuse keys and values of common prefixes. Results agree up to rounding.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: AnyTokenizer,
        formatter: AnyChatFormat,
        sample: SampleFunction,
        *,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        prefix_caching: bool = True,
    ) -> None:
        if max_prefill_tokens < 1:
            raise ValueError(f"max_prefill_tokens is {max_prefill_tokens}, expected 1 or more")
        self.model, self.tokenizer, self.formatter = model, tokenizer, formatter
        self.sample, self.max_prefill_tokens = sample, max_prefill_tokens
        self.slots = Slots(model, prefix_caching=prefix_caching)
        self._waiting: deque[Group] = deque()  # for free slots
        self._starting: list[Group] = []  # in prefill
        self._decoding: list[tuple[Request, Group]] = []  # the i-th is in slot i

    # --- Requests -------------------------------------------------------------------------------

    def request(
        self, prompt: Sequence[int], params: SamplingParams, row: int = 0, *, truncate: bool = False
    ) -> Request:
        """A request for ``add``; see ``new_request``."""
        return new_request(
            prompt, params, row, truncate, self.model.params, self.tokenizer, self.formatter
        )

    def add(self, requests: Sequence[Request], generator: torch.Generator | None = None) -> None:
        """Queue requests that start together, at most max_batch_size, with equal temperature and
        top_p. They draw from ``generator``; default: torch's global one."""
        n_slots = len(self.slots.occupants)
        if not 0 < len(requests) <= n_slots:
            raise ValueError(
                f"{len(requests)} requests are added together, expected 1 to {n_slots} "
                "(max_batch_size)"
            )
        with self.model.lock:
            if self.slots.n_free == n_slots:
                self.slots.forget_if_model_changed()
            self._waiting.append(Group(list(requests), generator))

    @property
    def is_busy(self) -> bool:
        """Whether requests are waiting or running."""
        return bool(self._waiting or self._starting or self._decoding)

    def cancel(self, request: Request) -> None:
        """End a request and free its slot."""
        with self.model.lock:
            if request.finish_reason is None:
                self._check_cache()
                self._finish(request, "cancelled")

    def cancel_all(self) -> None:
        """End all requests."""
        with self.model.lock:
            groups = [*self._waiting, *self._starting, *(group for _, group in self._decoding)]
            for request in (request for group in groups for request in group.requests):
                request.finish_reason = request.finish_reason or "cancelled"
            self._waiting.clear()
            self._starting, self._decoding = [], []
            for slot, occupant in enumerate(self.slots.occupants):
                if occupant is not None:
                    self.slots.release(slot)

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, TokenEvent]]:
        """Decode one token for each running request, and run one prefill pass.

        Raises:
            FloatingPointError: logits aren't finite. As after any error, all requests are
                cancelled.
            RankError: another rank has failed or is gone.
        """
        with self.model.lock, fail_fast():
            self._check_cache()
            try:
                events = self._decode()
                self._prefill()
                self.slots.count_writes()
                return events + self._start()
            except BaseException:
                self.cancel_all()
                raise

    def run(self, requests: Sequence[Request]) -> Iterator[list[tuple[Request, TokenEvent]]]:
        """Step until these requests have finished; closing the iterator cancels them.

        Raises:
            RuntimeError: they were cancelled in the meantime.
        """
        try:
            while not all(request.finish_reason for request in requests):
                with self.model.lock:
                    is_over = all(request.finish_reason for request in requests)
                    events = [] if is_over else self.step()
                if events:
                    yield events
            if any(request.finish_reason == "cancelled" for request in requests):
                raise RuntimeError(
                    "another generation has used this model since: finish a stream before you "
                    "start the next, or give each its own model"
                )
        finally:
            for request in reversed(requests):
                self.cancel(request)

    # --- Passes ---------------------------------------------------------------------------------

    def _decode(self) -> list[tuple[Request, TokenEvent]]:
        """Decode one token for each request in ``_decoding``."""
        if not self._decoding:
            return []
        lengths = [len(self.slots.cached[slot]) for slot in range(len(self._decoding))]
        last = [request.tokens[-1] for request, _ in self._decoding]
        tokens, positions = on_device([last, lengths], self.model.device).unbind()
        batch = Decode(positions, max(lengths) + 1, ragged=len(set(lengths)) > 1)
        logits = self.model(tokens, batch)  # [B, V]
        for slot, token in enumerate(last):
            self.slots.cached[slot].append(token)
        events = self._sample(self._decoding, logits)
        for request, event in reversed(events):  # a row that ends last needs no swap
            if event.finish_reason:
                self._finish(request, event.finish_reason)
        return events

    def _admit(self) -> list[Request]:
        """Take groups from the queue while there are slots for all of their requests.

        Returns:
            The requests waiting for prefill.
        """
        prefilling = [r for group in self._starting for r in group.requests if r.waits_for_prefill]
        n_free = self.slots.n_free - sum(request.slot is None for request in prefilling)
        while self._waiting:
            requests = [r for r in self._waiting[0].requests if r.waits_for_prefill]
            if len(requests) > n_free:
                break
            n_free -= len(requests)
            prefilling += requests
            self._starting.append(self._waiting.popleft())
        return prefilling

    def _prefill(self) -> None:
        """One pass over prompts or chunks, bounded in tokens and, when scoring, in logits."""
        prefilling = self._admit()
        if not prefilling:
            return
        n_left, scores_prompt = self.max_prefill_tokens, False
        batch: list[tuple[Request, int]] = []
        for i, request in enumerate(prefilling):
            if n_left == 0:
                break
            if request.slot is None and not self.slots.place(request, prefilling[:i]):
                continue
            n_tokens, is_scored = request.next_chunk()
            if is_scored and not batch:
                scores_prompt = True
                n_left = min(n_left, max(1, SCORING_LOGITS // self.model.params.vocab_size))
            if is_scored == scores_prompt:
                batch.append((request, min(n_left, n_tokens)))
                n_left -= batch[-1][1]
        self._prefill_pass(batch, scores_prompt)

    def _prefill_pass(self, batch: list[tuple[Request, int]], scores_prompt: bool) -> None:
        """Prefill the next tokens of each request, keeping the logits of a prompt's last token."""
        requests, seqlens = zip(*batch, strict=True)
        slots = [request.slot for request in requests if request.slot is not None]
        starts = [request.n_prefilled for request in requests]
        ends = [start + n for start, n in zip(starts, seqlens, strict=True)]
        complete = [i for i, r in enumerate(requests) if ends[i] == len(r.prompt) and r.limit > 0]
        packed = [t for r, a, b in zip(requests, starts, ends, strict=True) for t in r.prompt[a:b]]
        logits = self.model(
            on_device(packed, self.model.device),
            Prefill(slots, starts, seqlens, self.model.device, None if scores_prompt else complete),
        )  # [T, V] or [len(complete), V]
        for request, slot, end in zip(requests, slots, ends, strict=True):
            request.n_prefilled = end
            self.slots.cached[slot] = request.prompt[:end]  # only now: the pass may fail
        if scores_prompt:
            every = logits.split(list(seqlens))
            for request, start, scores in zip(requests, starts, every, strict=True):
                if not score_prompt(request, start, scores):
                    raise self._not_finite(f"prompt {request.row}")
            logits = [every[i][-1] for i in complete]
        for i, row in zip(complete, logits, strict=True):
            requests[i].logits = row

    def _start(self) -> list[tuple[Request, TokenEvent]]:
        """Sample the first tokens of prefilled groups; requests with ``echo`` first get a step with
        their prompt's tokens."""
        events = []
        for group in list(self._starting):
            if any(request.waits_for_prefill for request in group.requests):
                continue
            live = [request for request in group.requests if not request.finish_reason]
            if not group.is_echoed:
                group.is_echoed = True
                prompts = [(r, e) for r in live if r.params.echo for e in r.prompt_events()]
                for request in live:
                    request.detokenizer.stop = request.params.stop_strings
                    if request.limit == 0:
                        self._finish(request, "length")
                if prompts:
                    events += prompts
                    continue
            self._starting.remove(group)
            rows = [(request, group) for request in live if not request.finish_reason]
            if not rows:
                continue
            logits = torch.stack([r.logits for r, _ in rows if r.logits is not None])
            first = self._sample(rows, logits)
            for request, event in first:
                request.logits = None
                if event.finish_reason:
                    self._finish(request, event.finish_reason)
                else:
                    assert request.slot is not None
                    self.slots.swap(request.slot, len(self._decoding))
                    self._decoding.append((request, group))
            events += first
        return events

    # --- Tokens ---------------------------------------------------------------------------------

    def _sample(
        self, rows: list[tuple[Request, Group]], logits: Tensor
    ) -> list[tuple[Request, TokenEvent]]:
        """The next token of each row of logits [R, V], the same on every rank."""
        if self.model.groups.rank == 0:
            tokens = self._draw(rows, constrained(rows, logits)).to(torch.int64).contiguous()
        else:
            tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        self.model.groups.broadcast_from_first(tokens)
        counts = [request.params.top_logprobs for request, _ in rows]
        fetched = zip(*fetch(logits, tokens, counts), strict=True)
        events = []
        for (request, _), (token, log_total, logprob, top) in zip(rows, fetched, strict=True):
            if not math.isfinite(log_total):
                raise self._not_finite(f"token {len(request.tokens)} of prompt {request.row}")
            shown = logprob if request.params.logprobs else None
            events.append((request, request.add_token(token, shown, top)))
        return events

    def _draw(self, rows: list[tuple[Request, Group]], logits: Tensor) -> Tensor:
        """Tokens [R]: one ``sample`` call for all greedy rows, and one per group."""
        by_group: dict[Group | None, list[int]] = defaultdict(list)
        for i, (request, group) in enumerate(rows):
            by_group[group if request.params.temperature > 0 else None].append(i)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for source, indices in by_group.items():
            params = rows[indices[0]][0].params
            x = logits
            if len(indices) < len(rows):
                x = logits[on_device(indices, logits.device)]
            places, generator = list(range(len(indices))), None
            if source is not None:
                generator = source.generator
                # The published sampler also draws for finished rows, and draws depend on the
                # batch's shape and the row's index in it.
                places = [source.requests.index(rows[i][0]) for i in indices]
                if places != list(range(len(source.requests))):
                    live, x = x, x.new_zeros(len(source.requests), x.shape[-1])
                    x[on_device(places, x.device)] = live
            drawn = self.sample(x, params.temperature, params.top_p, generator)
            if len(by_group) == 1 and places == list(range(len(drawn))):
                return drawn
            index = on_device(indices, logits.device)
            tokens[index] = drawn[on_device(places, drawn.device)]
        return tokens

    def _not_finite(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"the logits of {what} aren't finite (computed in {self.model.dtype}): the weights are "
            "damaged (check them with python -m llama verify), or the model needs a wider range: "
            "build it with dtype='bfloat16' or 'float32'"
        )

    # --- Cleanup --------------------------------------------------------------------------------

    def _finish(self, request: Request, reason: Literal["stop", "length", "cancelled"]) -> None:
        """End a request and free its slot."""
        request.finish_reason, request.logits = reason, None
        slot = request.slot
        if slot is None:
            return
        if slot < len(self._decoding) and self._decoding[slot][0] is request:
            last = len(self._decoding) - 1
            self.slots.swap(slot, last)
            self._decoding[slot] = self._decoding[last]
            self._decoding.pop()
            slot = last
        self.slots.release(slot)

    def _check_cache(self) -> None:
        """If the cache was used elsewhere, cancel running requests and drop cached prefixes."""
        if self.slots.count_writes():
            if self.slots.n_free < len(self.slots.occupants):
                self.cancel_all()
            self.slots.forget()
