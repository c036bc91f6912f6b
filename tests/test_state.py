"""One object, used often and in bad moments: memory, interrupts, threads, abandoned streams."""

import copy
import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import soak
import torch
from conftest import PARAMS, PROGRAMS, new_model, random_weights, run

from llama import Llama, Tokenizer

PROMPTS = [[1, 2, 3, 4, 5], [9], [7, 20, 300, 11]]


@pytest.fixture
def fresh(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Llama:
    monkeypatch.setattr(tokenizer, "stop_tokens", set())
    model = new_model(PARAMS, random_weights(PARAMS), max_seq_len=128, max_batch_size=4)
    return Llama(model, tokenizer)


@pytest.fixture
def expected(fresh: Llama) -> Any:
    return fresh.generate(PROMPTS, 20, logprobs=True, seed=3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat_and_the_output_the_same() -> None:
    """As far as 400 calls can tell: docs/reliability.md has the figures of 2,000."""
    result = soak.soak(calls=400)
    assert result["same_output"]
    assert result["bytes_per_call"] < 150_000


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_call_that_breaks_off_leaves_no_trace(
    fresh: Llama, expected: Any, at: int, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in a layer, in prefill and in decoding."""
    layer, passes = fresh.model.layers[1], 0
    forward = layer.forward

    def failing(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == at:
            raise error
        return forward(*args)

    monkeypatch.setattr(layer, "forward", failing)
    with pytest.raises(error):
        fresh.generate(PROMPTS, 20, seed=3)
    monkeypatch.undo()
    assert fresh.generate(PROMPTS, 20, logprobs=True, seed=3) == expected
    assert torch.get_default_dtype() == torch.float32
    assert not torch.is_inference_mode_enabled()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """hypothesis has a callback in the garbage collector, where Python drops an interrupt."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_real_interrupt_leaves_no_trace(fresh: Llama, expected: Any) -> None:
    for seconds in (0.01, 0.02, 0.05):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            fresh.generate(PROMPTS * 500, 100)
        timer.join()
        assert fresh.generate(PROMPTS, 20, logprobs=True, seed=3) == expected


def test_two_models_take_turns(fresh: Llama, expected: Any, demo: Llama) -> None:
    """Steps of two streams, one after the other; the models differ in shape and dtype."""
    dialog: Any = [[{"role": "user", "content": "What is 23 + 45?"}]]
    prompt = demo.formatter.encode_dialog_prompt(dialog[0])
    one = fresh.stream(PROMPTS, 20, seed=3)
    two = demo.stream([prompt], 20, temperature=0)
    rows: list[list[int]] = [[], [], []]
    text = ""
    for events in one:
        for event in events:
            rows[event.row].append(event.token)
        text += "".join(event.text for event in next(two, []))
    assert rows == expected[0]
    assert text == "23 + 45 = 68."


def test_two_models_in_two_threads(fresh: Llama, expected: Any, demo: Llama) -> None:
    dialog: Any = [[{"role": "user", "content": "What is 23 + 45?"}]]

    def ask() -> Any:
        return demo.chat_completion(dialog, temperature=0)[0]["generation"]["content"]

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask) for _ in range(5)]
        rows = [fresh.generate(PROMPTS, 20, logprobs=True, seed=3) for _ in range(5)]
        assert {answer.result() for answer in answers} == {"23 + 45 = 68."}
    assert rows == [expected] * 5


def test_one_model_in_several_threads(fresh: Llama, expected: Any) -> None:
    """Calls follow one another."""
    other = fresh.generate([[5]], 30, seed=4)
    with ThreadPoolExecutor(4) as pool:
        calls = [(PROMPTS, 20, 3), ([[5]], 30, 4)] * 6
        results = [
            pool.submit(fresh.generate, prompts, n, logprobs=True, seed=seed)
            for prompts, n, seed in calls
        ]
        for i, result in enumerate(results):
            tokens, _ = result.result()
            assert tokens == (expected[0] if i % 2 == 0 else other[0])


def test_two_objects_around_one_model_in_two_threads(
    fresh: Llama, expected: Any, tokenizer: Tokenizer
) -> None:
    """The lock is the model's; ``forward`` takes it too."""
    other, prompt = Llama(fresh.model, fresh.tokenizer), torch.arange(40)[None]
    logits = fresh.model.forward(prompt, 0)
    with ThreadPoolExecutor(3) as pool:
        results = [
            pool.submit(llm.generate, PROMPTS, 20, logprobs=True, seed=3)
            for llm in [fresh, other] * 6
        ]
        passes = [pool.submit(fresh.model.forward, prompt, 0) for _ in range(6)]
        assert [result.result() for result in results] == [expected] * 12
        assert all(torch.equal(result.result(), logits) for result in passes)


def test_a_step_of_a_stream_waits_for_other_threads(fresh: Llama, expected: Any) -> None:
    """In prefill and in decoding."""
    stream = fresh.stream(PROMPTS, 20, seed=3)
    with ThreadPoolExecutor(1) as pool:
        for column in range(2):
            with fresh.model.lock:
                step = pool.submit(next, stream)
                assert not wait([step], timeout=0.2).done
            assert [event.token for event in step.result()] == [row[column] for row in expected[0]]


def test_a_model_can_be_copied(fresh: Llama, expected: Any) -> None:
    copied = Llama(copy.deepcopy(fresh.model), fresh.tokenizer)
    assert copied.model.lock is not fresh.model.lock
    assert copied.generate(PROMPTS, 20, logprobs=True, seed=3) == expected


def test_a_forked_process_can_generate(fresh: Llama, expected: Any) -> None:
    """Though the lock is another thread's and OpenMP's threads aren't there."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with fresh.model.lock:
            held.set()
            done.wait()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(hold)
        held.wait()
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        child = context.Process(target=lambda: results.put(fresh.generate(PROMPTS, 20, seed=3)[0]))
        child.start()
        child.join(60)
        done.set()
        child.kill()
    assert not results.empty()
    assert results.get() == expected[0]  # one thread: other digits of the log-probabilities


def test_a_stream_that_another_thread_overtakes_is_refused(fresh: Llama) -> None:
    stream = fresh.stream(PROMPTS, 20)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fresh.generate, [[1]], 2).result()
    with pytest.raises(RuntimeError, match="another generation has used this model since"):
        next(stream)


def test_an_abandoned_stream_frees_its_slots_and_memory(fresh: Llama, expected: Any) -> None:
    """Neither while it is kept nor when it is gone."""
    kept = [fresh.stream(PROMPTS, 20) for _ in range(3)]
    for stream in kept:
        next(stream)
        assert fresh.generate(PROMPTS, 20, logprobs=True, seed=3) == expected
    del kept, stream
    assert fresh.generate(PROMPTS, 20, logprobs=True, seed=3) == expected


@pytest.mark.slow
def test_greedy_tokens_do_not_depend_on_process_or_threads(folder: Path) -> None:
    """In float32; the logits agree to rounding."""
    results = []
    for threads in (1, 2, 2):
        result = run(
            sys.executable,
            PROGRAMS / "greedy.py",
            folder,
            "float32",
            env={"OMP_NUM_THREADS": str(threads)},
        )
        assert result.returncode == 0, result.stderr
        results.append(result.stdout.splitlines()[-1])

    (one, tokens_one, logits_one), (two, tokens_two, logits_two), _ = map(json.loads, results)
    assert (one, two) == (1, 2)
    assert tokens_one == tokens_two
    assert results[1] == results[2]  # the same number of threads: the same bits
    a, b = torch.tensor(logits_one), torch.tensor(logits_two)
    assert (a - b).abs().max() / b.abs().max() < 1e-5
