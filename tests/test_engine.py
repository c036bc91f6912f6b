"""The engine: requests join, wait, leave and are cancelled; bounded passes; prefix reuse."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, ROOT, new_model, random_weights, torchrun, write_checkpoint
from schedule import SIZES, schedule
from torch import Tensor

from llama import Llama, ModelArgs, Tokenizer, Transformer, memory
from llama.cache import Batch, Decode, Prefill
from llama.request import Request
from llama.sampling import SamplingParams

GREEDY = SamplingParams(max_gen_len=12, temperature=0)
RNG = random.Random(5)
LONG = [RNG.randrange(768) for _ in range(64)]
TEXT = "Once upon a time there was a little fox named Clara."
QUESTION, ANSWER, FOLLOW_UP = LONG[:30], LONG[30:40], LONG[40:50]


def new_llama(tokenizer: Tokenizer, **options: Any) -> Llama:
    model = new_model(PARAMS, random_weights(PARAMS), max_seq_len=96, max_batch_size=4)
    llm = Llama(model, tokenizer, **options)
    llm.tokenizer.stop_tokens = set()
    return llm


@pytest.fixture
def llm() -> Llama:
    return new_llama(Tokenizer(str(ROOT / "demo" / "model" / "tokenizer.model")))


@pytest.fixture
def plain() -> Llama:
    """Computes every prompt whole, by itself."""
    tokenizer = Tokenizer(str(ROOT / "demo" / "model" / "tokenizer.model"))
    return new_llama(tokenizer, prefix_caching=False)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The passes that run through any model. (A patch of the class, not of the instance, because
    that would switch prefix reuse off.)"""
    seen: list[Batch] = []
    hidden = Transformer.hidden

    def recording(self: Transformer, tokens: Tensor, batch: Batch) -> Tensor:
        seen.append(batch)
        return hidden(self, tokens, batch)

    monkeypatch.setattr(Transformer, "hidden", recording)
    return seen


def n_prefilled(passes: list[Batch]) -> int:
    return sum(sum(batch.seqlens) for batch in passes if isinstance(batch, Prefill))


def finish(llm: Llama, *requests: Request) -> list[list[int]]:
    while llm.engine.is_busy:
        llm.engine.step()
    return [request.tokens for request in requests]


def start(llm: Llama, prompt: list[int], params: SamplingParams = GREEDY, row: int = 0) -> Request:
    request = llm.engine.request(prompt, params, row)
    llm.engine.add([request])
    return request


# --- Joining and leaving ----------------------------------------------------------------------


def check_against_alone(results: Any, alone: Llama) -> None:
    reasons = set()
    for prompt, max_gen_len, tokens, reason in results:
        expected = alone.generate([prompt], max_gen_len, temperature=0)[0][0]
        reasons.add(reason)
        if reason == "cancelled":
            assert tokens == expected[: len(tokens)]
        else:
            assert [t for t in tokens if t not in alone.tokenizer.stop_tokens] == expected
    assert {"length", "cancelled"} <= reasons


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_requests_of_any_schedule_give_the_tokens_they_give_alone(
    folder: Path, prefix_caching: bool
) -> None:
    options: Any = {"device": "cpu", "dtype": "float32", **SIZES}
    llm = Llama.build(str(folder), prefix_caching=prefix_caching, **options)
    alone = Llama.build(str(folder), prefix_caching=False, **options | {"max_batch_size": 1})
    results = [row for seed in range(3) for row in schedule(llm, seed)]
    check_against_alone(results, alone)


