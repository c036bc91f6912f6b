"""The server: answers equal the library's, whatever else runs; what isn't supported is refused."""

import asyncio
import contextlib
import http.client
import json
import logging
import signal
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pydantic
import pytest
import torch
import uvicorn
from conftest import DEMO
from serving import NAME, Program, Server, serving, wait_until

from llama import Llama, Tokenizer
from llama.driver import Driver
from llama.serving import command
from llama.serving.answers import Answer
from llama.serving.app import build_app
from llama.serving.command import _bound_socket, _served, serve
from llama.serving.engine_loop import EngineLoop
from llama.serving.schema import ChatBody, CompletionBody, invalid

QUESTION: Any = [{"role": "user", "content": "What is 23 + 45?"}]
STORY = "Once upon a time"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama.build(str(DEMO), max_seq_len=256, max_batch_size=8, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(llm: Llama) -> Iterator[Server]:
    with serving(llm) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as found:
        yield found


JSON = {"content-type": "application/json"}


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    return server.http.post(f"/v1/{path}", content=content, headers=JSON | headers)


def chat_text(response: Any) -> str:
    return str(response.choices[0].message.content)


# --- Chat -----------------------------------------------------------------------------------------


def test_an_answer_is_that_of_the_library(client: openai.OpenAI, llm: Llama) -> None:
    [expected] = llm.chat_completion([QUESTION], temperature=0)
    response = client.chat.completions.create(messages=QUESTION, **GREEDY)
    [choice] = response.choices
    assert choice.message.content == expected["generation"]["content"] != ""
    assert (choice.message.role, choice.finish_reason, choice.logprobs) == (
        "assistant",
        "stop",
        None,
    )
    assert (response.object, response.model) == ("chat.completion", NAME)
    n_prompt = len(llm.formatter.encode_dialog_prompt(QUESTION))
    n_tokens = len(llm.tokenizer.encode(chat_text(response), bos=False, eos=False)) + 1
    assert response.usage is not None
    assert response.usage.prompt_tokens == n_prompt
    assert response.usage.completion_tokens == n_tokens
    assert response.usage.total_tokens == n_prompt + n_tokens
    again = client.chat.completions.create(messages=QUESTION, **GREEDY, n=2)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == n_prompt - 1


def test_a_stream_is_the_answer_in_parts(client: openai.OpenAI) -> None:
    options: Any = {**GREEDY, "messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    *chunks, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == chat_text(whole)
    assert len(deltas) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    tokens = [token for part in parts if part for token in part.content or []]
    assert tokens == whole.choices[0].logprobs.content
    assert {chunk.id for chunk in chunks} == {last.id}
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_is_server_sent_events(server: Server) -> None:
    body = {"messages": QUESTION, "stream": True, "temperature": 0, "stream_options": {}}
    response = post(server, CHAT, body)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["choices"] and chunk["usage"] is None for chunk in chunks)


def test_messages_of_every_role_and_text_parts(client: openai.OpenAI, llm: Llama) -> None:
    parts = [{"type": "text", "text": text} for text in ("What is ", "23 + 45?")]
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "23 + 45 = 68.", "refusal": None},
        {"role": "user", "content": "What is 23 + 46?"},
    ]
    dialog: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 23 + 45?"},
        *messages[2:],
    ]
    response = client.chat.completions.create(messages=messages, **GREEDY)
    [expected] = llm.chat_completion([dialog], temperature=0)
    assert chat_text(response) == expected["generation"]["content"]
    assert response.usage is not None
    assert response.usage.prompt_tokens == len(llm.formatter.encode_dialog_prompt(dialog))


def test_the_error_of_a_body_is_about_its_first_wrong_field() -> None:
    error = invalid([(("stop", "str"), "a"), (("stop", "list"), "b"), (("n",), "c")])
    assert (str(error), error.param) == ("stop.str: a; stop.list: b", "stop")


