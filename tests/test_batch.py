"""python -m llama batch: answers, faults of lines, and what is left after kill -9."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, TORCHRUN, environment, run, torchrun
from serving import serving

from llama import Dialog, Llama, Tokenizer
from llama.commands import batch_output
from llama.commands.batch import batch, encode_lines, generate, ordered
from llama.commands.batch_lines import PromptLine, read_lines
from llama.commands.options import ModelOptions
from llama.engine import Engine
from llama.request import Request
from llama.serving.structured import JsonConstraint

Json = dict[str, Any]
MODEL: Json = {"dtype": "float32", "device": "cpu", "max_seq_len": 128, "max_batch_size": 4}
FLAGS = [f"--{name}={value}" for name, value in MODEL.items()]
CHAT = "chat/completions"
QUESTION = [{"role": "user", "content": "Hi"}]
SEED = 1  # the default of ModelOptions
LONG = "Once upon a time, there was a little girl named Lily. " * 6
LINES: list[Json] = [
    {"prompt": "Once upon a time", "temperature": 0, "max_gen_len": 20},
    {"id": "ids", "prompt": [1, 5, 300, 41], "temperature": 1.0, "top_p": 1.0, "seed": 7},
    {"id": "dialog", "messages": [{"role": "user", "content": "What is 23 + 45?"}]},
    {"prompt": "The dog", "stop": ".", "logprobs": True, "temperature": 0},
    {"id": -1, "prompt": "The dog", "stop": ["a", 10], "max_gen_len": 30},
    {"prompt": "né ", "max_gen_len": 0, "id": None},
    {"prompt": LONG, "temperature": 0, "logprobs": True},
    {
        "id": "tail",
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "logprobs": True,
        "temperature": 0,
    },
]


CHAT = "chat/completions"
QUESTION = [{"role": "user", "content": "Hi"}]


def openai_line(key: str, url: str, **body: Any) -> Json:
    return {"custom_id": key, "method": "POST", "url": f"/v1/{url}", "body": body}


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return str(path)


def same(body: Json) -> Json:
    """An answer of the API without what differs from run to run."""
    if "error" not in body:
        body |= {"id": "", "created": 0}
        body["usage"].pop("prompt_tokens_details")  # how much the cache had
        for choice in body["choices"]:
            for call in choice.get("message", {}).get("tool_calls", []):
                call["id"] = ""
    return body


def answers(path: Path) -> dict[str | int, Json]:
    """The answers by id, each exactly once."""
    found = {}
    data = path.read_text(encoding="utf-8")
    assert data.endswith("\n")
    for line in map(json.loads, data.removesuffix("\n").split("\n")):
        key = line.get("custom_id", line.get("id"))
        assert key not in found, f"{key} is there twice"
        if "custom_id" in line:
            same(line["response"]["body"])
        found[key] = line
    return found


def close_to(found: Any, expected: Any) -> bool:
    """Equal, except for the rounding of log-probabilities."""
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, abs=1e-4))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            close_to(found[k], expected[k]) for k in found
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close_to, found, expected))
    return bool(found == expected)


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama.build(str(DEMO), **MODEL)


def run_here(source: str, output: Path, **options: Any) -> dict[str | int, Json]:
    batch(str(DEMO), source, str(output), **MODEL, **options)
    return answers(output)


# --- Answers ----------------------------------------------------------------------------------


def alone(llm: Llama, line: Json, number: int) -> Json:
    """What the public calls give for one line."""
    options = {"seed": SEED + number, **line}
    key, content = options.pop("id", None), options.pop("messages", None)
    prompt = options.pop("prompt", None)
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    if content:
        found: Any = llm.chat_completion([content], **options)[0]
    elif isinstance(prompt, str):
        found = llm.text_completion([prompt], **options)[0]
    else:
        [tokens], _ = llm.generate([prompt], 128, **options)
        found = {"generation": llm.tokenizer.decode(tokens)}
    return {"id": number if key is None else key, **found}


def test_each_line_is_answered_as_it_is_alone(tmp_path: Path, llm: Llama) -> None:
    found = run_here(write(tmp_path / "in", LINES), tmp_path / "out")
    assert len(found) == len(LINES)
    tail = found["tail"]
    assert tail["finish_reason"] == "stop"  # by a token, which counts
    assert tail["usage"]["completion_tokens"] == len(tail["tokens"]) + 1
    for number, line in enumerate(LINES, start=1):
        expected = alone(llm, line, number)
        result = found[expected["id"]]
        usage, reason = result.pop("usage"), result.pop("finish_reason")
        assert close_to(result, expected)
        limit = min(line.get("max_gen_len", 128), 128 - usage["prompt_tokens"])
        assert usage["completion_tokens"] <= limit
        assert reason == "stop" or usage["completion_tokens"] == limit
    assert found["dialog"]["generation"] == {"role": "assistant", "content": "23 + 45 = 68."}
    assert found[6]["generation"] == ""


def test_the_commands_options_hold_where_a_line_has_none(tmp_path: Path, llm: Llama) -> None:
    lines = [{"prompt": "The dog"}, {"prompt": "The dog", "max_gen_len": 9, "temperature": 1.5}]
    found = run_here(
        write(tmp_path / "in", lines), tmp_path / "out", temperature=0, max_gen_len=5, seed=3
    )
    greedy, sampled = found[1], found[2]
    assert greedy["generation"] == llm.text_completion(["The dog"], 0, 0.9, 5)[0]["generation"]
    expected = llm.text_completion(["The dog"], 1.5, 0.9, 9, seed=3 + 2)[0]["generation"]
    assert sampled["generation"] == expected


def test_openais_lines_get_the_servers_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo model, as if it were Llama 3.1, which has tools."""
    sizes: Json = {**MODEL, "max_seq_len": 512}
    tokenizer = Tokenizer(str(DEMO / "tokenizer.model"), llama31=True)
    llm = Llama(Llama.build(str(DEMO), **sizes).model, tokenizer)
    monkeypatch.setattr(ModelOptions, "build", lambda self: llm)
    question = [{"role": "user", "content": "What is 23 + 45?"}]
    properties = {"a": {"type": "integer"}}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    add = {"type": "function", "function": {"name": "add", "parameters": schema}}
    json_schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    chats: list[Json] = [
        {"logprobs": True, "top_logprobs": 2, "temperature": 0, "n": 1, "stream": False},
        {"max_completion_tokens": 3, "user": None, "stop": "3", "n": 3, "seed": 5},
        {"tools": [add], "tool_choice": "required", "seed": 1},
        {"response_format": json_schema, "seed": 2},
    ]
    texts: list[Json] = [
        {"prompt": "The dog", "max_tokens": 9, "stop": ["."], "seed": 3},
        {"prompt": ["The dog", "Lily"], "temperature": 0, "n": 2},
        {"prompt": [[1, 5, 300]], "max_tokens": 0, "echo": True, "logprobs": 1},
    ]
    lines = [
        *(openai_line(f"{i}", CHAT, messages=question, **body) for i, body in enumerate(chats)),
        *(openai_line(f"t{i}", "completions", **body) for i, body in enumerate(texts)),
    ]
    found = run_here(write(tmp_path / "in", lines), tmp_path / "out")
    with serving(llm) as server:
        for line in lines:
            answer = found[line["custom_id"]]
            assert answer.keys() == {"id", "custom_id", "response", "error"}
            assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
            expected = server.http.post(line["url"], json=line["body"]).json()
            assert close_to(answer["response"]["body"], same(expected) | {"model": str(DEMO)})
    choice = found["2"]["response"]["body"]["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "add"
    text = found["3"]["response"]["body"]["choices"][0]["message"]["content"]
    assert json.loads(text).keys() <= {"a"}


def test_an_answer_that_fails_has_an_error_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JsonConstraint, "mask", lambda self, logits: None)  # then it isn't JSON
    json_object = {"type": "json_object"}
    lines = [
        openai_line("fails", CHAT, messages=QUESTION, response_format=json_object, max_tokens=9),
        openai_line("text", "completions", prompt="The dog"),
    ]
    found = run_here(write(tmp_path / "in", lines), tmp_path / "out")
    response = found["fails"]["response"]
    assert response["status_code"] == 400
    assert "the answer can't be continued as JSON" in response["body"]["error"]["message"]
    assert found["text"]["response"]["status_code"] == 200


