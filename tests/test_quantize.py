"""Weights in 8 and 4 bits, from ``Llama.build(quantize=)`` to tokens. The kernels themselves are
tested in test_kernels.py, folders in test_quantized_folders.py."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, PROCESSORS, PROGRAMS, new_model, torchrun, write_checkpoint
from reference import relative_error
from torch import Tensor, nn

from llama import Llama, accel, memory
from llama.accel import is_quantized, kernels
from llama.quantize import QuantizedLinear, quantize

PROMPTS = [[1, 2, 3, 4, 5], [9], [7, 20, 300, 11], list(range(30, 55))]
KEYS = (
    *("attention.wq", "attention.wk", "attention.wv", "attention.wo"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)


def build(folder: Path, **options: Any) -> Llama:
    sizes: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 4, "device": "cpu"}
    return Llama.build(str(folder), **(sizes | {"dtype": "float32"} | options))


def dequantized(weights: dict[str, Tensor], bits: Any) -> dict[str, Tensor]:
    """The weights that a quantized model computes with; its output layer has 8 bits."""
    result = dict(weights)
    for key in weights:
        name = key.removesuffix(".weight")
        if name == "output" or name.endswith(KEYS):
            result[key] = quantize(weights[key], 8 if name == "output" else bits).dequantize()
    return result


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_logits_are_those_of_the_rounded_weights(
    folder: Path,
    weights: dict[str, Tensor],
    bits: int,
    processor: str,
    use_processor: Callable[[str], None],
) -> None:
    """Without kernels exactly; these round activations to 8 bits too."""
    use_processor(processor)
    llm = build(folder, quantize=f"int{bits}")
    plain = new_model(PARAMS, dequantized(weights, bits), max_batch_size=4, max_seq_len=64)
    limit = 0.08 if processor in kernels.INSTRUCTION_SETS else 1e-5
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        assert relative_error(llm.model(tokens, 0), plain(tokens, 0)) < limit


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_prompt_has_the_same_tokens_alone_and_in_a_batch(
    dtype: str, quantize: str | None
) -> None:
    """Bit for bit in the linear layers; attention and sums differ by roundings."""
    llm = build(DEMO, dtype=dtype, quantize=quantize, max_seq_len=128)
    prompts = [
        llm.tokenizer.encode(text, bos=True, eos=False)
        for text in ("Once upon a time", "The", "There was a little dog who", "One day")
    ]
    together = llm.generate(prompts, 40, temperature=0)[0]
    for prompt, tokens in zip(prompts, together, strict=True):
        assert llm.generate([prompt], 40, temperature=0)[0] == [tokens]


def test_which_layers_are_quantized(folder: Path) -> None:
    llm = build(folder, quantize="int4")
    found = {name: m.linear.bits for name, m in named(llm.model) if is_quantized(m)}
    assert found == {f"layers.{i}.{key}": 4 for i in range(2) for key in KEYS} | {"output": 8}
    assert llm.model.tok_embeddings.weight.dtype == torch.float32
    assert str(llm.ways).startswith("linear layers: int4, ")


def named(model: nn.Module) -> list[tuple[str, Any]]:
    return list(model.named_modules())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_plan_counts_the_bytes(folder: Path, bits: int) -> None:
    llm = build(folder, quantize=f"int{bits}", dtype="bfloat16")
    held = sum(x.nbytes for m in llm.model.modules() for x in tensors_of(m))
    norms = sum(m.weight.numel() for name, m in named(llm.model) if name.endswith("norm"))
    plan = memory.plan_of(llm.model, 512)
    assert plan.weights == held - 2 * norms  # which are widened
    assert f"int{bits} and bfloat16" in str(plan)


def tensors_of(module: nn.Module) -> list[Tensor]:
    values = [*module.parameters(recurse=False)]
    if is_quantized(module):
        values += vars(module.linear).values()
    return [x for x in values if isinstance(x, Tensor)]


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_hooks_and_hidden_states(folder: Path, bits: int) -> None:
    llm = build(folder, quantize=f"int{bits}")
    expected = llm.generate(PROMPTS, 8, temperature=0)[0]
    twin = copy.deepcopy(llm.model)
    tokens = torch.tensor([PROMPTS[0]])
    assert torch.equal(twin(tokens, 0), llm.model(tokens, 0))
    attention: Any = llm.model.layers[0].attention
    assert attention.wq.linear.dequantize().shape == (128, 128)
    states = llm.hidden_states(tokens)
    with attention.wq.register_forward_hook(lambda *_: None):
        assert llm.generate(PROMPTS, 8, temperature=0)[0] == expected
    assert all(torch.equal(a, b) for a, b in zip(states, llm.hidden_states(tokens), strict=True))


@pytest.mark.parametrize("n_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_quantize_after_the_cut(
    tmp_path: Path, weights: dict[str, Tensor], n_ranks: int
) -> None:
    """Groups that the cut doesn't split are the same; activations are rounded per rank."""
    folder = write_checkpoint(tmp_path, PARAMS, weights, n_shards=2)
    result = torchrun(n_ranks, PROGRAMS / "quantized_rank.py", folder)
    assert result.returncode == 0, result.stderr
    for name, (tokens, logprobs) in json.loads(result.stdout.splitlines()[-1]).items():
        llm = build(folder, quantize=name)
        expected = llm.generate([[7, 20, 300, 5], [9]], 10, temperature=0, logprobs=True)
        assert tokens == expected[0]
        found = torch.tensor(logprobs[0])
        assert torch.allclose(found, torch.tensor(expected[1][0]), atol=0.02)  # type: ignore[index]


def test_bad_requests_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="quantize is 'int5', expected 'int8' or 'int4'"):
        build(folder, quantize="int5")


def test_without_acceleration_weights_are_dequantized(folder: Path) -> None:
    llm = build(folder, quantize="int4", accelerate=False)
    assert {type(m.linear) for _, m in named(llm.model) if is_quantized(m)} == {QuantizedLinear}
    assert accel.ways(llm.model).reasons["linear"] == "accelerate is False"
