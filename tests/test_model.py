"""ModelArgs, the layers, and the KV cache."""

import dataclasses
import math
import sys
from typing import Any

import fairscale.nn.model_parallel.layers as fairscale_layers
import pytest
import torch
import torch.nn.functional as F
from conftest import PARAMS, PROGRAMS, new_model, run
from reference import relative_error
from torch import Tensor

from llama import ModelArgs, Transformer
from llama.cache import Decode, Prefill
from llama.config import RopeScaling
from llama.model import RMSNorm, apply_rotary_emb, precompute_freqs_cis

TOKENS = torch.randint(0, 1024, (2, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(weights: dict[str, Tensor]) -> Transformer:
    return new_model(PARAMS, weights, max_batch_size=2, max_seq_len=16)


# --- ModelArgs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("dim", 4096.0),
        ("dim", 100),
        ("dim", 10**30),
        ("n_layers", -1),
        ("n_layers", 5000),
        ("n_layers", None),
        ("n_heads", True),
        ("n_kv_heads", 5),
        ("n_kv_heads", 64),
        ("vocab_size", 0),
        ("vocab_size", -2),
        ("vocab_size", "128256"),
        ("multiple_of", 0),
        ("multiple_of", 10**400),
        ("ffn_dim_multiplier", 0.0),
        ("ffn_dim_multiplier", 1e8),
        ("norm_eps", 0.0),
        ("norm_eps", float("nan")),
        ("rope_theta", float("inf")),
        ("rope_theta", "500000"),
        ("rope_theta", 10**400),
        ("max_batch_size", 0),
        ("max_seq_len", 1.5),
        ("use_scaled_rope", 1),
        ("rope_scaling_factor", -8.0),
        ("attention_head_dim", 0),
        ("attention_head_dim", 33),
        ("rope_high_freq_factor", 1.0),
        ("rope_original_context", 8192.0),
    ],
)
def test_impossible_values_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field.removeprefix("attention_")):
        ModelArgs(**{field: value})


