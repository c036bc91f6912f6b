"""Llama.score: against Hugging Face's logits, with shared prefixes, at the limits."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEMO
from peers import huggingface_model
from torch import Tensor

from llama import Llama, Score
from llama.cache import Batch

Pair = tuple[list[int], list[int]]


def few_shot_pairs(n_words: int, n_shots: int = 4) -> list[Pair]:
    """20 questions of four answers, after shots from a pool of six."""
    rng = random.Random(0)

    def words(n: int) -> list[int]:
        return [rng.randrange(3, n_words) for _ in range(n)]

    shots = [words(20) for _ in range(6)]
    pairs = []
    for _ in range(20):
        question = [1, *(i for shot in rng.sample(shots, n_shots) for i in shot), *words(10)]
        pairs += [(question, words(1 + i)) for i in range(4)]
    rng.shuffle(pairs)
    return pairs


def expected(logits: Tensor, continuation: list[int]) -> list[float]:
    """Log-probabilities of the last tokens, of the logits [S, V] before them."""
    rows = logits[-len(continuation) :].double()
    own = rows.gather(1, torch.tensor(continuation)[:, None])
    return list((own - rows.logsumexp(-1, keepdim=True))[:, 0].tolist())


def check(score: Score, logits: Tensor, continuation: list[int]) -> None:
    logprobs = expected(logits, continuation)
    assert score.tokens == continuation
    assert score.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert score.total == pytest.approx(sum(logprobs), abs=1e-4 * len(logprobs))
    rows = logits[-len(continuation) :]
    own = rows.gather(1, torch.tensor(continuation)[:, None])
    for rank, least, most in zip(
        score.ranks,
        (rows > own + 1e-4).sum(-1).tolist(),  # nearly equal logits may be in either order
        (rows > own - 1e-4).sum(-1).tolist(),
        strict=True,
    ):
        assert least <= rank <= most
    assert score.is_greedy == (not any(score.ranks))


def test_equal_to_hugging_faces_logits(stories: Any) -> None:
    llm = Llama.build(str(stories / "native"), max_seq_len=128, dtype="float32", device="cpu")
    args = llm.model.params
    model = huggingface_model(vars(args), llm.model.state_dict())
    pairs = few_shot_pairs(args.vocab_size)
    scores = llm.score(pairs, top_logprobs=3)
    for (context, continuation), score in zip(pairs, scores, strict=True):
        tokens = torch.tensor([context + continuation[:-1]])
        logits = model(tokens).logits[0].detach()
        check(score, logits, continuation)
        values, ids = logits[-len(continuation) :].log_softmax(-1).topk(3)
        assert [*map(list, score.top)] == ids.tolist()
        assert [[*top.values()] for top in score.top] == [
            pytest.approx(row, abs=1e-4) for row in values.tolist()
        ]


def test_shared_prefixes_are_computed_once(demo: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = few_shot_pairs(500)
    n_fed: list[int] = []
    hidden = demo.model.hidden

    def counting(tokens: Tensor, batch: Batch) -> Tensor:
        n_fed.append(tokens.numel())
        return hidden(tokens, batch)

    # the prefix cache stays on, as this isn't a hook
    monkeypatch.setattr(demo.model, "hidden", counting)
    demo.score(pairs)
    n_tokens = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    assert n_tokens > 3 * sum(n_fed)


def test_any_order_and_number() -> None:
    llm = Llama.build(str(DEMO), max_seq_len=64, max_batch_size=2, dtype="float32", device="cpu")
    rng = random.Random(1)
    pairs: list[Pair] = [
        ([5] * n, [rng.randrange(512) for _ in range(k)])
        for n, k in ((1, 1), (1, 64), (63, 2), (64, 1), (30, 20), (30, 20), (9, 3))
    ]
    alone = [llm.score([pair])[0] for pair in pairs]
    for pair, score in zip(pairs, alone, strict=True):
        tokens = torch.tensor([pair[0] + pair[1][:-1]])
        check(score, llm.model(tokens, 0)[0], pair[1])
    for order in ([*range(7)], [6, 2, 0, 5, 3, 1, 4]):
        for i, score in zip(order, llm.score([pairs[i] for i in order]), strict=True):
            assert score.logprobs == pytest.approx(alone[i].logprobs, abs=1e-5)
    assert llm.score([]) == []


def test_ties_rank_the_lower_id_first() -> None:
    llm = Llama.build(str(DEMO), max_seq_len=64, dtype="float32", device="cpu")
    llm.model.output.weight.zero_()
    scores = llm.score([([3], [0]), ([3], [7]), ([3], [511]), ([3], [0, 1]), ([3], [0, 0])])
    assert [score.ranks for score in scores] == [[0], [7], [511], [0, 1], [0, 0]]
    assert [score.is_greedy for score in scores] == [True, False, False, False, True]


def test_logits_that_are_not_finite() -> None:
    """A token may be impossible; NaN is an error."""
    llm = Llama.build(str(DEMO), max_seq_len=64, dtype="float32", device="cpu")

    def forbid(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([7]), -math.inf)

    with llm.model.output.register_forward_hook(forbid):
        [score] = llm.score([([3], [7, 5])], top_logprobs=10**6)
    assert score.total == score.logprobs[0] == -math.inf
    assert score.ranks[0] == 1023
    assert [len(top) for top in score.top] == [1024, 1024]
    assert list(score.top[0])[-1] == 7
    llm.model.output.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the logits of prompt 1 aren't finite"):
        llm.score([([3, 4], [7]), ([3], [7])])


def test_texts(demo: Llama) -> None:
    encode = demo.tokenizer.encode
    ids = encode("What is 23 + 45? It is 68.", bos=True, eos=False)
    n = len(encode("What is 23 + 45? It is", bos=True, eos=False))
    wanted = demo.score([(ids[:n], ids[n:]), (ids[:1], ids[1:])])
    texts = [("What is 23 + 45? It is", " 68."), ("", "What is 23 + 45? It is 68.")]
    assert [s.tokens for s in demo.score(texts)] == [s.tokens for s in wanted]
    # a space at the end belongs to the next word
    assert demo.score([("What is 23 + 45? It is ", "68.")])[0].tokens == ids[n:]
    for got, score in zip(demo.score(texts), wanted, strict=True):
        assert got.logprobs == pytest.approx(score.logprobs, abs=1e-3)


def test_a_long_text_by_windows() -> None:
    llm = Llama.build(str(DEMO), max_seq_len=32, dtype="float32", device="cpu")
    rng = random.Random(2)
    for n in (1, 31, 32, 33, 64, 100):
        ids = [rng.randrange(512) for _ in range(n)]
        [score] = llm.score_rolling([ids])
        tokens = [llm.tokenizer.bos_id, *ids]
        wanted = []
        for i in range(1, n + 1):
            end = min(n, (i - 1) // 32 * 32 + 32)  # of the window that has token i
            context = tokens[max(0, end - 32) : i]
            wanted += expected(llm.model(torch.tensor([context]), 0)[0], [tokens[i]])
        assert score.tokens == ids
        assert score.logprobs == pytest.approx(wanted, abs=1e-4)
    text = "Once upon a time there was a dog. " * 10
    assert len(llm.score_rolling([text, ""])[0].tokens) > 32
    assert llm.score_rolling([""])[0] == Score([], [], [], [])


def test_what_cannot_be_scored(llm: Llama) -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (([], [1]), ValueError, "the context of pair 1 has no tokens"),
        (([1], []), ValueError, "the continuation of pair 1 has no tokens"),
        (("a", [1]), TypeError, "pair 1 has a text and ids, expected two texts or two lists"),
        (([1] * 60, [1] * 6), ValueError, "pair 1 has 66 tokens, but max_seq_len is 64"),
        (([1], [5000]), ValueError, "prompt 1 has the token id 5000"),
        (([5000], [1]), ValueError, "prompt 1 has the token id 5000"),
        (([1], ["a"]), TypeError, "prompt 1 is"),
        ((None, [1]), TypeError, "prompt 1 is None"),
        (([1],), TypeError, r"pair 1 is \(\[1\],\), expected \(context, continuation\)"),
        (([1], [2], [3]), TypeError, "pair 1 is"),
        ("ab", TypeError, "pair 1 is 'ab'"),
        (("Onc", "e"), ValueError, "no tokens, as the last token of 'Once' begins in the context"),
        (("Once", ""), ValueError, "no tokens, expected at least one"),
    ]
    for pair, error, message in cases:
        with pytest.raises(error, match=message):
            llm.score([([1], [2]), pair])
    with pytest.raises(ValueError, match="top_logprobs is -1"):
        llm.score([([1], [2])], top_logprobs=-1)
    with pytest.raises(TypeError, match="texts is a str"):
        llm.score_rolling("Once")
    with pytest.raises(ValueError, match="prompt 1 has the token id 5000"):
        llm.score_rolling([[1] * 200, [5000]])


def test_ids_of_any_kind(llm: Llama) -> None:
    kinds: tuple[Any, ...] = (tuple, np.array, torch.tensor, iter)
    wanted = llm.score([([1, 2, 3], [4, 5])])
    for kind in kinds:
        pairs = ((kind(ids), kind(more)) for ids, more in [([1, 2, 3], [4, 5])])
        [score] = llm.score(pairs)  # type: ignore[arg-type]
        assert score == wanted[0]
        assert {type(token) for token in score.tokens} == {int}


def test_hooks_take_effect(llm: Llama) -> None:
    pairs: list[Pair] = [([1, *range(20)], [5, 6]), ([1, *range(20)], [7, 8, 9])]
    plain = llm.score(pairs)
    with llm.model.layers[0].register_forward_hook(lambda _module, _inputs, y: 0.5 * y):
        hooked = llm.score(pairs)
        for (context, continuation), score in zip(pairs, hooked, strict=True):
            tokens = torch.tensor([context + continuation[:-1]])
            check(score, llm.model(tokens, 0)[0], continuation)
    assert hooked != plain
    assert llm.score(pairs)[0].logprobs == pytest.approx(plain[0].logprobs, abs=1e-5)
