"""Logits match the oracle, the published reference code and Hugging Face's Llama."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, PROCESSORS, new_model, random_weights
from peers import huggingface_model, published_model
from reference import logits, relative_error
from torch import Tensor

from llama import ModelArgs, Transformer, accel
from llama.accel import cpu

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": PARAMS,
    "one query head per key head": PARAMS | {"n_kv_heads": None},
    "one key head": PARAMS | {"n_kv_heads": 1},
    "ffn_dim_multiplier": PARAMS | {"ffn_dim_multiplier": 1.3, "multiple_of": 32},
    "Llama 2's theta": PARAMS | {"rope_theta": 10000.0},
    "scaled RoPE": PARAMS | {"use_scaled_rope": True, "dim": 512},
    "scaled RoPE of 3.2": PARAMS
    | {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "dim": 512},
}
TOKENS = torch.randint(0, 1024, (24,), generator=torch.Generator().manual_seed(5)).tolist()


def ours(params: dict[str, Any], weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Logits of a model as ``build`` prepares it, with this machine's fast paths."""
    model = new_model(params, weights, max_batch_size=1, max_seq_len=len(tokens))
    accel.accelerate(model)
    return model.forward(torch.tensor([tokens]), 0)[0]


@pytest.mark.parametrize("name", SHAPES)
def test_float32_logits_match_the_float64_oracle(name: str) -> None:
    params = SHAPES[name]
    weights = random_weights(params, seed=1)
    expected = logits(weights, params, TOKENS)
    got = ours(params, weights, TOKENS)
    assert relative_error(got, expected) < 1e-5
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_the_oracle_comparison_is_sensitive() -> None:
    """A slightly wrong rope_theta, norm_eps or one swapped pair must not pass."""
    weights = random_weights(PARAMS, seed=1)
    expected = logits(weights, PARAMS, TOKENS)
    for change in ({"rope_theta": 500100.0}, {"norm_eps": 2e-5}):
        assert relative_error(ours(PARAMS | change, weights, TOKENS), expected) > 1e-5
    swapped = dict(weights)
    swapped["layers.0.attention.wq.weight"] = weights["layers.0.attention.wq.weight"].flip(0)
    assert relative_error(ours(PARAMS, swapped, TOKENS), expected) > 1e-2


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "scaled RoPE of 3.2"])
@pytest.mark.usefixtures("one_process_group")
def test_float32_logits_match_the_published_transformer(name: str) -> None:
    params = SHAPES[name]
    weights = random_weights(params, seed=2)
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    published = published_model(params, weights)
    model = new_model(params, weights, max_batch_size=2, max_seq_len=64)
    assert relative_error(model(tokens[:, :20], 0), published(tokens[:, :20], 0)) < 1e-5
    for position in range(20, 24):  # decoding steps
        step = tokens[:, position : position + 1]
        assert relative_error(model(step, position), published(step, position)) < 1e-5


def bfloat16_errors(seed: int) -> tuple[float, float]:
    """Root mean square error of bfloat16 logits against float64: ours, the published code's."""
    weights = {k: w.bfloat16() for k, w in random_weights(PARAMS, seed=seed).items()}
    expected = logits(weights, PARAMS, TOKENS)
    published = published_model(PARAMS, weights)(torch.tensor([TOKENS]), 0)[0]

    def rms(x: Tensor) -> float:
        return float(
            (x.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        )

    return rms(ours(PARAMS, weights, TOKENS)), rms(published)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_bfloat16_error_is_no_larger_than_the_published_one(
    processor: str, monkeypatch: pytest.MonkeyPatch, use_processor: Callable[[str], None]
) -> None:
    """With the linear layers chosen for each kind of CPU (see test_fast.py)."""
    use_processor(processor)
    monkeypatch.setattr(cpu, "_MIN_WEIGHT_BYTES", 0)
    errors = [bfloat16_errors(seed) for seed in range(8)]
    mean_ours, mean_published = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    assert 0 < mean_ours <= mean_published
    assert mean_ours < 0.03


@pytest.mark.parametrize(
    "name", ["grouped", "Llama 2's theta", "scaled RoPE", "scaled RoPE of 3.2"]
)
def test_float32_logits_match_hugging_face(name: str) -> None:
    params = SHAPES[name]
    weights = random_weights(params, seed=3)
    with torch.inference_mode():
        expected = huggingface_model(params, weights)(torch.tensor([TOKENS])).logits[0]
    assert relative_error(ours(params, weights, TOKENS), expected) < 1e-5


def test_the_last_positions_of_the_context_match_the_oracle(weights: dict[str, Tensor]) -> None:
    start = 8192 - len(TOKENS)
    model = new_model(PARAMS, weights, max_batch_size=1, max_seq_len=8192)
    expected = logits(weights, PARAMS, TOKENS, start=start)
    model.freqs_cis = model.freqs_cis[start:]  # position 0 gets the angles of ``start``
    assert relative_error(model(torch.tensor([TOKENS]), 0)[0], expected) < 1e-5
    rounded = torch.view_as_real(model.freqs_cis).bfloat16().float()
    model.freqs_cis = torch.view_as_complex(rounded)
    assert relative_error(model(torch.tensor([TOKENS]), 0)[0], expected) > 1e-5


def test_stories260k_generates_its_known_text(stories: Path) -> None:
    """stories260K, a third-party model, greedily from BOS in float32."""
    import sentencepiece

    params = json.loads((stories / "native" / "params.json").read_text())
    params |= {"vocab_size": 512, "rope_theta": 10000.0}
    path = stories / "native" / "consolidated.00.pth"
    weights = torch.load(path, mmap=True, weights_only=True)
    weights = {key: weight for key, weight in weights.items() if key != "rope.freqs"}
    model = new_model(params, weights, max_batch_size=1, max_seq_len=128)
    vocabulary = sentencepiece.SentencePieceProcessor(
        model_file=str(stories / "native" / "tokenizer.model")
    )
    ids = [1]
    scores = model.forward(torch.tensor([ids]), 0)
    for position in range(1, 60):
        ids.append(int(scores[0, -1].argmax()))
        scores = model.forward(torch.tensor([ids[-1:]]), position)
    assert vocabulary.decode(ids).startswith(
        "Once upon a time, there was a little girl named Lily. "
        "She loved to play outside in the park."
    )
    expected = logits(weights, params, ids[:40])
    assert relative_error(ours(params, weights, ids[:40]), expected) < 1e-5


def test_a_transformer_can_be_built_without_a_checkpoint() -> None:
    """Neither torchrun nor a process group is needed."""
    model = Transformer(ModelArgs(**PARAMS, max_batch_size=1, max_seq_len=8))
    model.load_state_dict(random_weights(PARAMS))
    assert model(torch.tensor([[1, 2, 3]]), 0).shape == (1, 3, 1024)