def test_defaults_of_openais_lines_are_the_apis_unless_the_command_has_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = added(monkeypatch)
    lines = [
        openai_line("text", "completions", prompt="The dog"),
        openai_line("chat", CHAT, messages=QUESTION),
        openai_line("own", CHAT, messages=QUESTION, max_tokens=3, temperature=0.5),
    ]
    source = write(tmp_path / "in", lines)
    run_here(source, tmp_path / "a")
    run_here(source, tmp_path / "b", temperature=0, max_gen_len=5)
    found = [(r.params.max_gen_len, r.params.temperature, r.params.top_p) for r in requests]
    assert sorted(map(str, found[:3])) == ["(16, 1.0, 1.0)", "(3, 0.5, 1.0)", "(None, 1.0, 1.0)"]
    assert sorted(map(str, found[3:])) == ["(3, 0.5, 1.0)", "(5, 0.0, 1.0)", "(5, 0.0, 1.0)"]


def test_openais_lines_forget_their_texts_and_name_themselves(llm: Llama) -> None:
    line = openai_line("a", CHAT, messages=QUESTION, n=2)
    [(found, prompts)] = prompts_of(llm, [line])
    assert found._body.messages == []
    assert [request.row for request in found.requests(llm, prompts)] == [1, 1]


def test_openais_lines_need_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama.commands.batch_openai", None)
    run_here(write(tmp_path / "in", LINES[:1]), tmp_path / "out")
    source = write(tmp_path / "openai", [openai_line("a", "completions", prompt="a")])
    with pytest.raises(ImportError, match=r"lines of OpenAI's batch API need pydantic.*\[serve\]"):
        run_here(source, tmp_path / "other")


