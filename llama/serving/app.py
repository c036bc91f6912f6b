"""The routes of the server, as a FastAPI application."""

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.generation import Llama
from llama.request import Request
from llama.serving.answers import Answer, new_answer
from llama.serving.engine_loop import Call, EngineLoop, QueueFullError, StoppingError
from llama.serving.requests import encode_prompts, new_requests
from llama.serving.schema import ApiError, Body, ChatBody, CompletionBody, ErrorBody, invalid

_MAX_BODY = 2**25  # bytes
_WITHOUT_KEY = {"/health", "/docs", "/openapi.json"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}

T = TypeVar("T")


class _GoneError(Exception):
    """The client has closed the connection."""


def build_app(
    llm: Llama,
    engine_loop: EngineLoop,
    *,
    model_name: str,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    seed: int = 1,
) -> FastAPI:
    """The application; ``engine_loop`` runs in another thread.

    Args:
        api_key: that calls of /v1 must give; None: they need none.
        cors: origins whose pages may call the server; "*" for all.
        seed: of the generator from which calls without a seed get theirs.
    """
    app = FastAPI(
        title="llama",
        description="OpenAI's API for a Llama model",
        responses=_ERRORS,
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.add_middleware(_Gate, api_key=api_key)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"]
        )
    api = _Api(llm, engine_loop, model_name, random.Random(seed))
    # _Gate checks the key; this only describes it in /openapi.json
    with_key = [Depends(HTTPBearer(auto_error=False))] if api_key is not None else []
    app.get("/health")(api.health)
    app.get("/v1/models", dependencies=with_key)(api.models)
    app.get("/v1/models/{model:path}", dependencies=with_key)(api.model)
    with_stream: dict[str, Any] = {
        "dependencies": with_key,
        "responses": {200: {"content": {"text/event-stream": {}}}},
    }
    app.post("/v1/chat/completions", **with_stream)(api.chat)
    app.post("/v1/completions", **with_stream)(api.complete)
    app.exception_handler(ApiError)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_failed)
    return app


class _Api:
    def __init__(
        self, llm: Llama, engine_loop: EngineLoop, model_name: str, seeds: random.Random
    ) -> None:
        self._llm, self._engine_loop, self._name = llm, engine_loop, model_name
        self._seeds = seeds
        self._created = int(time.time())

    # --- Routes ---------------------------------------------------------------------------------

    async def health(self) -> dict[str, str]:
        """Whether the server takes calls."""
        if self._engine_loop.is_stopping:
            raise ApiError(503, "the server is stopping")
        return {"status": "ok"}

    async def models(self) -> dict[str, Any]:
        """The model that is served."""
        model = {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "llama",
            "max_model_len": self._llm.model.params.max_seq_len,
        }
        return {"object": "list", "data": [model]}

    async def model(self, model: str) -> dict[str, Any]:
        """The model, if it is the one that is served."""
        self._check_model(model)
        found: dict[str, Any] = (await self.models())["data"][0]
        return found

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        """Answer a dialog with the assistant's next message."""
        return await self._respond(body, http)

    async def complete(self, body: CompletionBody, http: HttpRequest) -> Response:
        """Continue texts, or score them."""
        return await self._respond(body, http)

    def _requests(self, body: Body) -> list[Request]:
        body.check()
        return new_requests(self._llm, body, encode_prompts(self._llm, body))

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self._name):
            raise ApiError(
                404,
                f"the model {name!r:.100} isn't served here: this server has {self._name!r}",
                "model",
                "model_not_found",
            )

    # --- Answers --------------------------------------------------------------------------------

    async def _respond(self, body: Body, http: HttpRequest) -> Response:
        """Run the requests of a call. If the client goes away, they are cancelled."""
        self._check_model(body.model)
        requests = await asyncio.to_thread(self._requests, body)
        answer = new_answer(requests, body, self._llm, self._name)
        call = Call(requests, body.seeds(len(requests), self._seeds.getrandbits(62)))
        try:
            self._engine_loop.submit(call)
        except QueueFullError as error:
            raise ApiError(429, str(error), code="queue_full") from None
        except StoppingError as error:
            raise ApiError(503, str(error)) from None
        steps = call.steps()
        is_streaming = False
        try:
            if not body.stream:
                await _unless_gone(http, _collect(steps, answer))
                return JSONResponse(answer.whole())
            # until there is something to stream, the answer can still be an error
            first = await _unless_gone(http, anext(steps, []))
            is_streaming = True
        except _GoneError:
            return Response(status_code=499)
        except (FloatingPointError, StoppingError) as error:
            status = 500 if isinstance(error, FloatingPointError) else 503
            raise ApiError(status, str(error)) from None
        finally:
            if not is_streaming:
                self._engine_loop.cancel(call)
        includes_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = _stream(first, steps, answer, includes_usage)
        return _EventStream(events, lambda: self._engine_loop.cancel(call))