def test_unknown_fields_are_an_error_that_names_them() -> None:
    with pytest.raises(TypeError, match="n_experts"):
        ModelArgs(n_experts=8)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11008),  # Llama 2 7B
        (8192, 4096, 1.3, 28672),  # 70B of either generation
        (4096, 1024, 1.3, 14336),  # Llama 3 8B
        (2048, 256, 1.5, 8192),  # 3.2 1B
        (16384, 4096, 1.2, 53248),  # 3.1 405B
    ],
)
def test_feed_forward_widths_of_the_published_models(
    dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    args = ModelArgs(dim=dim, n_heads=32, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)
    assert args.ffn_hidden_dim == width


# --- Layers -----------------------------------------------------------------------------------


def test_rms_norm_computes_in_float32() -> None:
    norm = RMSNorm(4096, eps=1e-5).bfloat16()
    x = torch.full((1, 4096), 300.0).bfloat16()  # squares overflow float16; bf16 can't sum them
    assert torch.equal(norm(x), torch.ones(1, 4096, dtype=torch.bfloat16))
    assert torch.equal(norm(torch.zeros_like(x)), torch.zeros_like(x))


def test_rope_rotates_interleaved_pairs() -> None:
    freqs_cis = precompute_freqs_cis(4, 3)
    assert freqs_cis.shape == (3, 2)
    assert freqs_cis.dtype == torch.complex64
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(1, 3, 1, 4)
    turned, _ = apply_rotary_emb(x, x, freqs_cis)
    for position in range(3):
        fast, slow = torch.tensor(position * 1.0), torch.tensor(position * 0.01)
        expected = torch.stack([fast.cos(), fast.sin(), slow.cos(), slow.sin()])
        torch.testing.assert_close(turned[0, position, 0], expected)


def test_use_scaled_is_a_bool_as_published() -> None:
    """precompute_freqs_cis(dim, end, theta, use_scaled)."""
    plain = precompute_freqs_cis(16, 200, 500000.0)
    assert torch.equal(precompute_freqs_cis(16, 200, 500000.0, False), plain)
    for scaling, factor in ((True, 8.0), (RopeScaling(32.0), 32.0)):
        scaled = precompute_freqs_cis(16, 200, 500000.0, scaling)
        # theta^(-14/16) turns once in 600,000 tokens, theta^0 once in 6
        torch.testing.assert_close(scaled[:, -1].angle(), plain[:, -1].angle() / factor)
        assert torch.equal(scaled[:, 0], plain[:, 0])
    with pytest.raises(ValueError, match=r"use_scaled 8\.0, expected bool"):
        precompute_freqs_cis(16, 200, 500000.0, 8.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="theta is -1, expected > 0"):  # not resolved yet
        precompute_freqs_cis(16, 200, ModelArgs().rope_theta)


def test_published_params_need_no_completion() -> None:
    """ModelArgs(**params), with vocab_size assigned later, gets the values that build takes."""
    llama2: dict[str, Any] = {
        "dim": 64,
        "n_layers": 1,
        "n_heads": 4,
        "multiple_of": 32,
        "vocab_size": -1,
    }
    for n_tokens, theta in ((32000, 10000.0), (128256, 500000.0)):
        args = ModelArgs(**llama2, max_seq_len=16, max_batch_size=1)
        args.vocab_size = n_tokens
        with torch.device("meta"):
            model = Transformer(args)
        assert model.params is args
        assert args.rope_theta == theta
        assert torch.equal(model.freqs_cis, precompute_freqs_cis(16, 16, theta))
    llama32: dict[str, Any] = {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
    }
    assert ModelArgs(**llama32, use_scaled_rope=True).rope_scaling_factor == 32
    assert ModelArgs(**llama32 | {"n_layers": 32}, use_scaled_rope=True).rope_scaling_factor == 8


def test_fields_can_be_changed_before_the_model_is_made() -> None:
    args = ModelArgs()
    args.dim, args.n_layers, args.n_heads, args.vocab_size = 64, 1, 8, 32000
    with torch.device("meta"):
        state = Transformer(args).state_dict()
    assert (args.head_dim, args.rope_theta) == (8, 10000.0)
    assert state["layers.0.attention.wq.weight"].shape == (64, 64)
    assert dataclasses.replace(args, n_heads=4).head_dim == 16
    args = ModelArgs(vocab_size=128256)
    args.dim, args.n_layers, args.use_scaled_rope = 2048, 16, True
    args.resolve()
    assert args.rope_scaling_factor == 32


def test_rope_is_relative_and_keeps_the_dtype() -> None:
    freqs_cis = precompute_freqs_cis(16, 200, theta=500000.0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(m: int, n: int) -> Tensor:
        turned_q, _ = apply_rotary_emb(q, q, freqs_cis[m : m + 1])
        turned_k, _ = apply_rotary_emb(k, k, freqs_cis[n : n + 1])
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-4, atol=1e-4)
    half, _ = apply_rotary_emb(q.bfloat16(), k.bfloat16(), freqs_cis[:1])
    assert half.dtype == torch.bfloat16


def test_layers_are_fairscale_classes_built_on_the_default_device() -> None:
    with torch.device("meta"):
        model = Transformer(ModelArgs(**PARAMS))
    attention: Any = model.layers[0].attention
    assert isinstance(attention.wq, fairscale_layers.ColumnParallelLinear)
    assert isinstance(attention.wo, fairscale_layers.RowParallelLinear)
    assert isinstance(model.tok_embeddings, fairscale_layers.VocabParallelEmbedding)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.freqs_cis.device.type == "cpu"


def test_vocab_size_is_required() -> None:
    with pytest.raises(ValueError, match="vocab_size is -1"):
        Transformer(ModelArgs())


# --- KV cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[16], [15, 1], [1] * 16, [5, 1, 1, 9], [8, 8]])
def test_any_split_into_chunks_gives_the_same_logits(model: Transformer, cuts: list[int]) -> None:
    whole = model.forward(TOKENS, 0)
    parts, start = [], 0
    for length in cuts:
        parts.append(model.forward(TOKENS[:, start : start + length], start))
        start += length
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5


def test_stale_cache_entries_are_ignored(model: Transformer) -> None:
    first = model.forward(TOKENS[:, :5], 0)
    model.forward(TOKENS.flip(1), 0)
    assert torch.equal(model.forward(TOKENS[:, :5], 0), first)


def test_logits_are_float32_and_the_cache_isnt_in_the_state_dict(
    weights: dict[str, Tensor],
) -> None:
    halves = {key: weight.bfloat16() for key, weight in weights.items()}
    model = new_model(PARAMS, halves, max_batch_size=2, max_seq_len=16)
    assert model(TOKENS, 0).dtype == torch.float32
    assert model.cache[0].k.dtype == torch.bfloat16
    assert model.state_dict().keys() == weights.keys()


def test_the_cache_isnt_reallocated(model: Transformer) -> None:
    model(TOKENS, 0)
    before = [cache.k.data_ptr() for cache in model.cache]
    model(TOKENS[:1, :3], 2)
    assert [cache.k.data_ptr() for cache in model.cache] == before


def test_changing_the_dtype_keeps_freqs_cis_complex64(model: Transformer) -> None:
    model(TOKENS, 0)
    model.to(torch.bfloat16)
    assert model.freqs_cis.dtype == torch.complex64
    assert model(TOKENS, 0).isfinite().all()


def test_rows_at_their_own_positions(model: Transformer) -> None:
    """Packed prefill and a decoding step of rows with 3 and 10 tokens match each row alone."""
    lengths = [3, 10]
    with torch.inference_mode():
        packed = torch.cat([TOKENS[0, :3], TOKENS[1, :10]])
        prompts = [0, 1], [0, 0], lengths, packed.device
        prefill = model(packed, Prefill(*prompts))
        model.to(torch.float32)  # frees the cache
        ends = model(packed, Prefill(*prompts, logits_for=[0, 1]))
        step = model(torch.tensor([7, 8]), Decode(torch.tensor(lengths), 11, ragged=True))
    assert relative_error(ends, prefill[[2, 12]]) < 1e-5
    for row, (token, rows) in enumerate(zip((7, 8), (slice(0, 3), slice(3, 13)), strict=True)):
        n = lengths[row]
        alone = model.forward(TOKENS[row : row + 1, :n], 0)[0]
        assert relative_error(prefill[rows], alone) < 1e-5
        alone = model.forward(torch.tensor([[token]]), n)[0]
        assert relative_error(step[row : row + 1], alone) < 1e-5


def test_the_attention_kernel_may_return_any_memory_layout(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's memory-efficient kernel returns its result transposed."""
    expected = [model.forward(TOKENS[:, :9], 0), model.forward(TOKENS[:, 9:10], 9)]
    kernel = F.scaled_dot_product_attention

    def transposed(*args: Any, **kwargs: Any) -> Tensor:
        return kernel(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert torch.equal(model.forward(TOKENS[:, :9], 0), expected[0])
    assert torch.equal(model.forward(TOKENS[:, 9:10], 9), expected[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_untouched_cache_takes_no_memory_and_a_fork_has_its_own() -> None:
    result = run(sys.executable, PROGRAMS / "untouched_cache.py")
    assert result.returncode == 0, result.stderr
    (ratio, size), (same,) = (line.split() for line in result.stdout.splitlines())
    assert int(size) == 2**29
    assert float(ratio) < 0.1
    assert same == "True"


def test_prefill_and_decode_batches() -> None:
    prompts = Prefill([5, 2], [0, 3], [2, 1], torch.device("cpu"), logits_for=[1])
    assert (prompts.slots.tolist(), prompts.positions.tolist()) == ([5, 5, 2], [0, 1, 3])
    assert (prompts.max_seqlen_q, prompts.max_seqlen_k) == (2, 4)
    assert prompts.seqlens_k.tolist() == [2, 4]
    starts, key_starts = prompts.cu_seqlens(max_seq_len=16)
    assert (starts.tolist(), key_starts.tolist()[:2]) == ([0, 2, 3], [5 * 16, 2 * 16])
    assert prompts.select(torch.arange(sum(prompts.seqlens))).tolist() == [2]
    last = prompts.of_last_tokens()
    assert (last.slots.tolist(), last.positions.tolist()) == ([2], [3])
    step = Decode(torch.tensor([1, 2]), 3, ragged=True)
    mask = step.mask(torch.float32)
    assert mask is not None
    assert mask.tolist() == [[[[0, 0, -math.inf]]], [[[0, 0, 0]]]]
    assert step.mask(torch.float32) is mask  # computed once
    assert (step.slots.tolist(), step.seqlens_k.tolist()) == ([0, 1], [2, 3])
    starts, key_starts = step.cu_seqlens(max_seq_len=16)
    assert (starts.tolist(), key_starts.tolist()) == ([0, 1, 2], [0, 16, 32])
    assert step.cu_seqlens(max_seq_len=16)[1] is key_starts
    assert Decode(torch.tensor([4, 4]), 5, ragged=False).mask(torch.float32) is None


@pytest.mark.parametrize(
    ("shape", "start", "message"),
    [
        ((3, 1), 0, "max_batch_size"),
        ((0, 1), 0, "rows"),
        ((1, 0), 0, "at least one token"),
        ((1, 17), 0, "max_seq_len 16"),
        ((1, 1), 16, "positions 0 to 15"),
        ((1, 1), -1, "start_pos -1"),
    ],
)
def test_tokens_that_dont_fit_are_refused(
    model: Transformer, shape: tuple[int, int], start: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.forward(torch.zeros(shape, dtype=torch.int64), start)


def test_the_global_random_state_is_not_touched(weights: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    new_model(PARAMS, weights, max_batch_size=2, max_seq_len=16).forward(TOKENS, 0)
    assert torch.equal(torch.get_rng_state(), before)
