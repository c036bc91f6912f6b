"""Answers of the API: the events of requests as choices, whole or in the chunks of a stream."""

import re
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llama.completions import Completion
from llama.generation import Llama
from llama.request import Request, TokenEvent
from llama.serving.schema import ApiError, Body, ChatBody
from llama.serving.structured import JsonConstraint
from llama.serving.tools import tool_calls

# A text that may become a call: JSON, <function=name>..., or name.call(...).
_MAY_BE_CALL = re.compile(
    r"\s*([{\[].*|<(f.*)?|\w*|\w+\.c?a?l?l?|\w+\.call\(.*)", re.DOTALL | re.ASCII
)

# The API's log-probability of a very unlikely token, here of probability 0: JSON has no -inf.
_LEAST = -9999.0

Json = dict[str, Any]


class Token(NamedTuple):
    """A token of a choice; ``offset`` is where its text begins in the choice's."""

    event: TokenEvent
    offset: int


class Choice:
    """The answer to one request, collected from its events."""

    def __init__(self, index: int, request: Request, llm: Llama) -> None:
        self.index, self.request = index, request
        self.completion = Completion()
        self.tokens: list[Token] = []  # without a stop token, and those of a stop string
        self._bos_id = llm.tokenizer.bos_id
        # gives the offsets of tokens whose text the request's own detokenizer holds back
        self._detokenizer = request.detokenizer.without_stop()
        self._offset = self._n_chars = 0
        self._held: list[Token] = []

    @property
    def text(self) -> str:
        return "".join(self.completion.pieces)

    def add(self, event: TokenEvent) -> tuple[str, list[Token]]:
        """The text that an event adds, and the tokens of which a part is in the text now."""
        is_stop_token = self.request.is_stop_token(event)
        is_first_of_prompt = self.request.params.echo and not self.completion.tokens
        if is_first_of_prompt:
            text = "" if event.token == self._bos_id else event.text
            event = event._replace(logprob=None, text=text)
        if event.logprob is not None:
            top = {token: max(x, _LEAST) for token, x in (event.top_logprobs or {}).items()}
            event = event._replace(logprob=max(event.logprob, _LEAST), top_logprobs=top or None)
        self.completion.add(event, is_stop_token=is_stop_token)
        self._n_chars += len(event.text)
        if not is_stop_token:
            self._held.append(Token(event, self._offset))
            piece = self._detokenizer.add(event.token)
            self._offset += len(event.text if is_first_of_prompt else piece)
        is_whole = is_stop_token or event.finish_reason == "length"
        tokens = [token for token in self._held if is_whole or token.offset < self._n_chars]
        self._held = self._held[len(tokens) :]
        self.tokens += tokens
        return event.text, tokens


