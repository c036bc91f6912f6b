"""Kernels and synchronizations of a decoding step on CUDA, counted with fake tensors."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PARAMS
from fake_cuda import Record, fake_cuda
from torch import Tensor

from llama import ModelArgs, Transformer
from llama.accel import cuda
from llama.accel.projection import join_projections
from llama.cache import Decode
from llama.engine import Engine
from llama.model import Attention
from llama.sampling import SamplingParams, sample

SHAPE = PARAMS | {"max_batch_size": 4, "max_seq_len": 512}


def fake_model(n_layers: int, dtype: torch.dtype) -> Transformer:
    """As ``accelerate`` leaves it on CUDA, except for graphs. Inside ``fake_cuda``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = Transformer(ModelArgs(**SHAPE | {"n_layers": n_layers}))
    finally:
        torch.set_default_dtype(before)
    join_projections(model)
    if dtype != torch.float32:
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.attend = cuda.flash_attention
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_runs_16_kernels(dtype: torch.dtype) -> None:
    """5 products (q, k and v in one), 2 norms, 2 of the rotation, 2 stores in the cache, attention,
    2 of SwiGLU and 2 sums; and a few once per step."""
    kernels = []
    for n_layers in (1, 2):
        with fake_cuda(), torch.inference_mode():
            model = fake_model(n_layers, dtype)
            positions = torch.zeros(4, dtype=torch.int64, device="cuda")
            for _ in range(2):  # the first pass allocates the cache
                with Record() as record:
                    batch = Decode(positions, 512, ragged=dtype == torch.float32)
                    model.decode(positions, batch)
            assert record.waits == []
            kernels.append(record.kernels)
    layer = kernels[1] - kernels[0]
    assert layer.total() <= 16, layer
    assert (kernels[0] - layer).total() <= 14, kernels[0] - layer


# --- Synchronizations -------------------------------------------------------------------------


class EmulatedCapture:
    """A graph whose replay does nothing: fake tensors have no numbers."""

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        output = run()
        return lambda: None, output

    def reset(self) -> None:
        pass


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("llama.slots.fingerprint", lambda model: None)  # reads data pointers
    monkeypatch.setattr(cuda, "difference", lambda got, expected: None)
    with fake_cuda():
        model = fake_model(2, torch.bfloat16)
        with Record(), torch.inference_mode():  # the first pass copies the RoPE table
            tokens = torch.zeros(1, dtype=torch.int64, device="cuda")
            model.decode(tokens, Decode(tokens, 1, ragged=False))
        model.decode = cuda.GraphedStep(  # type: ignore[method-assign]
            model, model.decode, any_length=True, capture=EmulatedCapture()
        )
        tokenizer: Any = SimpleNamespace(bos_id=0, stop_tokens=set(), decode_bytes=lambda ids: b"")
        formatter: Any = SimpleNamespace(starts_answer=lambda prompt: False)
        yield Engine(model, tokenizer, formatter, sample)


GREEDY, DRAWN = SamplingParams(temperature=0), SamplingParams(temperature=0.6)


@pytest.mark.parametrize(
    "groups",
    [
        [[GREEDY]],
        [[GREEDY, GREEDY, GREEDY]],
        [[DRAWN, DRAWN]],
        [[GREEDY], [DRAWN], [DRAWN]],
        [[SamplingParams(temperature=0, logprobs=True, top_logprobs=5), GREEDY]],
    ],
    ids=["greedy", "batch", "drawn", "mixed", "top_logprobs"],
)
def test_a_step_waits_for_the_device_once(
    groups: list[list[SamplingParams]], engine: Engine
) -> None:
    for i, group in enumerate(groups):
        engine.add([engine.request([7] * (3 + i), params, row) for row, params in enumerate(group)])
    n_requests = sum(map(len, groups))
    with Record() as start:
        engine.step()
    assert start.waits == ["copy to the host"] * len(groups)  # each group's first tokens
    with Record():
        engine.step()  # captured
    for _ in range(3):
        with Record() as record:
            assert len(engine.step()) == n_requests
        assert record.waits == ["copy to the host"]
