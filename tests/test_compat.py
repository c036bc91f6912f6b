"""Code written for the published blocks: their calls, attributes and helpers."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import llama_models.llama3.model as published
import pytest
import torch
from conftest import DEMO, PARAMS, PROGRAMS, new_model, random_weights, torchrun, write_checkpoint
from peers import published_model
from reference import relative_error
from torch import Tensor, nn

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.generation import B_INST, B_SYS, E_INST, E_SYS, Role
from llama.model import (
    Attention,
    FeedForward,
    TransformerBlock,
    repeat_kv,
    reshape_for_broadcast,
)
from llama.sampling import SamplingParams

TOKENS = torch.randint(0, 1024, (2, 24), generator=torch.Generator().manual_seed(7))
GROUPED = PARAMS | {"n_layers": 3}
pytestmark = pytest.mark.usefixtures("one_process_group")  # for the published code


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return random_weights(GROUPED, seed=4)


@pytest.fixture
def theirs(weights: dict[str, Tensor]) -> nn.Module:
    return published_model(GROUPED, weights)


@pytest.fixture
def model(weights: dict[str, Tensor]) -> Transformer:
    return new_model(GROUPED, weights, max_batch_size=2, max_seq_len=64)


@pytest.fixture
def llm(weights: dict[str, Tensor]) -> Llama:
    model = new_model(GROUPED, weights, max_batch_size=4, max_seq_len=64)
    llm = Llama(model, Tokenizer(str(DEMO / "tokenizer.model")))
    llm.tokenizer.stop_tokens = set()
    return llm


def causal_mask(n_tokens: int, start_pos: int) -> Tensor | None:
    if n_tokens == 1:
        return None
    mask = torch.full((n_tokens, n_tokens), float("-inf")).triu(1)
    return torch.hstack([torch.zeros(n_tokens, start_pos), mask])


@torch.inference_mode()
def forward(model: Any, tokens: Tensor, start_pos: int, mask: Any = "causal") -> Tensor:
    """As a user writes it for the published blocks."""
    n_tokens = tokens.shape[1]
    h = model.tok_embeddings(tokens)
    freqs_cis = model.freqs_cis[start_pos : start_pos + n_tokens]
    mask = causal_mask(n_tokens, start_pos) if isinstance(mask, str) else mask
    for layer in model.layers:
        h = layer(h, start_pos, freqs_cis, mask)
    h = model.norm(h)
    logits: Tensor = model.output(h).float()
    return logits


def by_model(model: Transformer, prompt: list[int], n: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]), 0)[0, -1].argmax()))
    return tokens[len(prompt) :]


# --- A forward of the user's ------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[24], [20, 1, 1, 1, 1], [5, 1, 9, 9], [1] * 24])
def test_a_forward_over_the_blocks_gives_the_published_logits(
    model: Transformer, theirs: nn.Module, cuts: list[int]
) -> None:
    whole, start = theirs(TOKENS, 0), 0
    for n in cuts:
        got = forward(model, TOKENS[:, start : start + n], start)
        assert relative_error(got, whole[:, start : start + n]) < 1e-5
        start += n


def test_calls_of_the_model_and_of_the_blocks_share_the_cache(model: Transformer) -> None:
    whole = model(TOKENS, 0)
    model.to(torch.float32)  # frees the cache
    for i, (start, end) in enumerate(((0, 9), (9, 10), (10, 15), (15, 24))):
        tokens = TOKENS[:, start:end]
        got = model(tokens, start) if i % 2 else forward(model, tokens, start)
        assert relative_error(got, whole[:, start:end]) < 1e-5


def test_the_blocks_of_a_built_model(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """With this machine's fast paths, and in bfloat16."""
    folder = write_checkpoint(tmp_path, GROUPED, weights)
    for dtype, limit in (("float32", 1e-5), ("bfloat16", 0.05)):
        llm = Llama.build(str(folder), max_seq_len=64, dtype=dtype, device="cpu")
        assert relative_error(forward(llm.model, TOKENS, 0), llm.model(TOKENS, 0)) < limit