class Answer:
    """The answer to a call of /v1/completions.

    Args:
        model: its name in the answer.
    """

    kind, prefix = "text_completion", "cmpl"
    chunk_kind = kind

    def __init__(self, requests: Sequence[Request], body: Body, llm: Llama, model: str) -> None:
        self.choices = {r: Choice(i, r, llm) for i, r in enumerate(requests)}
        self._tokenizer, self._formatter = llm.tokenizer, llm.formatter
        self._n_choices = body.n_choices
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def add(self, events: Sequence[tuple[Request, TokenEvent]]) -> None:
        for request, event in events:
            self.choices[request].add(event)

    def whole(self) -> Json:
        """The body of an answer that isn't streamed.

        Raises:
            ApiError: the JSON schema allows no way to continue one of the choices.
        """
        choices = [self._choice(choice) for choice in self.choices.values()]
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def chunks(self, events: Sequence[tuple[Request, TokenEvent]]) -> Iterator[Json]:
        """The parts of the answer that a step adds."""
        for request, event in events:
            choice = self.choices[request]
            text, tokens = choice.add(event)
            if text or tokens or event.finish_reason:
                for part in self._parts(choice, text, tokens, event.finish_reason):
                    yield self._chunk([{"index": choice.index, **part}])

    def last_chunks(self, includes_usage: bool) -> Iterator[Json]:
        for choice in self.choices.values():
            if not choice.completion.tokens and choice.completion.stop_token is None:
                for part in self._parts(choice, "", [], "length"):
                    yield self._chunk([{"index": choice.index, **part}])
        if includes_usage:
            yield self._chunk([]) | {"usage": self.usage()}

    def usage(self) -> Json:
        """Tokens of each prompt once, and of all choices with their stop tokens."""
        requests = list(self.choices)
        prompts = requests[:: self._n_choices]
        n_prompt = sum(len(request.prompt) for request in prompts)
        n_generated = sum(len(request.tokens) for request in requests)
        cached = sum(request.n_reused for request in prompts)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_generated,
            "total_tokens": n_prompt + n_generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "object": self.chunk_kind, "choices": choices, "usage": None}

    def _choice(self, choice: Choice) -> Json:
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.tokens) if choice.request.params.logprobs else None,
            "finish_reason": choice.request.finish_reason,
        }

    def _parts(
        self, choice: Choice, text: str, tokens: list[Token], finish_reason: str | None
    ) -> Iterator[Json]:
        yield {
            "text": text,
            "logprobs": self._logprobs(tokens) if choice.request.params.logprobs else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: list[Token]) -> Json:
        top: list[dict[str, float] | None] = []
        for event, _ in tokens:
            names: dict[str, float] = {}
            for token, logprob in (event.top_logprobs or {}).items():
                names.setdefault(self._name(token), logprob)  # equal names: the likelier token
            if event.top_logprobs and event.logprob is not None:
                names.setdefault(self._name(event.token), event.logprob)
            top.append(names or None)
        return {
            "tokens": [self._name(token.event.token) for token in tokens],
            "token_logprobs": [token.event.logprob for token in tokens],
            "top_logprobs": top,
            "text_offset": [token.offset for token in tokens],
        }

    def _name(self, token: int) -> str:
        """The text of a token; of a part of a character its bytes, as OpenAI writes them."""
        data = self._tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatAnswer(Answer):
    """The answer to a call of /v1/chat/completions."""

    kind, prefix = "chat.completion", "chatcmpl"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, requests: Sequence[Request], body: ChatBody, llm: Llama, model: str) -> None:
        super().__init__(requests, body, llm, model)
        self._tools = body.tools if body.offers_tools else None
        self._max_calls = 1 if body.parallel_tool_calls is False else None
        # streamed characters of each choice's content
        self._n_sent: dict[Choice, int] = {}

    def _choice(self, choice: Choice) -> Json:
        content, calls = self._message(choice)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens) if choice.request.params.logprobs else None,
            "finish_reason": "tool_calls" if calls else choice.request.finish_reason,
        }

    def _message(self, choice: Choice) -> tuple[str | None, list[Json]]:
        """The content and the calls of a complete answer."""
        constraint = choice.request.constraint
        if isinstance(constraint, JsonConstraint) and constraint.error:
            raise ApiError(400, f"the answer can't be continued as JSON: {constraint.error}")
        if not self._tools:
            return choice.text, []
        content, calls = tool_calls(choice.completion.answer(self._formatter), self._tools)
        return content, calls[: self._max_calls]

    def _parts(
        self, choice: Choice, text: str, tokens: list[Token], finish_reason: str | None
    ) -> Iterator[Json]:
        if choice not in self._n_sent:
            self._n_sent[choice] = 0
            yield self._part({"role": "assistant", "content": ""})
        calls: list[Json] = []
        if finish_reason:
            content, calls = self._message(choice)
            text = (content or "")[self._n_sent[choice] :]
        elif self._tools:
            text = "" if self._may_be_call(choice) else choice.text[self._n_sent[choice] :]
        self._n_sent[choice] += len(text)
        logprobs = self._logprobs(tokens) if choice.request.params.logprobs else None
        if text or logprobs:
            yield self._part({"content": text}, logprobs)
        for i, call in enumerate(calls):
            yield self._part({"tool_calls": [{"index": i, **call}]})
        if finish_reason:
            yield self._part({}, finish_reason="tool_calls" if calls else finish_reason)

    def _part(
        self, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None
    ) -> Json:
        return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _may_be_call(self, choice: Choice) -> bool:
        if self._formatter.tool_call_id in choice.completion.tokens:
            return True
        return not self._n_sent[choice] and bool(_MAY_BE_CALL.fullmatch(choice.text))

    def _logprobs(self, tokens: list[Token]) -> Json:
        def named(token: int, logprob: float | None) -> Json:
            data = self._tokenizer.decode_bytes([token])
            return {"token": self._name(token), "logprob": logprob, "bytes": list(data)}

        content = [
            {
                **named(event.token, event.logprob),
                "top_logprobs": [named(*pair) for pair in (event.top_logprobs or {}).items()],
            }
            for event, _ in tokens
        ]
        return {"content": content, "refusal": None}


def new_answer(requests: Sequence[Request], body: Body, llm: Llama, model: str) -> Answer:
    """The answer to a call, still without events."""
    if isinstance(body, ChatBody):
        return ChatAnswer(requests, body, llm, model)
    return Answer(requests, body, llm, model)