def test_choices_without_seeds_differ_from_those_of_the_next_line(tmp_path: Path) -> None:
    lines = [openai_line(f"{i}", "completions", prompt="The", n=3) for i in range(3)]
    found = run_here(write(tmp_path / "in", lines), tmp_path / "out")
    texts = [c["text"] for line in found.values() for c in line["response"]["body"]["choices"]]
    assert len(set(texts)) == len(texts) == 9


def test_openais_client_reads_the_bodies(tmp_path: Path) -> None:
    types = pytest.importorskip("openai.types")
    question: Dialog = [{"role": "user", "content": "What is 23 + 45?"}]
    lines = [
        openai_line("chat", "chat/completions", messages=question, logprobs=True),
        openai_line("text", "completions", prompt="The dog", max_tokens=9),
    ]
    found = run_here(write(tmp_path / "in", lines), tmp_path / "out")
    chat = types.chat.ChatCompletion.model_validate(found["chat"]["response"]["body"], strict=True)
    assert chat.choices[0].logprobs.content
    types.Completion.model_validate(found["text"]["response"]["body"], strict=True)


# --- The engine -------------------------------------------------------------------------------


def prompts_of(llm: Llama, lines: list[Json]) -> Any:
    data = "\n".join(map(json.dumps, lines)).encode()
    return encode_lines("in", read_lines("in", data, {"temperature": 0}), llm)