async def _collect(steps: AsyncIterator[Any], answer: Answer) -> None:
    async for events in steps:
        answer.add(events)


async def _stream(
    first: Any, steps: AsyncIterator[Any], answer: Answer, includes_usage: bool
) -> AsyncIterator[str]:
    """The lines of a stream of server-sent events."""
    try:
        for chunk in answer.chunks(first):
            yield _event(chunk)
        async for events in steps:
            for chunk in answer.chunks(events):
                yield _event(chunk)
        for chunk in answer.last_chunks(includes_usage):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except (ApiError, FloatingPointError, StoppingError) as error:
        failed = error if isinstance(error, ApiError) else ApiError(500, str(error))
        yield _event(failed.body().model_dump())
    except Exception as error:
        yield _event(_failure(error).body().model_dump())
        raise  # logged by uvicorn


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events. However the response ends, ``on_end`` is called."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        # proxies such as nginx would collect the events
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _unless_gone(http: HttpRequest, work: Awaitable[T]) -> T:
    """The result of ``work``.

    Raises:
        _GoneError: the client closed the connection first.
    """

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


# --- Keys, limits and errors ----------------------------------------------------------------------


class _Gate:
    """Refuses calls without the key, and bodies of more than 32 MiB, before reading the body."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode(errors="surrogateescape")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        n_bytes = 0

        async def limited() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > _MAX_BODY:
                raise HTTPException(413, too_large)
            return message

        too_large = f"the body has more than {_MAX_BODY} bytes"
        if scope["path"] not in _WITHOUT_KEY and not self._has_key(headers):
            error = ApiError(
                401,
                "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
            await _error(error)(scope, receive, send)
        elif int(headers.get("content-length", 0)) > _MAX_BODY:
            await _error(ApiError(413, too_large))(scope, receive, send)
        else:
            await self._app(scope, limited, send)

    def _has_key(self, headers: Headers) -> bool:
        if self._key is None:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        is_key = secrets.compare_digest(key.strip().encode("latin-1"), self._key)
        return scheme.lower() == "bearer" and is_key


def _error(error: ApiError) -> Response:
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (429, 503):
        headers["retry-after"] = "1"
    text = json.dumps(error.body().model_dump())  # ASCII: a message may quote any input
    return Response(text, error.status, headers, "application/json")


async def _refused(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


async def _invalid(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    errors = error.errors()
    place = errors[0]["loc"][1:]  # after "body"
    if errors[0]["type"] == "json_invalid":
        reason = f"{errors[0]['ctx']['error']}, at character {place[0]}"
        return _error(ApiError(400, f"the body isn't valid JSON: {reason}"))
    if not place:
        expected = "a JSON object, sent with the header 'Content-Type: application/json'"
        return _error(ApiError(400, f"the body: expected {expected} ({errors[0]['msg']})"))
    return _error(invalid([(each["loc"][1:], each["msg"]) for each in errors]))


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _error(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _failed(_: HttpRequest, error: Exception) -> Response:
    """uvicorn logs the traceback."""
    return _error(_failure(error))


def _failure(error: Exception) -> ApiError:
    return ApiError(500, f"the server failed ({type(error).__name__})")