def test_two_ranks_run_the_same_schedule(
    folder: Path, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    shards = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    program = ROOT / "tests" / "schedule.py"
    result = torchrun(2, program, shards, tmp_path, "[0, 1, 2]")
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first == second
    alone = Llama.build(
        str(folder), None, 96, 1, device="cpu", dtype="float32", prefix_caching=False
    )
    check_against_alone([row for results in first for row in results], alone)


def test_requests_beyond_the_slots_wait_in_order(llm: Llama, plain: Llama) -> None:
    lengths = [3, 9, 4, 6, 5, 2]
    params = [SamplingParams(max_gen_len=n, temperature=0) for n in lengths]
    requests = [start(llm, [row + 1], params[row], row) for row in range(6)]
    first_steps: dict[int, int] = {}
    step = 0
    while llm.engine.is_busy:
        for request, _ in llm.engine.step():
            first_steps.setdefault(request.row, step)
        step += 1
    assert [first_steps[row] for row in range(6)] == [0, 0, 0, 0, 2, 3]  # 0 and 2 leave
    expected = [plain.generate([[r + 1]], lengths[r], temperature=0)[0][0] for r in range(6)]
    assert [request.tokens for request in requests] == expected


def test_sampling_parameters_belong_to_a_request(llm: Llama, plain: Llama) -> None:
    hot = SamplingParams(max_gen_len=12, temperature=1.5, top_p=0.9)
    sampled = llm.engine.request(QUESTION, hot)
    llm.engine.add([sampled], torch.Generator().manual_seed(7))
    greedy = start(llm, ANSWER)
    finish(llm)
    assert greedy.tokens == plain.generate([ANSWER], 12, temperature=0)[0][0]
    assert sampled.tokens == plain.generate([QUESTION], 12, 1.5, 0.9, seed=7)[0][0]


def test_too_many_requests_at_once_are_refused(llm: Llama) -> None:
    requests = [llm.engine.request([1], GREEDY, row) for row in range(5)]
    with pytest.raises(ValueError, match="5 requests are added together, expected 1 to 4"):
        llm.engine.add(requests)


# --- Bounded passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [1, 16, 63])
def test_a_prompt_in_chunks_equals_the_whole(
    llm: Llama, plain: Llama, passes: list[Batch], bound: int
) -> None:
    """At bound 16 it is four times as long as a pass may be."""
    whole = plain.generate([LONG, ANSWER], 20, temperature=0, logprobs=True)
    passes.clear()
    llm.engine.max_prefill_tokens = bound
    chunked = llm.generate([LONG, ANSWER], 20, temperature=0, logprobs=True)
    assert chunked[0] == whole[0]
    for ours, theirs in zip(chunked[1] or [], whole[1] or [], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    sizes = [sum(batch.seqlens) for batch in passes if isinstance(batch, Prefill)]
    assert max(sizes) == bound
    assert sum(sizes) == len(LONG) + len(ANSWER)


def test_a_long_prompt_stalls_the_others_for_one_bounded_pass_at_most(
    llm: Llama, passes: list[Batch]
) -> None:
    llm.engine.max_prefill_tokens = 16
    decoding = start(llm, ANSWER, SamplingParams(max_gen_len=40, temperature=0))
    llm.engine.step()
    waiting = start(llm, LONG, row=1)
    n_steps = 0
    while not waiting.tokens:
        passes.clear()
        events = llm.engine.step()
        assert events[0][0] is decoding
        assert n_prefilled(passes) <= 16
        n_steps += 1
    assert n_steps == 4


def test_the_planned_workspace_follows_the_bound_of_a_pass() -> None:
    llama3_8b = ModelArgs(
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=1024,
        ffn_dim_multiplier=1.3,
        max_batch_size=4,
        max_seq_len=8192,
    )
    plans = [
        memory.plan(llama3_8b, 1, torch.bfloat16, max_prefill_tokens=n)
        for n in (2048, 4096, 4 * 8192)
    ]
    workspaces = [plan.workspace / memory.GIB for plan in plans]
    assert workspaces[0] < 0.5
    assert workspaces == sorted(workspaces)
    assert workspaces[2] > 4 * workspaces[0]


# --- Prefix reuse -----------------------------------------------------------------------------


def test_the_next_turn_computes_its_own_tokens_only(
    llm: Llama, plain: Llama, passes: list[Batch]
) -> None:
    answer = llm.generate([QUESTION], 12, temperature=0)[0][0]
    second = [*QUESTION, *answer, *FOLLOW_UP]
    passes.clear()
    again = llm.generate([second], 12, temperature=0)[0][0]
    # the last token of an answer hasn't been through the model: nothing came after it
    assert n_prefilled(passes) == len(FOLLOW_UP) + 1
    assert again == plain.generate([second], 12, temperature=0)[0][0]


def test_a_dialog_in_turns_gives_the_answers_it_gives_without_reuse(demo: Llama) -> None:
    fresh = Llama(demo.model, demo.tokenizer, prefix_caching=False)
    llm = Llama(demo.model, demo.tokenizer)
    questions = ["What is 23 + 45?", "Spell the word garden.", "What is the capital of Italy?"]
    answers = []
    for each in (llm, fresh):
        dialog: Any = []
        for question in questions:
            dialog.append({"role": "user", "content": question})
            dialog.append(each.chat_completion([dialog], temperature=0)[0]["generation"])
        answers.append(dialog)
    assert answers[0] == answers[1]


def test_samples_of_one_prompt_compute_it_once(
    llm: Llama, plain: Llama, passes: list[Batch]
) -> None:
    four = llm.text_completion([TEXT], 0.8, 0.9, 10, n=4, seed=3)
    n_prompt = len(llm.tokenizer.encode(TEXT, bos=True, eos=False))
    assert n_prefilled(passes) == n_prompt + 3  # of each other one the last token
    expected = plain.text_completion([TEXT] * 4, 0.8, 0.9, 10, seed=3)
    assert four == expected
    assert len({row["generation"] for row in four}) > 1


def test_a_slot_keeps_the_prefix_when_another_request_continues_it(
    llm: Llama, plain: Llama, passes: list[Batch]
) -> None:
    """Two continuations of a dialog: the second finds the common part too."""
    llm.generate([QUESTION], 2, temperature=0)
    passes.clear()
    for tail in (ANSWER, FOLLOW_UP):
        tokens = llm.generate([QUESTION + tail], 12, temperature=0)[0][0]
        assert tokens == plain.generate([QUESTION + tail], 12, temperature=0)[0][0]
    computed = n_prefilled(passes) - 2 * len(QUESTION) - len(ANSWER + FOLLOW_UP)  # plain's own
    assert computed == len(ANSWER + FOLLOW_UP)


def test_a_request_reuses_the_prefix_of_one_that_still_decodes(
    llm: Llama, plain: Llama, passes: list[Batch]
) -> None:
    first = start(llm, QUESTION, SamplingParams(max_gen_len=30, temperature=0))
    llm.engine.step()
    passes.clear()
    second = start(llm, QUESTION + ANSWER)
    finish(llm)
    assert n_prefilled(passes) == len(ANSWER)
    assert first.tokens == plain.generate([QUESTION], 30, temperature=0)[0][0]
    assert second.tokens == plain.generate([QUESTION + ANSWER], 12, temperature=0)[0][0]


def test_a_reused_slot_does_not_leak_keys_after_the_prefix(llm: Llama, plain: Llama) -> None:
    """Every position beyond the tokens that a slot claims is overwritten with large numbers."""
    llm.generate([LONG, QUESTION, LONG[:20]], 20, temperature=0)
    for cache in llm.model.cache:
        for slot, tokens in enumerate(llm.engine.slots.cached):
            cache.k[slot, :, len(tokens) :] = 1e4
            cache.v[slot, :, len(tokens) :] = 1e4
    llm.engine.slots.count_writes()  # as if the engine had made these
    prompts = [LONG[:25] + ANSWER, QUESTION + FOLLOW_UP, LONG[:20], [3, 1, 4]]
    requests = [start(llm, prompt, row=row) for row, prompt in enumerate(prompts)]
    finished = finish(llm, *requests)
    assert requests[0].n_reused >= 25
    assert [plain.generate([prompt], 12, temperature=0)[0][0] for prompt in prompts] == finished


def test_prefix_reuse_can_be_switched_off(plain: Llama, passes: list[Batch]) -> None:
    for _ in range(2):
        plain.generate([QUESTION], 2, temperature=0)
    assert n_prefilled(passes) == 2 * len(QUESTION)


def test_changed_weights_are_not_mixed_with_old_keys(llm: Llama) -> None:
    llm.generate([LONG], 4, temperature=0)
    with torch.no_grad():
        llm.model.layers[0].attention.wk.weight.mul_(-1)  # type: ignore[union-attr, operator]
    fresh = Llama(llm.model, llm.tokenizer, prefix_caching=False)
    tokens = llm.generate([LONG], 12, temperature=0)
    assert tokens == fresh.generate([LONG], 12, temperature=0)


def test_a_direct_forward_invalidates_cached_prefixes(llm: Llama, plain: Llama) -> None:
    llm.generate([LONG], 4, temperature=0)
    llm.model(torch.tensor([ANSWER] * 4), 0)
    assert (
        llm.generate([LONG], 12, temperature=0)[0] == plain.generate([LONG], 12, temperature=0)[0]
    )


# --- Breaking off -----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 3, 6])
def test_an_error_in_any_pass_frees_all_slots(
    llm: Llama, plain: Llama, monkeypatch: pytest.MonkeyPatch, at: int, error: type[BaseException]
) -> None:
    """In the first and the second chunk of a prompt, and while decoding."""
    llm.engine.max_prefill_tokens = 32
    hidden, n_passes = Transformer.hidden, 0

    def failing(self: Transformer, tokens: Tensor, batch: Batch) -> Tensor:
        nonlocal n_passes
        n_passes += 1
        if n_passes == at:
            raise error
        return hidden(self, tokens, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "hidden", failing)
        with pytest.raises(error):
            llm.generate([LONG, ANSWER], 12, temperature=0)
    assert llm.engine.slots.n_free == 4
    assert not llm.engine.is_busy
    prompts = [LONG, ANSWER, QUESTION]
    expected = plain.generate(prompts, 12, temperature=0)[0]
    assert llm.generate(prompts, 12, temperature=0)[0] == expected


def test_an_abandoned_stream_frees_its_slots(llm: Llama) -> None:
    stream: Iterator[Any] = llm.stream([LONG, ANSWER, QUESTION], 20, 0)
    next(stream)
    assert llm.engine.slots.n_free == 1
    del stream
    assert llm.engine.slots.n_free == 4


def test_an_old_stream_does_not_disturb_another_engine(llm: Llama, plain: Llama) -> None:
    """Two Llamas around one model: the first's stream is closed while the other's decodes."""
    other = Llama(llm.model, llm.tokenizer)
    old = llm.stream([LONG, QUESTION], 20, 0)
    next(old)
    stream = other.stream([ANSWER, FOLLOW_UP], 12, 0)
    rows: list[list[int]] = [[], []]
    for step, events in enumerate(stream):
        for event in events:
            rows[event.row].append(event.token)
        if step == 3:
            old.close()  # type: ignore[attr-defined]
    assert rows == plain.generate([ANSWER, FOLLOW_UP], 12, temperature=0)[0]
    assert llm.engine.slots.n_free == other.engine.slots.n_free == 4


def test_a_cancelled_request_makes_room_at_once(llm: Llama) -> None:
    requests = [start(llm, [row + 1], row=row) for row in range(5)]
    llm.engine.step()
    assert requests[4].slot is None
    llm.engine.cancel(requests[1])
    rows = {request.row for request, _ in llm.engine.step()}
    assert rows == {0, 2, 3, 4}
    assert requests[1].finish_reason == "cancelled"


def test_a_decoding_pass_has_the_running_rows_only(llm: Llama, passes: list[Batch]) -> None:
    lengths = [2, 5, 9]
    for row, n in enumerate(lengths):
        start(llm, LONG[: 3 + row], SamplingParams(max_gen_len=n, temperature=0), row)
    finish(llm)
    rows = [len(batch.positions) for batch in passes if isinstance(batch, Decode)]
    assert rows == [3, 2, 2, 2, 1, 1, 1, 1]