def added(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the engine gets."""
    found: list[Request] = []
    add = Engine.add

    def recording(engine: Engine, requests: list[Request], generator: Any) -> None:
        found.extend(requests)
        add(engine, requests, generator)

    monkeypatch.setattr(Engine, "add", recording)
    return found


def test_slots_stay_full_and_few_requests_wait(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 30) for _ in range(60)]
    lines = [{"prompt": [9, i], "max_gen_len": n} for i, n in enumerate(lengths)]
    step, n_waiting, requests = Engine.step, [], added(monkeypatch)

    def counted(engine: Engine) -> Any:
        n_waiting.append(len(engine._waiting))
        return step(engine)

    monkeypatch.setattr(Engine, "step", counted)
    found = list(generate(llm, prompts_of(llm, lines), 0, name="", progress=False))
    assert len(found) == len(lines)
    n_tokens = sum(len(request.tokens) for request in requests)
    assert len(n_waiting) <= n_tokens / 4  # the first token of each takes no step of its own
    assert max(n_waiting) <= 8


def test_a_shared_beginning_is_computed_once(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 prompts with one of five beginnings, in turns."""
    lines = [{"prompt": [7, 8 + i % 5] * 20 + [i, i], "max_gen_len": 2} for i in range(40)]
    prompts = ordered(prompts_of(llm, lines))
    requests = added(monkeypatch)
    assert len(list(generate(llm, prompts, 0, name="", progress=False))) == len(requests) == 40
    assert sum(request.n_reused < 40 for request in requests) == 5


def test_prompts_of_similar_length_are_neighbours(llm: Llama) -> None:
    rng = random.Random(0)
    lines: list[Json] = [{"prompt": [5 + i] * rng.randrange(1, 9)} for i in range(20)]
    lines += [{"prompt": [3] * 8 + [4] * i} for i in (1, 7, 6)]  # one beginning
    prompts = [list(tokens) for _, [tokens] in ordered(prompts_of(llm, lines))]
    assert sorted(prompts) == sorted(line["prompt"] for line in lines)
    lengths = [len(prompt) for prompt in prompts]
    assert lengths == [9, 14, 15, *sorted(lengths[3:], reverse=True)]


# --- Lines that aren't valid ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ([{"prompt": "a"}], "it is [{'prompt': 'a'}], expected a JSON object"),
        ({"promt": "a"}, "it has 'promt', expected only id, prompt, messages, max_gen_len, "),
        ({"id": "a"}, "it has neither, expected either prompt or messages"),
        ({"prompt": "a", "messages": QUESTION}, "it has both, expected either"),
        ({"prompt": ["a", "b"]}, "each has its own line"),
        ({"prompt": [1, True]}, "prompt is [1, True], expected a text or a list of token ids"),
        ({"messages": "Hi"}, "the dialog is 'Hi', expected a list of messages"),
        ({"messages": [{"role": "user"}]}, "message 0 is {'role': 'user'}, expected a dict"),
        ({"messages": [{"role": "robot", "content": ""}]}, "message 0 has the role 'robot'"),
        ({"prompt": "a", "id": 1.5}, "its id is 1.5, expected a text or a whole number"),
        ({"prompt": "a", "id": True}, "its id is True, expected a text or a whole number"),
        ({"prompt": "a", "id": "\ud800"}, "surrogates not allowed"),
        ({"prompt": "a", "temperature": "0"}, "temperature is '0', expected int or float"),
        ({"prompt": "a", "temperature": True}, "temperature is True, expected int or float"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1, expected 0 (greedy) or"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is nan, expected 0"),
        ({"prompt": "a", "max_gen_len": 2.0}, "max_gen_len is 2.0, expected int"),
        ({"prompt": "a", "logprobs": 1}, "logprobs is 1, expected bool"),
        ({"prompt": "a", "seed": 2**64}, "seed is 18446744073709551616, expected -2**63 to"),
        ({"prompt": "a", "stop": [""]}, "stop has '', expected strings that aren't empty"),
        ({"custom_id": "a"}, "method is None, expected 'POST'"),
        ({**openai_line("a", CHAT, messages=QUESTION), "custom_id": 7}, "custom_id is 7"),
        ({**openai_line("a", CHAT, messages=QUESTION), "id": 7}, "it has 'id', expected only"),
        (openai_line("a", "embeddings", input="a"), "url is '/v1/embeddings', expected one of"),
        ({**openai_line("a", CHAT), "body": []}, "body is [], expected a JSON object"),
        (openai_line("a", CHAT), "messages: Field required"),
        (openai_line("a", CHAT, messages=QUESTION, prompt="a"), "prompt isn't supported: leave"),
        (openai_line("a", CHAT, messages=QUESTION, tools=[{}]), "tool 0 is {}, expected"),
        (openai_line("a", CHAT, messages=QUESTION, n=0), "n: Input should be greater than"),
        (openai_line("a", CHAT, messages=QUESTION, stream=True), "stream is true, expected false"),
        (
            openai_line("a", CHAT, messages=QUESTION, max_tokens=2, max_completion_tokens=3),
            "max_tokens is 2 and max_completion_tokens 3: give one of them",
        ),
        (openai_line("a", "completions", prompt="a", suffix="b"), "suffix isn't supported"),
    ],
)
def test_a_fault_names_its_line_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: Any, message: str
) -> None:
    monkeypatch.setattr(ModelOptions, "build", lambda self: pytest.fail("built"))
    source = write(tmp_path / "in", [{"prompt": "fine"}, line, {"prompt": 3}])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        batch(str(DEMO), source, str(tmp_path / "out"))
    first, second, third = str(error.value).split("\n")
    assert first == f"lines of {source} aren't valid:"
    assert second.startswith("  line 2: ")
    assert third.startswith("  line 3: prompt is 3, expected a text or a list of token ids")
    assert os.listdir(tmp_path) == ["in"]


