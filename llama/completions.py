"""Run a call to completion, and collect its events into the results of the public calls."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import torch

from llama import memory
from llama.chat import ChatFormat, Llama2ChatFormat, Message
from llama.distributed import collectives
from llama.distributed.collectives import check_same_on_all_ranks, raise_on_all_ranks
from llama.engine import Engine
from llama.request import Request, TokenEvent
from llama.sampling import SamplingParams, draw_seed, new_generator


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs or top_logprobs
    logprobs: list[float]  # with logprobs
    top_logprobs: list[dict[int, float]]  # with top_logprobs


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]


@dataclasses.dataclass
class Completion:
    """The events of one sequence, put together. A stop token isn't among the tokens."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    pieces: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    stop_token: int | None = None

    def add(self, event: TokenEvent, *, is_stop_token: bool) -> None:
        if is_stop_token:
            self.stop_token = event.token
            if event.text:  # held back as the possible start of a character or stop string
                self.pieces[-1] += event.text
            return
        self.tokens.append(event.token)
        self.pieces.append(event.text)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
        self.top_logprobs.append(event.top_logprobs or {})

    def prediction(self, generation: Any, params: SamplingParams) -> Any:
        found = {"generation": generation}
        if params.logprobs or params.top_logprobs:
            found["tokens"] = self.pieces
        if params.logprobs:
            found["logprobs"] = self.logprobs
        if params.top_logprobs:
            found["top_logprobs"] = self.top_logprobs
        return found

    def answer(self, formatter: ChatFormat | Llama2ChatFormat) -> Message:
        """The assistant's message; ``pieces`` become the pieces of its text."""
        message = Message(role="assistant", content="".join(self.pieces))
        tool_call = formatter.tool_call_id
        if tool_call is not None and tool_call in self.tokens:
            at = self.tokens.index(tool_call)
            self.pieces[at] = self.pieces[at].removesuffix(formatter.tokenizer.decode([tool_call]))
            message["content"] = "".join(self.pieces[: at + 1])
            message["tool_call"] = "".join(self.pieces[at + 1 :])
        if self.stop_token is not None and self.stop_token == formatter.eom_id:
            message["eom"] = True
        return message

    @classmethod
    def of_tokens(cls, tokens: list[int], logprobs: list[float], request: Request) -> "Completion":
        """A completion of a request by other means than the engine."""
        pieces: list[str] = []
        n_prompt = len(request.prompt) if request.params.echo else 0
        for i, token in enumerate(tokens):
            if i == n_prompt:
                request.detokenizer.stop = request.params.stop_strings
            pieces.append(request.detokenizer.add(token, final=i == len(tokens) - 1))
            if request.detokenizer.stopped:
                break
        n = len(pieces)
        return cls(tokens[:n], pieces, logprobs[:n], [{}] * n)


def run(
    engine: Engine,
    name: str,
    requests: Sequence[Request],
    params: SamplingParams,
    generator: torch.Generator,
) -> Iterator[list[tuple[Request, TokenEvent]]]:
    """The steps of one call, ``name``, which takes the engine over from an earlier one.

    The requests draw together; of more than max_batch_size, each draws from a generator of its own.
    """
    model = engine.model
    prompts = [request.prompt for request in requests]
    with (
        model.groups.collective_call(name, prompt_tokens=prompts, **vars(params)),
        memory.explain_oom(lambda: memory.plan_of(model, engine.max_prefill_tokens)),
    ):
        with model.lock:
            engine.cancel_all()
            if 0 < len(requests) <= model.params.max_batch_size:
                engine.add(requests, generator)
            else:
                for request in requests:
                    own = generator
                    if params.temperature > 0:
                        own = new_generator(draw_seed(generator), model.device)
                    engine.add([request], own)
        yield from engine.run(requests)


def complete(
    engine: Engine, requests: list[Request], params: SamplingParams, generator: torch.Generator
) -> list[Completion]:
    """Run a call to its end. With several copies of the weights, the requests are divided over them
    and the completions gathered on every rank."""
    groups = engine.model.groups
    if groups.n_replicas == 1:
        return _complete_here(engine, requests, params, generator)
    prompts = [request.prompt for request in requests]
    # with one seed, equal prompts would get equal samples everywhere
    seed = (draw_seed(generator) + groups.replica) % 2**64
    check_same_on_all_ranks("Llama.generate", {"prompt_tokens": prompts}, collectives.world)
    share = requests[groups.replica :: groups.n_replicas]
    with raise_on_all_ranks():
        own = new_generator(seed, engine.model.device)
        part = _complete_here(engine, share, params, own)
    rows = [Completion()] * len(requests)
    for i, theirs in enumerate(groups.gather_from_replicas([vars(row) for row in part])):
        for row in theirs:  # JSON's keys are strings
            top = [{int(token): x for token, x in each.items()} for each in row["top_logprobs"]]
            row["top_logprobs"] = top
        rows[i :: groups.n_replicas] = [Completion(**row) for row in theirs]
    return rows


def _complete_here(
    engine: Engine, requests: list[Request], params: SamplingParams, generator: torch.Generator
) -> list[Completion]:
    rows = {id(request): Completion() for request in requests}
    with engine.model.lock:
        for events in run(engine, "Llama.generate", requests, params, generator):
            for request, event in events:
                is_stop = event.finish_reason == "stop" and event.token in request.stop_ids
                rows[id(request)].add(event, is_stop_token=is_stop)
    return list(rows.values())
