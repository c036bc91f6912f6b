"""The server with real clients, on two ranks, under random calls, and for thousands of them."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from conftest import DEMO, TORCHRUN, run
from serving import NAME, Program, Server, serving
from soak import resident_bytes, slope

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.__main__ import convert_folder
from llama.commands.evaluate import evaluate

pytestmark = pytest.mark.slow
FLOAT32 = ("--dtype", "float32", "--max_seq_len", "256")


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama.build(str(DEMO), max_seq_len=258, max_batch_size=8, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(llm: Llama) -> Iterator[Server]:
    with serving(llm) as found:
        yield found
        assert found.n_free == found.n_slots


def test_langchain(server: Server, llm: Llama) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra [test]")
    options: Any = {"base_url": server.url, "api_key": "x", "model": NAME, "temperature": 0}
    chat = langchain_openai.ChatOpenAI(**options, max_retries=0, seed=1, stop_sequences=["\0"])
    question = "What is 23 + 45?"
    [expected] = llm.chat_completion([[{"role": "user", "content": question}]], temperature=0)
    text = expected["generation"]["content"]
    assert chat.invoke(question).content == text
    assert "".join(chunk.content for chunk in chat.stream(question)) == text
    assert [answer.content for answer in chat.batch([question] * 3)] == [text] * 3
    message = chat.bind(logprobs=True, top_logprobs=2, max_tokens=3).invoke(question)
    assert len(message.response_metadata["logprobs"]["content"]) == 3
    pytest.importorskip("llguidance", reason="needs the extra [structured]")
    schema = {
        "title": "answer",
        "type": "object",
        "properties": {"sum": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    found = chat.with_structured_output(schema, method="json_schema").invoke(question)
    assert 0 <= found["sum"] <= 99


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_gives_the_numbers_of_the_command(server: Server, tmp_path: Path) -> None:
    """local-completions, with the arguments that docs/server.md gives."""
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    from test_evaluate import TASKS, results, write_tasks

    tasks = write_tasks(tmp_path)
    folder = str(tmp_path / "hf")
    convert_folder(str(DEMO), folder, format="hf")
    ours = tmp_path / "ours.json"
    options: Any = {"max_seq_len": 256, "dtype": "float32", "device": "cpu", "output": str(ours)}
    evaluate(str(DEMO), ",".join(TASKS), include_path=str(tasks), **options)
    wanted = json.loads(ours.read_text())
    for concurrent in (1, 8):
        arguments = {
            "model": NAME,
            "base_url": f"{server.url}/completions",
            "tokenizer_backend": "huggingface",
            "tokenizer": folder,
            "add_bos_token": True,
            "max_length": 258,
            "num_concurrent": concurrent,
            "max_retries": 1,
        }
        found = results("local-completions", tasks, model_args=arguments)
        for task in TASKS:
            rows = found["samples"][task]
            for row, own in zip(rows, wanted["samples"][task], strict=True):
                assert row["doc_id"] == own["doc_id"]
                for [got], [expected] in zip(row["resps"], own["resps"], strict=True):
                    if task == "local_choice":
                        assert float(got[0]) == pytest.approx(float(expected[0]), abs=1e-4)
                        assert str(got[1]) == str(expected[1])
                    elif task == "local_until":
                        assert got == expected
                    else:
                        assert float(got) == pytest.approx(float(expected), rel=1e-6)
            for metric, value in wanted["results"][task].items():
                if isinstance(value, float) and "stderr" not in metric:
                    assert found["results"][task][metric] == pytest.approx(value, rel=1e-5)


@pytest.fixture
def small_server() -> Iterator[Server]:
    """Random weights, whose steps are a third as long."""
    tokenizer = Tokenizer(str(DEMO / "tokenizer.model"))
    sizes: Any = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 16}
    args = ModelArgs(**sizes, vocab_size=tokenizer.n_words, max_seq_len=256, max_batch_size=8)
    model = Transformer(args)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    with serving(Llama(model, tokenizer)) as found:
        yield found


def test_random_calls_of_its_own_openapi_page(server: Server, tmp_path: Path) -> None:
    """Schemathesis finds no status 500, no call without an answer, and no error of another shape.
    (Some rules between fields can't be part of a schema: valid calls may be refused.)"""
    pytest.importorskip("schemathesis", reason="needs the extra [test]")
    page = f"{server.url.removesuffix('/v1')}/openapi.json"
    options = ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    options += ["--max-examples", "100", "--generation-deterministic", "--request-timeout", "60"]
    program = "from schemathesis.cli import schemathesis; schemathesis()"
    result = run(sys.executable, "-c", program, "run", page, *options, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert server.http.get("/health").status_code == 200
    server.wait_until_free()


def test_thousands_of_calls(small_server: Server) -> None:
    """Of which a third is abandoned: memory is flat, and all slots are free at the end."""
    draw, resident = random.Random(1), []
    n_calls, n_clients = 5000, 16

    async def one(client: httpx.AsyncClient) -> None:
        is_chat, is_streamed = draw.random() < 0.5, draw.random() < 0.5
        body: dict[str, Any] = {"stream": is_streamed, "n": draw.choice([1, 1, 1, 3])}
        body |= {"max_tokens": draw.randint(1, 6), "temperature": draw.choice([0, 1])}
        text = " ".join(draw.choice(["fox", "cat", "sun"]) for _ in range(draw.randint(1, 20)))
        if is_chat:
            body |= {"messages": [{"role": "user", "content": text}]}
            body |= {"logprobs": True, "top_logprobs": 2} if draw.random() < 0.3 else {}
        else:
            body |= {"prompt": text, "echo": draw.random() < 0.3, "stop": ["."]}
            body |= {"logprobs": 1} if draw.random() < 0.3 else {}
        path = "chat/completions" if is_chat else "completions"
        url = f"{small_server.url}/{path}"
        if draw.random() < 0.3:
            body["max_tokens"] = 200
            if is_streamed:
                async with client.stream("POST", url, json=body) as stream:
                    async for _ in stream.aiter_lines():
                        if draw.random() < 0.3:
                            break
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(client.post(url, json=body), draw.uniform(0.001, 0.03))
        else:
            response = await client.post(url, json=body)
            assert response.status_code == 200, response.text

    async def clients() -> None:
        left = iter(range(n_calls))
        limits = httpx.Limits(max_connections=n_clients)

        async def several(client: httpx.AsyncClient) -> None:
            for _ in left:
                await one(client)
                resident.append(resident_bytes())

        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            await asyncio.gather(*(several(client) for _ in range(n_clients)))

    asyncio.run(clients())
    small_server.wait_until_free()
    assert small_server.engine_loop._n_open == 0
    rise, error = slope(resident[n_calls // 2 :])
    print(f"{rise:.0f} +- {error:.0f} bytes per call")
    assert rise - 3 * error < 500


def test_on_two_ranks_the_first_one_serves() -> None:
    """With the answers of one process; a SIGTERM to torchrun lets it finish what runs."""
    samplings: list[Any] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}]
    found = []
    for launcher in ((), (*TORCHRUN, "2")):
        program = Program(DEMO, *FLOAT32, launcher=launcher)
        try:
            with openai.OpenAI(base_url=program.url, api_key="x", max_retries=0) as client:
                story: Any = {"model": "model", "prompt": "Once upon a time", "max_tokens": 40}
                answers = [client.completions.create(**story, **sampling) for sampling in samplings]
                found.append([answer.choices[0].text for answer in answers])
                story |= {"max_tokens": 200, "stream": True, "temperature": 2}
                stream = client.completions.create(**story, seed=1)
                chunks = [next(stream)]
                program.process.terminate()
                chunks += list(stream)
                assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        finally:
            status, stdout, stderr = program.wait()
        assert stdout.count("Serving model on ") == 1
        assert "llama: " not in stderr  # reports of the watchdog
        if not launcher:
            assert (status, stderr) == (0, "")
    assert found[0] == found[1]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_rank_that_is_killed_ends_the_server() -> None:
    program = Program(DEMO, *FLOAT32, launcher=(*TORCHRUN, "2"))
    pid = program.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(max(map(int, children)), signal.SIGKILL)
    status, _, stderr = program.wait()
    assert status != 0
    assert stderr.count("llama: ") <= 1