def test_damaged_and_empty_files_are_refused() -> None:
    def fault(data: bytes) -> str:
        with pytest.raises(ValueError, match="in ") as error:
            read_lines("in", data, {})
        return str(error.value)

    assert "line 2: Expecting" in fault(b'{"prompt": "a"}\n{"prompt": \n')
    assert "line 1: 'utf-8' codec" in fault(b'{"prompt": "\xff"}\n')
    assert "line 1: " in fault(b"[" * 100_000)
    assert fault(b"\n \r\n") == "in is empty, expected a JSON object on each line"
    many = fault(b"{}\n" * 100)
    assert len(many.split("\n")) == 22
    assert many.endswith("  and 80 more")


def test_a_byte_order_mark_is_skipped() -> None:
    [line] = read_lines("in", b'\xef\xbb\xbf{"prompt": "\xef\xbb\xbfa"}', {})
    assert isinstance(line, PromptLine)
    assert line.content == "\ufeffa"


def test_blank_lines_count_and_ids_must_differ() -> None:
    data = b'\n{"prompt": "a"}\r\n\n{"prompt": "b", "id": 5}\n{"prompt": "c"}'
    with pytest.raises(ValueError, match="line 5: its id 5 is that of line 4 too"):
        read_lines("in", data, {})
    lines = read_lines("in", data.replace(b"5", b'"5"'), {})
    assert [(line.number, line.id) for line in lines] == [(2, 2), (4, "5"), (5, 5)]


def test_what_the_model_does_not_support_is_found_before_anything_is_generated(
    tmp_path: Path,
) -> None:
    lines = [
        {"prompt": "fine"},
        {"prompt": [5] * 129},
        {"prompt": [1024]},
        {"prompt": []},
        {"messages": [{"role": "tool", "content": "68"}]},
        {"prompt": [5] * 128},
    ]
    with pytest.raises(ValueError, match="aren't valid") as error:
        run_here(write(tmp_path / "in", lines), tmp_path / "out")
    _, *faults = str(error.value).split("\n")
    assert [fault.split(":")[0] for fault in faults] == [f"  line {i}" for i in (2, 3, 4, 5)]
    assert "has 129 tokens, but max_seq_len is 128: shorten it, or raise --max_seq_len" in faults[0]
    assert os.listdir(tmp_path) == ["in"]


# --- Interruptions ----------------------------------------------------------------------------


MIXED = [*LINES, openai_line("openai", "completions", prompt="The dog", max_tokens=9)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str | int, Json]:
    """The answers to ``MIXED`` in one run."""
    folder = tmp_path_factory.mktemp("whole")
    return run_here(write(folder / "in", MIXED), folder / "out")


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "in.jsonl", MIXED)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_an_incomplete_last_line_is_written_again(
    source: str, output: Path, whole: dict[str | int, Json]
) -> None:
    run_here(source, output)
    data = output.read_bytes()
    rng = random.Random(0)
    for size in [0, 1, len(data) - 1, len(data), *rng.sample(range(len(data)), 6)]:
        output.write_bytes(data[:size])
        kept = data[: data.rfind(b"\n", 0, size) + 1]
        assert close_to(run_here(source, output), whole)
        assert output.read_bytes().startswith(kept)


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError("not finite")])
def test_an_interrupted_run_keeps_its_answers_and_continues(
    source: str,
    output: Path,
    whole: dict[str | int, Json],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Any,
) -> None:
    def failing(engine: Engine) -> Any:
        if output.read_bytes().count(b"\n") >= 3:
            raise error
        return step(engine)

    step = Engine.step
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", failing)
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            run_here(source, output)
    assert f"{output} isn't complete: repeat the command to continue" in capsys.readouterr().err
    kept = output.read_bytes()
    assert 3 <= kept.count(b"\n") < len(MIXED)
    assert close_to(run_here(source, output), whole)
    assert output.read_bytes().startswith(kept)
    shown = capsys.readouterr()
    assert f"{output} has {kept.count(bytes([10]))} answers" in shown.err
    assert re.search(r"100%.* tokens/s", shown.err)
    assert shown.out.endswith(f"\n{output}: {len(MIXED)} answers\n")


