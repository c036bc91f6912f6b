"""What the public calls return, put together from the events of a sequence."""

import dataclasses
from typing import Any, TypedDict

from llama.chat import Message
from llama.request import Request, TokenEvent
from llama.sampling import SamplingParams


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
            if event.text:  # what was held back, waiting for the rest of a character or stop string
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

    @classmethod
    def of_json(cls, row: dict[str, Any]) -> "Completion":
        """What ``dataclasses.asdict`` and JSON, whose keys are strings, have made of one."""
        top = [{int(token): x for token, x in each.items()} for each in row["top_logprobs"]]
        return cls(**row | {"top_logprobs": top})

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