@pytest.mark.slow
def test_the_blocks_of_two_ranks(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path, GROUPED, weights, n_shards=2)
    result = torchrun(2, PROGRAMS / "blocks.py", folder)
    assert result.returncode == 0, result.stderr
    assert "True True" in result.stdout


# --- Masks ------------------------------------------------------------------------------------


def window(n_tokens: int, start_pos: int) -> Tensor:
    """Each token attends to the last 3."""
    mask = causal_mask(n_tokens, start_pos)
    assert mask is not None
    return mask + torch.full_like(mask, float("-inf")).tril(start_pos - 3)


BIAS = torch.randn(2, 16, 6, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("start", "end", "mask"),
    [
        (0, 10, None),  # no mask: every token sees all ten
        (10, 16, None),
        (10, 16, window(6, 10)),
        (10, 16, window(6, 10)[None, None]),
        (10, 16, window(6, 10).clamp(min=torch.finfo(torch.float32).min)),
        (10, 16, window(6, 10).clamp(min=-2.0)),
        (10, 16, BIAS),
        (10, 11, BIAS[:, :1, :1, :11]),
    ],
)
def test_any_mask_does_what_it_does_in_the_published_code(
    model: Transformer, theirs: nn.Module, start: int, end: int, mask: Tensor | None
) -> None:
    for m in (model, theirs):
        forward(m, TOKENS[:, :start], 0) if start else None
    expected = forward(theirs, TOKENS[:, start:end], start, mask)
    assert relative_error(forward(model, TOKENS[:, start:end], start, mask), expected) < 1e-5
    assert relative_error(forward(model, TOKENS[:, start:end], start), expected) > 1e-2


