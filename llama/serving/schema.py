"""The bodies of API calls, and errors in OpenAI's shape.

Types are strict. A field that would change the answer and isn't supported is an error that names
it, unless its value is the default's equivalent.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llama.sampling import SamplingParams
from llama.serving import tools

# Fields of the API that don't change the answer.
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Values of unsupported fields that mean the same as leaving the field out; so does null.
_NEUTRAL: dict[str, list[Any]] = {
    "frequency_penalty": [0],
    "function_call": ["none"],
    "functions": [[]],
    "logit_bias": [{}],
    "modalities": [["text"]],
    "presence_penalty": [0],
    "reasoning_effort": ["none"],
    "suffix": [""],
    "verbosity": ["medium"],
}
MAX_CHOICES = 2048  # of a call
MAX_N = 128  # of a prompt

# Fields of a message; others are errors, unless null. ``annotations`` are a part of answers.
_OF_MESSAGES = {"annotations", "name", "tool_call_id", "tool_calls"}

_StopString = Annotated[str, Field(min_length=1, max_length=256)]
# One error is enough: pydantic would collect one for each of the millions of items of a large body.
_TokenIds = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class ApiError(Exception):
    """A call that is refused, or failed.

    Args:
        param: the field of the body that is the reason.
        code: the API's name of the error, for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> "ErrorBody":
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = ErrorDetail(message=str(self), type=kind, param=self.param, code=self.code)
        return ErrorBody(error=error)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, given: Any) -> Any:
        """Without it, there is one error for each unknown field."""
        if cls.model_config.get("extra") == "forbid" and isinstance(given, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in given:
                if name not in known:
                    raise ValueError(f"{name!r:.100} isn't supported: leave it out")
        return given


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # pads the events of a stream: without effect


class _Body(_Strict):
    model_config = ConfigDict(extra="allow")  # ``check`` names what isn't supported

    prompt_field: ClassVar[str]

    model: str | None = Field(None, description="As in /v1/models.")
    temperature: float | None = Field(None, ge=0, description="Default 1; 0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, description="Default 1.")
    n: int | None = Field(None, ge=1, le=MAX_N, description="Choices for each prompt.")
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="Choice i gets seed + i. Default: random."
    )
    stop: (
        _StopString | Annotated[list[_StopString], Field(max_length=16, fail_fast=True)] | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def n_choices(self) -> int:
        """For each prompt."""
        return self.n or 1

    def seeds(self, n_requests: int, default: int) -> list[int]:
        """Of each request: the choices of a prompt have seed, seed + 1, ..."""
        seed = default if self.seed is None else self.seed
        return [seed + i % self.n_choices for i in range(n_requests)]

    def check(self) -> None:
        """
        Raises:
            ApiError: a field isn't supported, or contradicts another.
        """
        for name, value in (self.model_extra or {}).items():
            is_neutral = value is None or value in _NEUTRAL.get(name, [])
            if not is_neutral and name not in _WITHOUT_EFFECT:
                raise ApiError(400, f"{name} isn't supported: leave it out", name, "unsupported")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream", "stream_options")

    def _params(self, limit: int | None, logprobs: int | None, echo: bool) -> SamplingParams:
        try:
            return SamplingParams(
                limit,
                1.0 if self.temperature is None else self.temperature,
                1.0 if self.top_p is None else self.top_p,
                [self.stop] if isinstance(self.stop, str) else self.stop or (),
                logprobs is not None,
                logprobs or 0,
                echo,
            )
        except ValueError as error:  # pydantic has checked all but very small temperatures
            raise ApiError(400, str(error), "temperature") from None


class ChatMessage(BaseModel):
    """One message; llama.dialog and llama.serving.tools check what depends on the role."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None


class JsonSchema(_Strict):
    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(_Body):
    """POST /v1/chat/completions"""

    prompt_field = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Default: as many as fit.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = Field(
        None, description="false: only the first of several calls is returned."
    )
    response_format: ResponseFormat | None = None

    @property
    def offers_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    def check(self) -> None:
        super().check()
        for i, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if value is not None and name not in _OF_MESSAGES:
                    raise ApiError(
                        400,
                        f"{name} in message {i} isn't supported: leave it out",
                        "messages",
                        "unsupported",
                    )
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(
                400,
                f"max_tokens is {self.max_tokens} and max_completion_tokens "
                f"{self.max_completion_tokens}: give one of them",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", "top_logprobs")
        if self.tool_choice is not None and not self.tools and self.tool_choice != "none":
            raise ApiError(400, "tool_choice needs tools", "tool_choice")
        if self.offers_tools and self.wants_json:
            raise ApiError(
                400,
                "response_format and tools exclude each other: leave one of them out, or give the "
                "tool_choice 'none'",
                "response_format",
            )
        given = self.response_format
        if given is not None and (given.type == "json_schema") != (given.json_schema is not None):
            raise ApiError(
                400,
                "response_format has json_schema if and only if its type is 'json_schema'",
                "response_format",
            )
        self.answer_schema()

    def answer_schema(self) -> tuple[bool, dict[str, Any] | None]:
        """Whether the answer must be JSON, and by which schema; None: any object.

        Raises:
            ApiError: the tools aren't valid, or a strict one can't be enforced.
        """
        try:
            schema = tools.answer_schema(self.tools, self.tool_choice)
        except ValueError as error:
            raise ApiError(400, str(error), "tools") from None
        if schema is None and self.offers_tools:
            for i, tool in enumerate(self.tools or []):
                if tool["function"].get("strict"):
                    raise ApiError(
                        400,
                        f"tool {i} is strict, which needs a tool_choice that requires a call: "
                        "leave strict out, or give 'required' or a function as tool_choice",
                        "tools",
                        "unsupported",
                    )
        given = self.response_format
        if given is not None and self.wants_json:
            return True, given.json_schema.schema_ if given.json_schema else None
        return schema is not None, schema

    def params(self) -> SamplingParams:
        limit = self.max_completion_tokens or self.max_tokens
        return self._params(limit, (self.top_logprobs or 0) if self.logprobs else None, False)


class CompletionBody(_Body):
    """POST /v1/completions"""

    prompt_field = "prompt"

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    ) = Field(description="Texts, which get a begin-of-text token, or ids, which don't.")
    max_tokens: int | None = Field(None, ge=0, description="Default 16.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, description="Only a value equal to n.")

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n_choices):
            raise ApiError(
                400,
                f"best_of is {self.best_of} and n {self.n_choices}, but every choice is returned: "
                "leave best_of out",
                "best_of",
                "unsupported",
            )
        if len(self.prompts) * self.n_choices > MAX_CHOICES:
            raise ApiError(
                400,
                f"{len(self.prompts)} prompts with n {self.n_choices} are more than "
                f"{MAX_CHOICES} choices: divide them over several calls",
                "n",
            )

    def params(self) -> SamplingParams:
        limit = 16 if self.max_tokens is None else self.max_tokens
        return self._params(limit, self.logprobs, bool(self.echo))


Body = ChatBody | CompletionBody


def invalid(errors: Sequence[tuple[Sequence[str | int], str]]) -> ApiError:
    """The error of a body that pydantic refuses.

    Args:
        errors: places in the body, and messages. A field of several types has one for each.
    """
    field = errors[0][0][0]
    reasons = [f"{'.'.join(map(str, loc))}: {text}" for loc, text in errors if loc[0] == field]
    return ApiError(400, "; ".join(reasons[:4]), str(field))