def test_a_complete_file_stays_as_it_is(source: str, output: Path) -> None:
    run_here(source, output)
    before = output.read_bytes()
    run_here(source, output)
    assert output.read_bytes() == before


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_parts_are_appended_once(
    source: str,
    output: Path,
    whole: dict[str | int, Json],
    monkeypatch: pytest.MonkeyPatch,
    n_steps: int,
) -> None:
    """Parts of killed copies, whose last line is incomplete; the first process is then killed
    while it appends them."""
    run_here(source, output)
    texts = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(texts[:2]) + texts[2][:9])
    part = output.with_name("out.jsonl.part-1")
    part.write_bytes(b"".join(texts[3:5]) + texts[5][:9])
    output.with_name("out.jsonl.part-2").write_bytes(texts[6][:-1])
    unlink, calls = Path.unlink, []

    def killed(path: Path) -> None:
        calls.append(path)
        if len(calls) > n_steps:
            raise KeyboardInterrupt
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        if n_steps < 2:
            with pytest.raises(KeyboardInterrupt):
                run_here(source, output)
    assert close_to(run_here(source, output), whole)
    assert output.read_bytes().startswith(b"".join(texts[:2] + texts[3:5]))
    assert sorted(os.listdir(output.parent)) == ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]


def test_a_short_write_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        data = b""

        def write(self, data: bytes) -> int:
            self.data += data[:3]
            return len(data[:3])

    file: Any = Slow()
    batch_output._write(file, b"12345678\n")
    assert file.data == b"12345678\n"


# --- Outputs that can't be continued ----------------------------------------------------------


def refused(source: str, output: Path, **options: Any) -> str:
    """The message of a command that is refused and leaves the output alone."""
    before = output.read_bytes() if output.is_file() else b""
    with pytest.raises((ValueError, OSError)) as error:
        run_here(source, output, **options)
    assert before == (output.read_bytes() if output.is_file() else b"")
    return str(error.value)