@pytest.mark.parametrize("shape", [(6, 16), (1, 1, 6, 16), (2, 1, 6, 16)])
def test_a_causal_mask_takes_the_models_own_attention(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    mask = causal_mask(6, 10)
    assert mask is not None
    whole = forward(model, TOKENS, 0)
    monkeypatch.setattr("llama.compat.masked_attention", None)
    got = forward(model, TOKENS[:, 10:16], 10, mask.expand(shape).half())
    assert relative_error(got, whole[:, 10:16]) < 1e-5


@pytest.mark.parametrize(
    ("tokens", "start", "mask", "message"),
    [
        (slice(10, 16), 10, torch.ones(6, 16, dtype=torch.bool), "torch.bool, expected floats"),
        (slice(10, 16), 10, causal_mask(6, 0), r"\(6, 6\), which doesn't broadcast to \(2, 16, 6"),
        (slice(10, 16), 60, None, "max_seq_len 64"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Transformer, tokens: slice, start: int, mask: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        forward(model, TOKENS[:, tokens], start, mask)


def test_other_rotations_and_masks_inside_the_model_are_refused(model: Transformer) -> None:
    block, h = model.layers[0], torch.randn(2, 5, 128)
    with pytest.raises(ValueError, match=r"\(64, 4\), expected \(5, 4\): model.freqs_cis\[start"):
        block(h, 0, model.freqs_cis, None)
    with pytest.raises(ValueError, match=r"\(10, 128\), expected \[B, S, dim\]"):
        block(h.flatten(0, 1), 0, model.freqs_cis[:10], None)

    class Masking(nn.Module):
        def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Any) -> Any:
            return block(x, start_pos, freqs_cis, torch.zeros(5, 5))

    model.layers[0] = Masking()
    with pytest.raises(ValueError, match=r"a mask came with a Prefill.*call the blocks"):
        model(TOKENS[:, :5], 0)


# --- Modules on their own ---------------------------------------------------------------------


def test_a_block_of_its_own_equals_the_published_one(
    weights: dict[str, Tensor], theirs: nn.Module
) -> None:
    block = TransformerBlock(1, ModelArgs(**GROUPED, max_batch_size=2, max_seq_len=64))
    own = {k[len("layers.1.") :]: w for k, w in weights.items() if k.startswith("layers.1.")}
    block.load_state_dict(own)
    reference: Any = theirs.layers[1]  # type: ignore[index]
    assert block.layer_id == reference.layer_id == 1
    x, freqs_cis = torch.randn(2, 9, 128), theirs.freqs_cis
    for start, end in ((0, 5), (5, 8), (8, 9)):
        args = start, freqs_cis[start:end], causal_mask(end - start, start)  # type: ignore[index]
        for ours, other in ((block, reference), (block.attention, reference.attention)):
            with torch.no_grad():
                expected = other(x[:, start:end], *args)
            assert relative_error(ours(x[:, start:end], *args), expected) < 1e-5
    half = block.to(torch.bfloat16)(x.bfloat16(), 0, freqs_cis[:9], causal_mask(9, 0))  # type: ignore[index]
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_a_feed_forward_of_its_own_equals_the_published_one() -> None:
    sizes: dict[str, Any] = {"dim": 96, "hidden_dim": 384, "multiple_of": 32}
    for multiplier in (None, 1.3):
        ours = FeedForward(**sizes, ffn_dim_multiplier=multiplier)
        other = published.FeedForward(**sizes, ffn_dim_multiplier=multiplier)
        other.load_state_dict({k: torch.randn(w.shape) for k, w in ours.state_dict().items()})
        ours.load_state_dict(other.state_dict())
        x = torch.randn(2, 3, 96)
        assert relative_error(ours(x), other(x).detach()) < 1e-5


def test_attributes_are_the_published_ones(model: Transformer, theirs: Any) -> None:
    assert (model.vocab_size, model.n_layers) == (theirs.vocab_size, theirs.n_layers) == (1024, 3)
    model(TOKENS, 0)
    theirs(TOKENS, 0)
    for layer, reference in zip(model.layers, theirs.layers, strict=True):
        ours: Any = layer.attention
        for name in ("n_local_heads", "n_local_kv_heads", "n_rep", "head_dim"):
            assert getattr(ours, name) == getattr(reference.attention, name)
        for name in ("cache_k", "cache_v"):
            cached, expected = getattr(ours, name), getattr(reference.attention, name)
            assert cached.shape == (2, 64, 8, 8)
            assert relative_error(cached, expected) < 1e-5


def test_the_cache_can_be_written_as_in_the_published_code(model: Transformer) -> None:
    attention: Any = model.layers[0].attention
    assert attention.cache_k.shape == (2, 64, 8, 8)  # before the first pass
    whole = model(TOKENS, 0)
    saved = [(a.cache_k.clone(), a.cache_v.clone()) for a in attentions(model)]
    model(TOKENS.flip(1), 0)
    for a, (k, v) in zip(attentions(model), saved, strict=True):
        a.cache_k, a.cache_v = k, v
        a.cache_k = a.cache_k.to(k)
    assert relative_error(model(TOKENS[:, 20:], 20), whole[:, 20:]) < 1e-5
    with pytest.raises(ValueError, match=r"cache_v is set to the shape \(2, 32, 8, 8\), expected"):
        attention.cache_v = torch.zeros(2, 32, 8, 8)


def test_a_published_attention_forward_runs_on_our_attention(
    model: Transformer, theirs: nn.Module
) -> None:
    """As in notebooks that patch it to look at the scores."""
    for attention in attentions(model):
        attention.forward = MethodType(published.Attention.forward, attention)
    whole = theirs(TOKENS, 0)
    for start, end in ((0, 20), (20, 24)):
        got = forward(model, TOKENS[:, start:end], start)
        assert relative_error(got, whole[:, start:end]) < 1e-5


def attentions(model: Transformer) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Attention)]


def test_helpers_equal_the_published_ones() -> None:
    x = torch.randn(2, 5, 4, 6)
    for n_rep in (1, 3):
        assert torch.equal(repeat_kv(x, n_rep), published.repeat_kv(x, n_rep))
    freqs_cis = torch.randn(5, 6)
    expected = published.reshape_for_broadcast(freqs_cis, x)
    assert torch.equal(reshape_for_broadcast(freqs_cis, x), expected)
    assert reshape_for_broadcast(freqs_cis, x).shape == (1, 5, 1, 6)
    with pytest.raises(ValueError, match=r"\(4, 6\) and x \(2, 5, 4, 6\)"):
        reshape_for_broadcast(freqs_cis[:4], x)


# --- Generation afterwards --------------------------------------------------------------------

PROMPT = list(range(20, 50))


def call_blocks(llm: Llama) -> None:
    forward(llm.model, torch.tensor([PROMPT[::-1]] * 4), 0)


def call_one_block(llm: Llama) -> None:
    llm.model.layers[1](torch.randn(4, 30, 128), 0, llm.model.freqs_cis[:30], None)


def clear_cache(llm: Llama) -> None:
    for attention in attentions(llm.model):
        attention.cache_k.zero_()


def set_values(llm: Llama) -> None:
    attentions(llm.model)[2].cache_v = torch.ones(4, 64, 8, 8)


WRITES = [call_blocks, call_one_block, clear_cache, set_values]


@pytest.mark.parametrize("write", WRITES)
def test_a_prefix_is_not_reused_after_a_direct_write(llm: Llama, write: Any) -> None:
    expected = llm.generate([PROMPT], 12, temperature=0)[0]
    write(llm)
    assert llm.generate([PROMPT], 12, temperature=0)[0] == expected
    assert expected == [by_model(llm.model, PROMPT, 12)]


@pytest.mark.parametrize("write", WRITES)
def test_a_stream_ends_after_a_direct_write(llm: Llama, write: Any) -> None:
    stream: Iterator[Any] = llm.stream([PROMPT], 12, 0)
    next(stream)
    write(llm)
    with pytest.raises(RuntimeError, match="used this model since"):
        next(stream)


def test_reading_the_cache_keeps_prefixes(llm: Llama) -> None:
    reused = []
    for _ in range(2):
        request = llm.engine.request(PROMPT, SamplingParams(max_gen_len=4, temperature=0))
        llm.engine.add([request])
        for _ in llm.engine.run([request]):
            assert all(attention.cache_k.any() for attention in attentions(llm.model))
        reused.append(request.n_reused)
    assert reused == [0, 29]


# --- Changed models ---------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Steering, with the published arguments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Tensor:
        h: Tensor = self.block(x, start_pos, freqs_cis, mask)
        return h + 0.1 * x


def wrap(model: Transformer) -> None:
    model.layers[1] = Wrapped(model.layers[1])
    model.layers[2] = Wrapped(model.layers[2])


def remove(model: Transformer) -> None:
    del model.layers[1]


def repeat(model: Transformer) -> None:
    model.layers.append(copy.deepcopy(model.layers[1]))


def replace(model: Transformer) -> None:
    block = TransformerBlock(1, model.params)
    block.load_state_dict(model.layers[2].state_dict())
    model.layers[1] = block


@pytest.mark.parametrize("change", [wrap, remove, repeat, replace])
def test_layers_may_be_wrapped_removed_repeated_and_replaced(llm: Llama, change: Any) -> None:
    """Before and after the first generation."""
    prompts = [PROMPT, PROMPT[:5], [*PROMPT[:20], 3]]
    plain = llm.generate(prompts, 8, temperature=0)[0]
    for _ in range(2):
        change(llm.model)
        tokens = llm.generate(prompts, 8, temperature=0)[0]
        assert tokens != plain
        assert tokens == [by_model(llm.model, prompt, 8) for prompt in prompts]
        tokens_by_blocks = forward(llm.model, torch.tensor([PROMPT]), 0)[:, -1].argmax()
        assert tokens_by_blocks == tokens[0][0]
        if change is remove:
            break


def test_one_block_in_two_layers_is_refused(llm: Llama) -> None:
    llm.model.layers[2] = llm.model.layers[1]
    with pytest.raises(ValueError, match=r"two layers of the model.*deepcopy"):
        llm.model(TOKENS, 0)
    with pytest.raises(ValueError, match=r"two layers of the model.*deepcopy"):
        llm.generate([PROMPT], 4)


# --- Llama 2's tags ---------------------------------------------------------------------------


def test_the_tags_and_roles_of_llama_2s_generation_module() -> None:
    assert (B_INST, E_INST) == ("[INST]", "[/INST]")
    assert (B_SYS, E_SYS) == ("<<SYS>>\n", "\n<</SYS>>\n\n")
    assert "assistant" in Role.__args__  # type: ignore[attr-defined]