def test_limits_and_defaults(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        response = client.chat.completions.create(messages=QUESTION, **GREEDY, **limit)  # type: ignore[call-overload]
        assert response.usage.completion_tokens == 3

    def texts(**options: Any) -> list[str]:
        options |= {"model": NAME, "prompt": STORY, "n": 4, "seed": 1}
        return [choice.text for choice in client.completions.create(**options).choices]

    assert texts() == texts(temperature=1, top_p=1)
    assert texts() != texts(top_p=0.9)
    assert texts() != texts(temperature=0.9)


def test_choice_i_has_the_seed_plus_i(client: openai.OpenAI, llm: Llama) -> None:
    options: Any = {"model": NAME, "messages": [{"role": "user", "content": "Tell me a story."}]}
    options |= {"temperature": 1.3, "top_p": 0.95, "max_tokens": 20}
    response = client.chat.completions.create(**options, n=3, seed=7)
    texts = [choice.message.content for choice in response.choices]
    assert [choice.index for choice in response.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    for i, text in enumerate(texts):
        alone = llm.chat_completion(
            [options["messages"]], temperature=1.3, top_p=0.95, max_gen_len=20, seed=7 + i
        )
        assert alone[0]["generation"]["content"] == text
    prompts: Any = {"model": NAME, "prompt": ["Tom", STORY], "n": 2, "seed": 7, "temperature": 1}
    found = [choice.text for choice in client.completions.create(**prompts).choices]
    story = client.completions.create(**{**prompts, "prompt": STORY}).choices
    assert found[2:] == [choice.text for choice in story]
    free = [chat_text(client.chat.completions.create(**options)) for _ in range(3)]
    assert len(set(free)) == 3


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_strings_are_in_neither_text_nor_tokens(
    client: openai.OpenAI, is_streamed: bool
) -> None:
    options: Any = {**GREEDY, "prompt": STORY, "max_tokens": 40, "logprobs": 0}
    whole: Any = client.completions.create(**options).choices[0]
    text = whole.text
    stop = text[21:27]  # across tokens
    at = text.index(stop)
    stops = [text[5:8] + "\0", stop]  # the first one isn't there, but holds text back
    response: Any = client.completions.create(**options, stop=stops, stream=is_streamed)
    choices = [part.choices[0] for part in (response if is_streamed else [response])]
    assert "".join(choice.text for choice in choices) == text[:at]
    assert choices[-1].finish_reason == "stop"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    assert "".join(tokens).startswith(text[:at])
    assert not "".join(tokens[:-1]).startswith(text[:at])
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset[: len(offsets)]


def test_logprobs_are_those_of_the_library(client: openai.OpenAI, llm: Llama) -> None:
    [expected] = llm.chat_completion([QUESTION], temperature=0, logprobs=True, top_logprobs=3)
    response = client.chat.completions.create(
        messages=QUESTION, **GREEDY, logprobs=True, top_logprobs=3
    )
    logprobs = response.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content or []
    assert [token.token for token in content] == expected["tokens"]
    assert [token.logprob for token in content] == pytest.approx(expected["logprobs"], abs=1e-5)
    for token, wanted in zip(content, expected["top_logprobs"], strict=True):
        assert bytes(token.bytes or []).decode() == token.token
        top = [top.logprob for top in token.top_logprobs]
        assert top == pytest.approx(list(wanted.values()), abs=1e-5)
        assert token.top_logprobs[0].token == token.token  # greedy


# --- Completions ----------------------------------------------------------------------------------


def test_a_text_gets_one_begin_of_text_token_and_ids_none(
    client: openai.OpenAI, llm: Llama
) -> None:
    ids = llm.tokenizer.encode(STORY, bos=True, eos=False)
    [expected] = llm.text_completion([STORY], temperature=0, max_gen_len=16)
    for prompt in (STORY, [STORY], ids, [ids]):
        response = client.completions.create(prompt=prompt, **GREEDY)
        assert response.choices[0].text == expected["generation"]
        assert response.choices[0].finish_reason == "length"
        assert response.usage is not None
        assert response.usage.prompt_tokens == len(ids)
    without = client.completions.create(prompt=ids[1:], **GREEDY)
    assert without.usage is not None
    assert without.usage.prompt_tokens == len(ids) - 1
    assert without.choices[0].text != expected["generation"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_probabilities_of_0_are_written_as_in_the_api(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, is_streamed: bool
) -> None:
    """JSON has no -inf."""
    ids = llm.tokenizer.encode(STORY, bos=True, eos=False)
    decode = llm.model.forward

    def without_a_token(*args: Any, **kwargs: Any) -> torch.Tensor:
        logits = decode(*args, **kwargs).clone()
        logits[..., ids[2]] = -torch.inf
        return logits

    with serving(llm) as server, server.client() as client:
        monkeypatch.setattr(llm.model, "forward", without_a_token)
        options: Any = {"prompt": ids, "echo": True, "max_tokens": 0, "logprobs": 1}
        response: Any = client.completions.create(**options, **GREEDY, stream=is_streamed)
        parts = list(response) if is_streamed else [response]
        found = [x for part in parts for x in part.choices[0].logprobs.token_logprobs]
        assert found[2] == -9999
        assert found[0] is None
        assert all(-100 < x < 0 for x in found[3:] + found[1:2])
        assert json.dumps(parts[0].model_dump(), allow_nan=False)


def test_a_prompt_of_the_begin_of_text_token_is_scored(client: openai.OpenAI, llm: Llama) -> None:
    options: Any = {**GREEDY, "prompt": [llm.tokenizer.bos_id], "echo": True, "max_tokens": 0}
    [choice] = client.completions.create(**options, logprobs=0).choices
    assert choice.text == ""
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["<|begin_of_text|>"]


def test_of_top_tokens_with_equal_texts_the_likelier_is_shown(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {**GREEDY, "prompt": STORY, "max_tokens": 1, "logprobs": 5}
    logprobs: Any = client.completions.create(**options).choices[0].logprobs
    monkeypatch.setattr(Answer, "_name", lambda *_: "x")
    same: Any = client.completions.create(**options).choices[0].logprobs
    assert same.top_logprobs == [{"x": max(logprobs.top_logprobs[0].values())}]


def test_several_prompts_and_choices_are_in_order(client: openai.OpenAI, llm: Llama) -> None:
    prompts = [STORY, "One day, Tom", "The cat"]
    response = client.completions.create(prompt=prompts, n=2, best_of=2, max_tokens=8, **GREEDY)
    expected = llm.text_completion(prompts, temperature=0, max_gen_len=8, n=2)
    assert [choice.text for choice in response.choices] == [e["generation"] for e in expected]
    assert [choice.index for choice in response.choices] == list(range(6))
    assert response.usage is not None
    encoded = [llm.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    assert response.usage.prompt_tokens == sum(map(len, encoded))
    assert response.usage.completion_tokens == 48


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_echo_scores_the_prompt(client: openai.OpenAI, llm: Llama, max_tokens: int) -> None:
    prompt = "Once upon a time, Zoë had a 🦊."  # with characters of several tokens
    response = client.completions.create(
        prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens, **GREEDY
    )
    [expected] = llm.text_completion(
        [prompt], 0, max_gen_len=max_tokens, logprobs=True, echo=True, top_logprobs=2
    )
    [choice] = response.choices
    assert choice.text == expected["generation"].removeprefix("<|begin_of_text|>")
    assert choice.text.startswith(prompt)
    assert choice.finish_reason == "length"
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    ids = llm.tokenizer.encode(prompt, bos=True, eos=False)
    assert len(found.tokens) == len(ids) + max_tokens
    assert found.tokens[0] == "<|begin_of_text|>"
    first: Any = (found.token_logprobs[0], found.top_logprobs[0])
    assert first == (None, None)
    assert found.token_logprobs[1:] == pytest.approx(expected["logprobs"][1:], abs=1e-5)
    for i, top in enumerate(expected["top_logprobs"][1:], start=1):
        assert max(found.top_logprobs[i].values()) == pytest.approx(max(top.values()), abs=1e-5)
        # the token's own is among them, to the last bit
        assert found.token_logprobs[i] in found.top_logprobs[i].values()
    offsets = [*found.text_offset, len(choice.text)]
    assert found.text_offset[:2] == [0, 0]
    n_parts = 0
    for token, start, end in zip(found.tokens[1:], offsets[1:-1], offsets[2:], strict=True):
        if token.startswith("bytes:"):
            n_parts += 1
        else:
            assert choice.text[start:end] == token
    assert n_parts >= 4


def test_a_streamed_completion_is_the_answer_in_parts(client: openai.OpenAI) -> None:
    options: Any = {**GREEDY, "prompt": [STORY, "Tom"], "echo": True, "logprobs": 1}
    whole = client.completions.create(**options, max_tokens=8)
    texts, tokens, reasons = ["", ""], [[], []], ["", ""]  # type: ignore[var-annotated]
    for chunk in client.completions.create(**options, max_tokens=8, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.text_offset
        reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == ["length", "length"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_no_tokens(client: openai.OpenAI, is_streamed: bool) -> None:
    response: Any = client.completions.create(
        prompt=STORY, max_tokens=0, stream=is_streamed, **GREEDY
    )
    parts = list(response) if is_streamed else [response]
    assert [(p.choices[0].text, p.choices[0].finish_reason) for p in parts] == [("", "length")]


# --- Refusals -------------------------------------------------------------------------------------

CHAT, COMPLETIONS = "chat/completions", "completions"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty"),
        (CHAT, {"presence_penalty": -1}, "presence_penalty"),
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHAT, {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT, {"verbosity": "low"}, "verbosity"),
        (CHAT, {"prediction": {"type": "content", "content": "x"}}, "prediction"),
        (CHAT, {"web_search_options": {}}, "web_search_options"),
        (CHAT, {"top_k": 5}, "top_k"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"temperature": -1}, "temperature"),
        (CHAT, {"temperature": "1"}, "temperature"),
        (CHAT, {"temperature": 1e-300}, "temperature"),
        (CHAT, {"top_p": 1.5}, "top_p"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"n": 2.5}, "n"),
        (CHAT, {"stop": ""}, "stop"),
        (CHAT, {"stop": ["x"] * 17}, "stop"),
        (CHAT, {"stop": "\ud800"}, "stop"),
        (CHAT, {"seed": 2**63}, "seed"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        (
            CHAT,
            {"messages": [*QUESTION, {"role": "assistant", "content": "x", "audio": {}}]},
            "messages",
        ),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "eom": True}]}, "messages"),
        (CHAT, {"response_format": {"type": "yaml"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [{"type": "retrieval"}]}, "tools"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", 5]}, "prompt"),
        (COMPLETIONS, {"prompt": [5000]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": None}, "prompt"),
        (COMPLETIONS, {"suffix": "end"}, "suffix"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens"),
        (COMPLETIONS, {"prompt": ["x"] * 17, "n": 128}, "n"),
        (COMPLETIONS, {"messages": QUESTION}, "messages"),
    ],
)
def test_what_isnt_supported_is_refused_by_name(
    server: Server, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": QUESTION} if path == CHAT else {"prompt": STORY}
    response = post(server, path, {**body, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"
    assert param in error["message"] or param in ("messages", "tools", "prompt"), error
    assert server.n_free == server.n_slots


def test_an_error_gives_the_reason_for_each_type_of_a_field(server: Server) -> None:
    error = post(server, CHAT, {"messages": QUESTION, "stop": ["x"] * 17}).json()["error"]
    assert "should be a valid string; stop." in error["message"]
    assert "at most 16 items" in error["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("", "the body: expected a JSON object"),
        ("{", "isn't valid JSON: Expecting property name enclosed in double quotes, at character"),
        ("[]", "the body: expected a JSON object"),
        ("null", "the body: expected a JSON object"),
        ('"x"', "the body: expected a JSON object"),
        ('{"prompt": NaN}', "prompt"),
        (b"\xff", "parsing the body"),
        ("[" * 100_000, "parsing the body"),
        ('{"seed": ' + "9" * 5000 + "}", "parsing the body"),
    ],
)
def test_a_body_that_isnt_an_object_is_refused(
    server: Server, body: str | bytes, reason: str
) -> None:
    response = post(server, COMPLETIONS, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert reason in error["message"]
    assert error["param"] in (None, "prompt")
    typed = {"content-type": "text/plain"}  # which any web page may send
    response = post(server, COMPLETIONS, {"prompt": STORY}, **typed)
    assert response.status_code == 400
    assert "with the header 'Content-Type: application/json'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, {"messages": [{}] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (ChatBody, {"messages": QUESTION, "tools": [1] * 1000}),
        (ChatBody, {"messages": QUESTION, "stop": [1] * 1000}),
        (ChatBody, {"messages": QUESTION, "stream_options": dict.fromkeys(map(str, range(999)))}),
        (CompletionBody, {"prompt": ["x"] * 1000 + [1]}),
        (CompletionBody, {"prompt": [1] * 1000 + ["x"]}),
        (CompletionBody, {"prompt": [["x"] * 1000] * 1000}),
    ],
)
def test_checking_a_body_ends_at_the_first_wrong_item(
    kind: type[ChatBody | CompletionBody], body: dict[str, Any]
) -> None:
    """Of millions, the errors would fill the memory."""
    with pytest.raises(pydantic.ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 4  # one for each type of the field


def test_a_prompt_that_is_too_long_is_refused(server: Server) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": [5] * 257, "max_tokens": 0}),
        (COMPLETIONS, {"prompt": [5] * 256}),
        (CHAT, {"messages": [{"role": "user", "content": "long " * 300}]}),
    ):
        response = post(server, path, body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "max_seq_len is 256" in error["message"]
    fits = post(server, COMPLETIONS, {"prompt": [5] * 256, "max_tokens": 0, "echo": True})
    assert fits.status_code == 200


def test_a_body_that_is_too_large_is_refused(server: Server) -> None:
    body = json.dumps({"prompt": "x" * 2**25}).encode()
    for content in (body, iter([body])):  # with its length, and in chunks without
        response = server.http.post("/v1/completions", content=content, headers=JSON)
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "the body has more than 33554432 bytes"


@pytest.mark.parametrize(("key", "status"), [("wrong", 401), ("k", 413)])
def test_calls_are_refused_before_their_body_is_read(llm: Llama, key: str, status: int) -> None:
    with serving(llm, api_key="k") as server:
        place = urllib.parse.urlsplit(server.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest("POST", "/v1/completions")
            for name, value in JSON.items():
                connection.putheader(name, value)
            connection.putheader("authorization", f"Bearer {key}")
            connection.putheader("content-length", str(2**25 + 1))
            connection.endheaders()  # and nothing of the body
            assert connection.getresponse().status == status


def test_fields_without_effect_and_neutral_values_are_accepted(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(messages=QUESTION, **GREEDY)
    same = client.chat.completions.create(
        messages=QUESTION,
        **GREEDY,
        user="someone",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        frequency_penalty=0.0,
        presence_penalty=0,
        logit_bias={},
        n=1,
        modalities=["text"],
        verbosity="medium",
        reasoning_effort="none",
        tool_choice="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        stop=None,
        extra_body={"top_k": None},
    )
    assert chat_text(same) == chat_text(plain)


def test_models(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    for call in (
        lambda: client.models.retrieve("gpt-5"),
        lambda: client.chat.completions.create(model="gpt-5", messages=QUESTION),
        lambda: client.completions.create(model="org/other", prompt=STORY),
    ):
        with pytest.raises(openai.NotFoundError, match="isn't served here: this server has 'demo'"):
            call()
    response = server.http.get("/v1/nothing")
    assert (response.status_code, response.json()["error"]["message"]) == (404, "Not Found")
    assert server.http.post(f"/v1/{CHAT}/", json={}).status_code == 404
    response = server.http.get(f"/v1/{CHAT}")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["message"] == "Method Not Allowed"


def test_a_key(llm: Llama) -> None:
    with serving(llm, api_key="sésame") as server:
        assert server.http.get("/health").json() == {"status": "ok"}
        assert server.http.get("/openapi.json").status_code == 200
        assert server.http.get("/else").status_code == 401
        wrong: list[Any] = [{}, {"authorization": "Bearer sesame"}]
        basic, empty = ({"authorization": x} for x in ("Basic sésame".encode(), b"Bearer"))
        for headers in [*wrong, basic, empty]:
            response = server.http.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            response = post(server, COMPLETIONS, {"prompt": STORY}, **headers)
            assert response.status_code == 401
        right = {b"authorization": "Bearer sésame".encode()}
        assert server.http.get("/v1/models", headers=right).status_code == 200


def test_cross_origin_calls_are_allowed_on_request(server: Server, llm: Llama) -> None:
    page = {"origin": "http://page.test"}
    preflight = {
        **page,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    with serving(llm, cors=["http://page.test"], api_key="k") as allowing:
        response = allowing.http.options(f"/v1/{CHAT}", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "http://page.test"
        assert "authorization" in response.headers["access-control-allow-headers"]
        refused = allowing.http.get("/v1/models", headers=page)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (
            401,
            "http://page.test",
        )
        other = allowing.http.get("/v1/models", headers={"origin": "http://other.test"})
        assert "access-control-allow-origin" not in other.headers
    response = server.http.get("/v1/models", headers=page)
    assert "access-control-allow-origin" not in response.headers


# --- Many clients ---------------------------------------------------------------------------------


def test_answers_to_concurrent_clients_equal_those_alone(server: Server) -> None:
    """And the steps are shared: 64 clients take less than a third of the steps."""
    bodies: list[Any] = [
        {**GREEDY, "messages": [{"role": "user", "content": f"What is {20 + i} + {31 + i}?"}]}
        for i in range(64)
    ]

    async def ask(together: bool) -> list[str]:
        options: Any = {"base_url": server.url, "api_key": "x", "max_retries": 0, "timeout": 60}
        async with openai.AsyncOpenAI(**options) as client:
            calls = [client.chat.completions.create(**body) for body in bodies]
            if together:
                return [chat_text(answer) for answer in await asyncio.gather(*calls)]
            return [chat_text(await call) for call in calls]

    def counted(together: bool) -> tuple[list[str], int]:
        before = server.driver.n_steps
        return asyncio.run(ask(together)), server.driver.n_steps - before

    alone, n_alone = counted(False)
    together, n_together = counted(True)
    assert together == alone
    assert len(set(alone)) > 32
    assert n_alone >= 3 * n_together
    assert server.n_free == server.n_slots


@contextlib.contextmanager
def sent(server: Server, path: str, body: Any) -> Iterator[http.client.HTTPConnection]:
    """A call whose answer isn't awaited."""
    place = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", f"/v1/{path}", json.dumps(body), JSON)
        yield connection


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("n_steps", [0, 3])
def test_a_client_that_goes_away_frees_its_slots_at_the_next_step(
    llm: Llama, is_streamed: bool, n_steps: int
) -> None:
    with serving(llm) as server:
        server.driver.hold()
        body = {"prompt": STORY, "max_tokens": 200, "n": 2, "stream": is_streamed}
        with sent(server, COMPLETIONS, body) as connection:
            wait_until(lambda: len(server.engine_loop._running) == 2)
            server.driver.allow(n_steps)
            if n_steps:
                assert server.n_free == server.n_slots - 2
            if n_steps and is_streamed:
                with connection.getresponse() as response:
                    assert response.readline().startswith(b"data: ")
            wait_until(lambda: server.driver.n_begun > server.driver.n_steps)
        wait_until(lambda: not server.engine_loop._inbox.empty())
        server.driver.allow(1)  # it had begun
        server.driver.allow(1)
        assert server.n_free == server.n_slots
        assert not server.driver.is_busy
        server.driver.go_on()
        assert post(server, COMPLETIONS, {"prompt": STORY}).status_code == 200


def test_a_client_goes_away_during_its_prefill_or_in_the_queue(llm: Llama) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(llm))
        loop = server.engine_loop
        server.llm.engine.max_prefill_tokens = 8
        server.driver.hold()
        with sent(server, COMPLETIONS, {"prompt": [5] * 200}):
            wait_until(lambda: len(loop._running) == 1)
            [request] = loop._running
            server.driver.allow(2)
            assert 0 < request.n_prefilled < 200
            wait_until(lambda: server.driver.n_begun > server.driver.n_steps)
        wait_until(lambda: not loop._inbox.empty())
        server.driver.allow(2)  # the first of them had begun
        assert server.n_free == server.n_slots
        stack.enter_context(sent(server, COMPLETIONS, {"prompt": STORY, "n": 8}))
        wait_until(lambda: len(loop._running) == 8)
        with sent(server, COMPLETIONS, {"prompt": STORY, "n": 5}):
            wait_until(lambda: loop._n_open == 13)
            server.driver.allow(1)
            wait_until(lambda: len(loop._waiting) == 5)
            wait_until(lambda: server.driver.n_begun > server.driver.n_steps)
        wait_until(lambda: not loop._inbox.empty())
        server.driver.allow(2)
        assert (len(loop._waiting), loop._n_open) == (0, 8)


def test_a_full_queue_refuses_calls(llm: Llama) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(llm, max_queue=1))
        server.driver.hold()
        bodies = [{"prompt": STORY, "n": n, "max_tokens": 3} for n in (7, 2)]
        held = [stack.enter_context(sent(server, COMPLETIONS, body)) for body in bodies]
        wait_until(lambda: server.engine_loop._n_open == 9)
        refused = post(server, COMPLETIONS, {"prompt": STORY})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "9 requests are running or waiting, and the" in refused.json()["error"]["message"]
        server.driver.go_on()
        for connection in held:
            answer = json.load(connection.getresponse())
            assert all(choice["finish_reason"] == "length" for choice in answer["choices"])
        assert post(server, COMPLETIONS, {"prompt": STORY}).status_code == 200


def test_a_stop_finishes_what_runs_and_refuses_the_rest(llm: Llama) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(llm))
        server.driver.hold()
        bodies = [{"prompt": STORY, "n": n, "max_tokens": n + 5} for n in (7, 1)]
        running = [stack.enter_context(sent(server, COMPLETIONS, body)) for body in bodies]
        wait_until(lambda: server.engine_loop._n_open == 8)
        server.driver.allow(1)
        wait_until(lambda: len(server.engine_loop._running) == 8)
        waiting = [
            stack.enter_context(sent(server, COMPLETIONS, {"prompt": STORY, "stream": is_streamed}))
            for is_streamed in (False, True)
        ]
        wait_until(lambda: server.engine_loop._n_open == 10)
        server.driver.allow(2)
        assert len(server.engine_loop._running) == 8
        server.engine_loop.stop()
        new = post(server, COMPLETIONS, {"prompt": STORY})
        assert (new.status_code, new.json()["error"]["type"]) == (503, "server_error")
        assert server.http.get("/health").status_code == 503
        server.driver.go_on()
        for n, connection in zip((7, 1), running, strict=True):
            answer = json.load(connection.getresponse())
            assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * n
        for connection in waiting:
            response = connection.getresponse()
            assert response.status == 503
            assert json.load(response)["error"]["message"] == "the server has stopped"
        server.loop_thread.join(10)
        assert not server.loop_thread.is_alive()


def test_a_stop_ends_a_call_of_which_a_request_waits(llm: Llama) -> None:
    with serving(llm) as server:
        server.driver.hold()
        with sent(server, COMPLETIONS, {"prompt": STORY, "n": 9, "max_tokens": 200}) as connection:
            wait_until(lambda: len(server.engine_loop._running) == 8)
            server.driver.allow(1)
            server.engine_loop.stop()
            server.driver.go_on()
            assert connection.getresponse().status == 503
        server.loop_thread.join(10)
        assert server.driver.n_steps < 5
        assert server.n_free == server.n_slots


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logits_that_arent_finite_end_the_running_calls_only(llm: Llama, is_streamed: bool) -> None:
    body = {"prompt": STORY, "max_tokens": 9, "stream": is_streamed}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(llm))
        server.driver.hold()
        connection = stack.enter_context(sent(server, COMPLETIONS, body))
        wait_until(lambda: len(server.engine_loop._running) == 1)
        server.driver.allow(2)
        server.driver.failure = FloatingPointError("the logits aren't finite")
        server.driver.allow(1)
        server.driver.go_on()
        response = connection.getresponse()
        text = response.read().decode()
        assert response.status == (200 if is_streamed else 500)
        error = json.loads(text.removesuffix("\n\n").rpartition("data: ")[2])["error"]
        assert (error["type"], error["message"]) == ("server_error", "the logits aren't finite")
        assert "[DONE]" not in text
        assert post(server, COMPLETIONS, {"prompt": STORY}).status_code == 200
        assert server.n_free == server.n_slots


def test_an_error_in_a_stream_is_an_event(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError(STORY)

    with serving(llm) as server:
        monkeypatch.setattr(Answer, "last_chunks", broken)
        body = {"prompt": STORY, "max_tokens": 2, "stream": True}
        lines = []
        with (
            contextlib.suppress(httpx.RemoteProtocolError),  # the connection is closed
            server.http.stream("POST", "/v1/completions", json=body) as response,
        ):
            for line in response.iter_lines():
                lines.append(line)
        error = json.loads(lines[-2].removeprefix("data: "))["error"]
        assert (error["type"], error["message"]) == ("server_error", "the server failed (KeyError)")
        assert post(server, COMPLETIONS, {"prompt": STORY}).status_code == 200
        assert server.n_free == server.n_slots


def test_any_other_error_of_a_step_ends_the_server(llm: Llama) -> None:
    with serving(llm) as server:
        server.driver.hold()
        with sent(server, COMPLETIONS, {"prompt": STORY}) as connection:
            wait_until(lambda: len(server.engine_loop._running) == 1)
            server.driver.failure = RuntimeError("out of order")
            server.driver.allow(1)
            response = connection.getresponse()
            assert response.status == 503
            message = json.load(response)["error"]["message"]
            assert message == "the server failed (RuntimeError) and stops"
        server.loop_thread.join(10)
        assert str(server.error) == "out of order"
        assert post(server, COMPLETIONS, {"prompt": STORY}).status_code == 503


# --- Tools and structured output ------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["sum"],
    "additionalProperties": False,
}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def tools_server() -> Iterator[Server]:
    """The demo model, as if it were Llama 3.1."""
    sizes: Any = {"max_seq_len": 1024, "max_batch_size": 2}
    llm = Llama.build(str(DEMO), dtype="float32", device="cpu", **sizes)
    tokenizer = Tokenizer(str(DEMO / "tokenizer.model"), llama31=True)
    with serving(Llama(llm.model, tokenizer)) as server:
        yield server


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_json_schema_is_kept(client: openai.OpenAI, is_streamed: bool) -> None:
    pytest.importorskip("llguidance", reason="needs the extra [structured]")
    schema: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    json_object: Any = {"type": "json_object"}
    for kind in (schema, json_object):
        response: Any = client.chat.completions.create(
            messages=QUESTION, **GREEDY, response_format=kind, stream=is_streamed, max_tokens=60
        )
        if is_streamed:
            text = "".join(c.choices[0].delta.content or "" for c in response)
        else:
            text = chat_text(response)
        if kind is schema:
            assert 0 <= json.loads(text)["sum"] <= 99
        assert text.startswith("{")


def test_a_schema_that_isnt_supported_is_refused(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="needs the extra [structured]")
    schema: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "what"}}}
    with pytest.raises(openai.BadRequestError, match="the JSON schema isn't supported") as caught:
        client.chat.completions.create(messages=QUESTION, **GREEDY, response_format=schema)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_that_cant_be_continued_is_an_error(
    client: openai.OpenAI, is_streamed: bool
) -> None:
    pytest.importorskip("llguidance", reason="needs the extra [structured]")
    endless = {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}
    schema: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": endless}}
    with pytest.raises(openai.APIError, match="can't be continued as JSON"):
        list(
            client.chat.completions.create(
                messages=QUESTION, **GREEDY, response_format=schema, stream=is_streamed
            )
        )


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_required_call_comes_back_as_tool_calls(tools_server: Server, is_streamed: bool) -> None:
    pytest.importorskip("llguidance", reason="needs the extra [structured]")
    with tools_server.client() as client:
        choice: Any = {"type": "function", "function": {"name": "add"}}
        response: Any = client.chat.completions.create(
            messages=QUESTION, **GREEDY, tools=[ADD], tool_choice=choice, stream=is_streamed
        )
        if is_streamed:
            chunks = list(response)
            deltas = [chunk.choices[0].delta for chunk in chunks]
            [call] = [call for delta in deltas for call in delta.tool_calls or []]
            assert call.index == 0
            assert not any(delta.content for delta in deltas)
            reason = chunks[-1].choices[0].finish_reason
        else:
            assert response.choices[0].message.content is None
            [call] = response.choices[0].message.tool_calls
            reason = response.choices[0].finish_reason
        assert (call.type, call.function.name, reason) == ("function", "add", "tool_calls")
        assert 0 <= json.loads(call.function.arguments)["sum"] <= 99
        # and the dialog goes on
        messages: Any = [
            *QUESTION,
            {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index"})]},
            {"role": "tool", "tool_call_id": call.id, "content": "68"},
        ]
        answer = client.chat.completions.create(messages=messages, **GREEDY, tools=[ADD])
        assert answer.choices[0].message.content
        assert not answer.choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("answer", "content", "n_calls"),
    [
        ('{"name": "add", "parameters": {"sum": 1}}', "", 1),
        ('{"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}', "", 2),
        ('<function=add>{"sum": 1}</function>', "", 1),
        ('add.call(sum="1")', "", 1),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', 0),
        ("<function of x> grows", "<function of x> grows", 0),
        ("The sum is 68.", "The sum is 68.", 0),
        ("12.5 is right", "12.5 is right", 0),
        ("68", "68", 0),
        ('<|python_tag|>{"name": "add", "parameters": {"sum": 1}}', "", 1),
        ('I add. <|python_tag|>{"name": "add", "parameters": {"sum": 1}}', "I add. ", 1),
        ("I add. <|python_tag|>print(7)", "I add. print(7)", 0),
        ("<|python_tag|>", "", 0),
    ],
)
@pytest.mark.parametrize("is_parallel", [True, False])
def test_calls_are_found_in_answers(
    tools_server: Server,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    content: str,
    n_calls: int,
    is_parallel: bool,
) -> None:
    """Whatever the model writes, here by a sampler that forces it."""
    tokenizer = tools_server.llm.tokenizer
    ids = tokenizer.encode(answer, bos=False, eos=False, allowed_special="all")
    end = "<|eom_id|>" if "<|python_tag|>" in answer else "<|eot_id|>"
    ids.append(tokenizer.special_tokens[end])
    wanted: Any = {**GREEDY, "messages": QUESTION, "tools": [ADD]}
    wanted["parallel_tool_calls"] = is_parallel
    n_calls = n_calls if is_parallel else min(n_calls, 1)

    def forced() -> Any:
        rest = iter(ids)
        return lambda logits, *_: logits.new_full((len(logits),), next(rest)).long()

    with tools_server.client() as client:
        monkeypatch.setattr(tools_server.llm.engine, "sample", forced())
        message = client.chat.completions.create(**wanted).choices[0].message
        assert (message.content or "", len(message.tool_calls or [])) == (content, n_calls)
        monkeypatch.setattr(tools_server.llm.engine, "sample", forced())
        deltas = [
            chunk.choices[0].delta
            for chunk in client.chat.completions.create(**wanted, stream=True)
        ]
        texts = [delta.content for delta in deltas if delta.content]
        assert "".join(texts) == content
        assert sum(len(delta.tool_calls or []) for delta in deltas) == n_calls
        monkeypatch.setattr(tools_server.llm.engine, "sample", forced())
        message = client.chat.completions.create(**wanted, tool_choice="none").choices[0].message
        assert not message.tool_calls
        if content.startswith("The"):
            assert len(texts) > 3  # streamed as soon as it can't be a call


def test_required_calls_with_other_options(tools_server: Server) -> None:
    """Several choices, log-probabilities, stop strings and a limit that cuts a call off."""
    pytest.importorskip("llguidance", reason="needs the extra [structured]")
    wanted: Any = {"messages": QUESTION, "tools": [ADD], "tool_choice": "required", "seed": 1}
    with tools_server.client() as client:

        def choices(**options: Any) -> Any:
            return client.chat.completions.create(model=NAME, **{**wanted, **options}).choices

        for choice in choices(n=3, logprobs=True, top_logprobs=1):
            [call] = choice.message.tool_calls
            assert 0 <= json.loads(call.function.arguments)["sum"] <= 99
            text = "".join(token.token for token in choice.logprobs.content)
            assert json.loads(text)["parameters"] == json.loads(call.function.arguments)
        for options, reason in (({"max_tokens": 8}, "length"), ({"stop": "add"}, "stop")):
            [choice] = choices(**options)
            assert choice.finish_reason == reason
            assert choice.message.content.startswith('{"type": "')
            assert not choice.message.tool_calls


def test_the_next_turn_computes_only_what_follows_a_call(
    tools_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call in the form of the published page is encoded as the model generated it."""
    tokenizer = tools_server.llm.tokenizer
    call = '{"type": "function", "name": "add", "parameters": {"sum": "Łódź \\"a\\"\\n"}}'
    tag, eom = (tokenizer.special_tokens[name] for name in ("<|python_tag|>", "<|eom_id|>"))
    ids = iter([tag, *tokenizer.encode(call, bos=False, eos=False), eom])
    wanted: Any = {**GREEDY, "tools": [ADD]}
    with tools_server.client() as client:
        with monkeypatch.context() as patch:
            forced = lambda logits, *_: logits.new_full((len(logits),), next(ids)).long()  # noqa: E731
            patch.setattr(tools_server.llm.engine, "sample", forced)
            first = client.chat.completions.create(messages=QUESTION, **wanted)
        message = first.choices[0].message
        [made] = message.tool_calls or []
        result: Any = {"role": "tool", "tool_call_id": made.id, "content": "68"}
        messages: Any = [*QUESTION, message.model_dump(exclude_none=True), result]
        second = client.chat.completions.create(messages=messages, **wanted)
        assert first.usage
        assert second.usage
        assert second.usage.prompt_tokens_details
        # all but the stop token, which didn't pass through the model
        assert second.usage.prompt_tokens_details.cached_tokens == first.usage.total_tokens - 1


def test_tools_that_cant_be_offered_are_refused(
    client: openai.OpenAI, tools_server: Server
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"tools: they need Llama 3.1|doesn't have"):
        client.chat.completions.create(messages=QUESTION, **GREEDY, tools=[ADD])
    strict: Any = {"type": "function", "function": {**ADD["function"], "strict": True}}
    schema: Any = {"type": "json_object"}
    with tools_server.client() as other:
        with pytest.raises(openai.BadRequestError, match="tool 0 is strict, which needs a tool_ch"):
            other.chat.completions.create(messages=QUESTION, **GREEDY, tools=[strict])
        with pytest.raises(openai.BadRequestError, match="response_format and tools exclude each"):
            other.chat.completions.create(
                messages=QUESTION, **GREEDY, tools=[ADD], response_format=schema
            )


# --- The program ----------------------------------------------------------------------------------


def test_the_program_logs_nothing_of_its_calls_and_finishes_them_after_sigterm() -> None:
    program = Program(
        DEMO, "--dtype", "float32", "--max_seq_len", "512", env={"LLAMA_API_KEY": "secret-key"}
    )
    with contextlib.ExitStack() as stack:
        stack.callback(program.process.kill)
        options: Any = {"base_url": program.url, "max_retries": 0, "timeout": 60}
        client = stack.enter_context(openai.OpenAI(**options, api_key="secret-key"))
        prompt = "Secretly, once upon a time"
        text = (
            client.completions.create(model="model", prompt=prompt, max_tokens=30).choices[0].text
        )
        wrong = stack.enter_context(openai.OpenAI(**options, api_key="wrong-key"))
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="model", prompt=prompt * 200)
        body: Any = {"model": "model", "prompt": prompt, "max_tokens": 400, "temperature": 2}
        stream = client.completions.create(**body, seed=1, stream=True, extra_body={})
        chunks = [next(stream)]
        program.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        status, stdout, stderr = program.wait()
        assert status == 0
        assert "Serving model on http://127.0.0.1:" in stdout
        for secret in ("Secretly", text[:20], "secret-key", "wrong-key"):
            assert secret not in stdout + stderr
        assert stderr == ""


def test_an_address_in_use_is_reported_before_the_weights_are_read(server: Server) -> None:
    port = urllib.parse.urlsplit(server.url).port or 0
    with pytest.raises(OSError, match=rf"can't listen on 127.0.0.1, port {port} \(.*give another"):
        serve("no folder", port=port)
    with pytest.raises(ValueError, match="--max_queue is -1, expected 0 or more"):
        serve("no folder", max_queue=-1)
    with pytest.raises(ValueError, match="--port is 80000, expected 0 to 65535"):
        serve("no folder", port=80000)
    with pytest.raises(ValueError, match="--api_key is empty"):
        serve("no folder", api_key="")


def test_of_two_servers_that_start_on_one_port_the_second_reports_it(llm: Llama) -> None:
    """Both can bind it, until one listens."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(_bound_socket("127.0.0.1", 0))
        port = first.getsockname()[1]
        second = stack.enter_context(_bound_socket("127.0.0.1", port))
        loops = [EngineLoop(llm, Driver(llm), 1) for _ in range(2)]
        apps = [build_app(llm, loop, model_name=NAME) for loop in loops]
        stack.enter_context(_served(apps[0], first, uvicorn, loops[0]))
        with pytest.raises(OSError, match=rf"can't listen on 127.0.0.1, port {port} \("):
            stack.enter_context(_served(apps[1], second, uvicorn, loops[1]))
        assert loops[1].is_stopping
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_options_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Listener(contextlib.nullcontext[Any]):
        def __enter__(self) -> Any:
            return self

        def getsockname(self) -> tuple[str, int]:
            return "192.0.2.1", 8000

    found: list[dict[str, Any]] = []
    monkeypatch.setattr(command, "_bound_socket", lambda *_: Listener())
    monkeypatch.setattr(command, "_served", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(EngineLoop, "run", lambda _: None)
    monkeypatch.setattr("llama.serving.app.build_app", lambda *_, **given: found.append(given))
    options: Any = {"model_name": "m", "api_key": "k", "cors": "http://a,http://b", "seed": 5}
    serve(str(DEMO), **options, device="cpu")
    assert "use it" not in capsys.readouterr().out
    serve(str(DEMO), device="cpu")
    assert "Without a key, whoever reaches 192.0.2.1 can use it" in capsys.readouterr().out
    monkeypatch.setenv("LLAMA_API_KEY", "of-environment")
    serve(str(DEMO), device="cpu")
    assert found == [
        {**options, "cors": ["http://a", "http://b"]},
        {"model_name": "model", "api_key": None, "cors": [], "seed": 1},
        {"model_name": "model", "api_key": "of-environment", "cors": [], "seed": 1},
    ]


def test_a_second_interrupt_ends_the_program(llm: Llama) -> None:
    loop = EngineLoop(llm, Driver(llm), 1)
    with command._signals(loop):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
            assert loop.is_stopping
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_client_that_sends_half_a_call_doesnt_keep_the_server(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_GRACE", 1)
    with contextlib.ExitStack() as stack:
        with serving(llm) as server:
            place = urllib.parse.urlsplit(server.url)
            address = place.hostname, place.port or 0
            half = stack.enter_context(socket.create_connection(address))
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert server.http.get("/health").status_code == 200
            timer = threading.Timer(20, half.close)
            timer.start()
        assert timer.is_alive()
        timer.cancel()


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"needs fastapi and uvicorn .* -e \"\.\[serve\]\""):
        serve(str(DEMO))


def test_exceptions_are_logged_without_their_messages(
    llm: Llama,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(prompt: list[int], *_: Any) -> None:
        raise KeyError(llm.tokenizer.decode(prompt))

    async def forgotten() -> None:
        task = asyncio.ensure_future(fails())
        await asyncio.sleep(0.01)
        assert task.done()

    async def fails() -> None:
        raise KeyError("sec" + "ret")  # not as in this line, which is logged

    with serving(llm) as server:
        asyncio.run(forgotten())
        logging.getLogger("asyncio").warning("socket.send() raised exception.")
        monkeypatch.setattr(server.llm.engine, "request", broken)
        response = post(server, COMPLETIONS, {"prompt": "secret"})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the server failed (KeyError)"
    logged = capfd.readouterr().err + caplog.text
    assert "in broken" in logged
    assert "KeyError" in logged
    assert "exception was never retrieved" in logged
    assert "secret" not in logged
    assert "socket" not in logged
