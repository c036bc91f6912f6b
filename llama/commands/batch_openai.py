"""Lines of OpenAI's batch API: bodies as the server takes them, and its answers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from llama.commands.batch_lines import Answer, Defaults, as_line, check_known
from llama.generation import Llama
from llama.request import Request, TokenEvent
from llama.serving.answers import new_answer
from llama.serving.requests import encode_prompts, new_requests
from llama.serving.schema import MAX_N, ApiError, Body, ChatBody, CompletionBody, invalid

_BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
}


class ApiLine:
    """A call of the API."""

    def __init__(self, number: int, key: str, body: Body) -> None:
        self.number, self._body = number, body
        self.id: str | int = key

    def encode(self, llm: Llama) -> list[list[int]]:
        with _value_errors():
            prompts = encode_prompts(llm, self._body)
        self._body = self._body.model_copy(update={self._body.prompt_field: []})
        return prompts

    def requests(self, llm: Llama, prompts: Sequence[Sequence[int]]) -> list[Request]:
        with _value_errors():
            requests = new_requests(llm, self._body, prompts)
        for request in requests:
            request.row = self.number  # in messages
        return requests

    def seeds(self, n_requests: int, default: int) -> list[int]:
        # further choices don't get the seeds of the next lines
        return self._body.seeds(n_requests, default * MAX_N % 2**63)

    def new_answer(self, requests: Sequence[Request], llm: Llama, model: str) -> Answer:
        return _ApiAnswer(self, requests, llm, model)


class _ApiAnswer:
    def __init__(self, line: ApiLine, requests: Sequence[Request], llm: Llama, model: str) -> None:
        self._line, self._answer = line, new_answer(requests, line._body, llm, model)

    def add(self, events: Sequence[tuple[Request, TokenEvent]]) -> None:
        self._answer.add(events)

    def text(self) -> bytes:
        status = 200
        try:
            body = self._answer.whole()
        except ApiError as error:
            status, body = error.status, error.body().model_dump()
        number = self._line.number
        response = {"status_code": status, "request_id": f"batch-{number}", "body": body}
        return as_line(
            {
                "id": f"batch_req_{number}",
                "custom_id": self._line.id,
                "response": response,
                "error": None,
            }
        )


def parse_api_line(number: int, found: dict[str, Any], defaults: Defaults) -> ApiLine:
    """
    Raises:
        TypeError, ValueError: the line isn't valid, or needs something that isn't supported.
    """
    check_known("it", found, ["custom_id", "method", "url", "body"])
    key, body, url = found.get("custom_id"), found.get("body"), found.get("url")
    if not isinstance(key, str):
        raise TypeError(f"custom_id is {key!r:.60}, expected a text")
    if found.get("method") != "POST":
        raise ValueError(f"method is {found.get('method')!r:.60}, expected 'POST'")
    if not isinstance(url, str) or url not in _BODIES:
        raise ValueError(f"url is {url!r:.60}, expected one of {', '.join(_BODIES)}")
    if not isinstance(body, dict):
        raise TypeError(f"body is {body!r:.60}, expected a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    if body.get("stream"):
        raise ValueError("stream is true, expected false: the answers of a file are whole")
    limit = "max_tokens"
    if _BODIES[url] is ChatBody and "max_tokens" not in body:
        limit = "max_completion_tokens"
    for name, value in defaults.items():  # None: the API's own
        body.setdefault(limit if name == "max_gen_len" else name, value)
    with _value_errors():
        try:
            parsed = _BODIES[url].model_validate(body)
        except ValidationError as error:
            raise invalid([(each["loc"], each["msg"]) for each in error.errors()]) from None
        parsed.check()
    return ApiLine(number, key, parsed)


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    """Errors of the API as errors of a line."""
    try:
        yield
    except ApiError as error:
        raise ValueError(str(error)) from None