def test_other_options_or_another_input_are_refused_before_the_model_is_loaded(
    source: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(source, output)
    monkeypatch.setattr(ModelOptions, "build", lambda self: pytest.fail("built"))
    message = refused(source, output, temperature=0, quantize="int8")
    assert "quantize was None, is 'int8'; temperature was None, is 0)" in message
    write(Path(source), MIXED[1:])
    assert "input_sha256 was" in refused(source, output)


def test_other_batch_sizes_are_not_refused(source: str, output: Path) -> None:
    run_here(source, output)
    batch(str(DEMO), source, str(output), **{**MODEL, "max_batch_size": 2})


def test_files_of_others_are_refused(source: str, output: Path) -> None:
    output.write_text("my notes\n")
    assert "out.jsonl.run.json, which would have the options" in refused(source, output)
    output.unlink()
    output.mkdir()
    assert "isn't a regular file" in refused(source, output)
    output.rmdir()
    output = output.parent / "missing" / "out"
    with pytest.raises(FileNotFoundError, match="is in a folder that doesn't exist"):
        run_here(source, output)


def test_devices_and_pipes_are_refused(output: Path) -> None:
    for source in ("/dev/zero", str(output)):
        if source == str(output):
            os.mkfifo(source)
        with pytest.raises(ValueError, match="isn't a regular file, expected one"):
            batch(str(DEMO), source, f"{output}.new")


def test_answers_of_another_run_that_has_ended_since_are_refused(
    source: str, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found no output when they started."""
    build = ModelOptions.build

    def during_it(model: ModelOptions) -> Llama:
        monkeypatch.setattr(ModelOptions, "build", build)
        run_here(source, output, temperature=0)
        return build(model)

    monkeypatch.setattr(ModelOptions, "build", during_it)
    with pytest.raises(ValueError, match=r"answers of another run \(temperature was 0, is None\)"):
        run_here(source, output)
    run_here(source, output, temperature=0)


def test_files_with_names_like_parts_are_left_alone(source: str, output: Path) -> None:
    run_here(source, output)
    for name in ("out.jsonl.part-1.old", "out.jsonl.part-", "out_jsonl.part-1"):
        output.with_name(name).write_bytes(output.read_bytes())
    run_here(source, output)
    assert len(os.listdir(output.parent)) == 6


def test_foreign_and_repeated_lines_are_refused(source: str, output: Path) -> None:
    run_here(source, output)
    data = output.read_bytes()
    first = data.splitlines(keepends=True)[0]
    for line, message in [
        (b'{"id": "new"}\n', f'line 10 of {output} is b\'{{"id": "new"}}'),
        (b"my notes\n", f"line 10 of {output} is b'my notes"),
        (b"[" * 5000 + b"\n", f"line 10 of {output} is b'[["),
        (first, f"{output} has two lines with the id "),
    ]:
        output.write_bytes(data + line)
        assert refused(source, output).startswith(message)


def test_answers_of_a_part_that_is_elsewhere_are_missed(output: Path) -> None:
    with contextlib.closing(batch_output.Output(output, {})) as out:
        assert out.begin({"a": 1, "b": 2}) == [1, 2]
        out.write("a", b'{"id": "a"}\n')
        with pytest.raises(ValueError, match=r"1 answers aren't in .*: give an output in a folder"):
            out.end()
        out.write("b", b'{"id": "b"}\n')
        out.end()


def test_two_commands_do_not_write_one_file(source: str, output: Path) -> None:
    with output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert f"another process is writing {output}" in refused(source, output)
    run_here(source, output)


# --- Processes --------------------------------------------------------------------------------


def made_up(n: int) -> list[Json]:
    rng = random.Random(1)
    lines: list[Json] = []
    for i in range(n):
        a, b = rng.randrange(100), rng.randrange(100)
        line: Json = {"prompt": rng.choice(["Once upon a time", "The dog", "One day, Lily"])}
        if i % 3 == 0:
            line = {"messages": [{"role": "user", "content": f"What is {a} + {b}?"}]}
        if i % 5 == 0:
            line = openai_line(f"c{i}", "completions", prompt=f"{a} {b}", max_tokens=15)
        elif i % 2:
            line |= {"id": f"é{i}", "temperature": 0}
        lines.append(line)
    return lines


def command(source: str, output: Path, *more: str) -> list[str]:
    return [
        "-m",
        "llama",
        "batch",
        str(DEMO),
        source,
        str(output),
        "--max_gen_len=30",
        *FLAGS,
        *more,
    ]


@pytest.fixture(scope="module")
def long_input(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("long") / "in.jsonl", made_up(300))


@pytest.fixture(scope="module")
def expected(long_input: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str | int, Json]:
    """The answers to ``long_input``, in one run of one process."""
    return run_here(long_input, tmp_path_factory.mktemp("expected") / "out", max_gen_len=30)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def n_answers(output: Path) -> int:
    """Answers in the output and its parts; while a part is appended, some are in both."""
    found: set[bytes] = set()
    for path in [output, *output.parent.glob(f"{output.name}.part-*")]:
        with contextlib.suppress(FileNotFoundError):
            found.update(path.read_bytes().split(b"\n")[:-1])
    return len(found)


@pytest.mark.slow
def test_kill_9_at_random_moments_loses_and_repeats_nothing(
    output: Path, long_input: str, expected: dict[str | int, Json]
) -> None:
    """Of forks of this process, which don't have to import torch first."""
    rng = random.Random(0)
    n_kills, seen = 0, 0
    arguments = (str(DEMO), long_input, str(output))
    while True:
        process = multiprocessing.get_context("fork").Process(
            target=batch, args=arguments, kwargs={**MODEL, "max_gen_len": 30}
        )
        process.start()
        # most kills while answers are written, some while the model is loaded
        wanted = seen + rng.randrange(1, 30) if rng.random() < 0.8 else 0
        while n_lines(output) < wanted and process.is_alive():
            time.sleep(0.001)
        if n_kills < 10:
            time.sleep(rng.random() * (0.02 if wanted else 0.3))
            process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        ended = process.exitcode == 0
        assert n_lines(output) >= seen
        seen = n_lines(output)
        n_kills += not ended
        if ended:
            assert answers(output) == expected
            if n_kills == 10:
                break
            # it was faster than the kills: start again
            output.unlink()
            output.with_name(f"{output.name}.run.json").unlink()
            seen = 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_two_ranks_give_the_answers_of_one_process(
    output: Path, expected: dict[str | int, Json], size: int
) -> None:
    source = write(output.with_name("in.jsonl"), made_up(300)[:80])
    result = torchrun(2, *command(source, output, f"--model_parallel_size={size}"))
    assert result.returncode == 0, result.stderr
    found = answers(output)
    assert found == {key: expected[key] for key in found}
    assert result.stdout.count(f"{output}: 80 answers") == 1
    assert sorted(os.listdir(output.parent)) == ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]
    assert len(found) == 80


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_other_numbers_of_ranks_continue_after_kill_9(
    output: Path, long_input: str, expected: dict[str | int, Json]
) -> None:
    """Of a rank, or of torchrun, whose ranks outlive it for a moment."""
    rng = random.Random(0)
    for n_ranks, size, victim in [(2, 1, 0), (3, 1, None), (2, 2, 1), (4, 2, 2)]:
        wanted = n_answers(output) + rng.randrange(1, 25)
        process = subprocess.Popen(
            [
                *TORCHRUN,
                str(n_ranks),
                *command(long_input, output, f"--model_parallel_size={size}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        try:
            # ranks of a killed torchrun may have written since
            while process.poll() is None and (
                len(children(process.pid)) < n_ranks or n_answers(output) < wanted
            ):
                time.sleep(0.001)
            killed = process.pid if victim is None else children(process.pid)[victim]
            os.kill(killed, signal.SIGKILL)
            assert process.wait(60) != 0
        finally:
            process.kill()
            process.wait()
        assert wanted <= n_answers(output) < 300
    result = run(sys.executable, *command(long_input, output))
    assert result.returncode == 0, result.stderr
    assert answers(output) == expected


def on_two_machines(*folders: Path, source: str) -> list[subprocess.CompletedProcess[str]]:
    """The command with two launchers, each in its folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=two"]
    options += [f"--rdzv_endpoint={endpoint}", "--local_addr=127.0.0.1"]
    arguments = command(source, Path("out.jsonl"), "--model_parallel_size=1")
    with ThreadPoolExecutor() as pool:
        nodes = [
            pool.submit(run, *TORCHRUN[:3], *options, *arguments, cwd=folder) for folder in folders
        ]
        return [node.result() for node in nodes]


@pytest.mark.slow
def test_two_machines_divide_the_lines(tmp_path: Path, expected: dict[str | int, Json]) -> None:
    source = write(tmp_path / "in.jsonl", made_up(300)[:40])
    results = on_two_machines(tmp_path, tmp_path, source=source)
    assert [result.returncode for result in results] == [0, 0], results
    assert sum("out.jsonl: 40 answers" in result.stdout for result in results) == 1
    found = answers(tmp_path / "out.jsonl")
    assert len(found) == 40
    assert found == {key: expected[key] for key in found}
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_refused(tmp_path: Path, long_input: str) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
    results = on_two_machines(*folders, source=long_input)
    assert all(result.returncode != 0 for result in results)
    message = "in a folder that all machines share"
    assert sum(message in result.stderr for result in results) == 1


@pytest.mark.slow
def test_machines_with_different_inputs_are_refused(tmp_path: Path) -> None:
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        write(folder / "in.jsonl", [{"prompt": folder.name}])
    results = on_two_machines(*folders, source="in.jsonl")
    assert all(result.returncode != 0 for result in results)
    assert any("input_sha256" in result.stderr for result in results)
    assert [os.listdir(folder) for folder in folders] == [["in.jsonl"]] * 2
