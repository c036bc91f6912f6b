"""Layouts on MPS and ROCm, whose attention kernels have misread permuted tensors (pytorch#181133,
ROCm/pytorch#3230)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import PARAMS, new_model, random_weights
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llama import attention, cache
from llama.cache import Batch, Decode, Prefill

CPU = torch.device("cpu")


def test_the_cache_is_head_major_and_queries_are_made_dense() -> None:
    with FakeTensorMode():
        zeros = cache._zeros((2, 3, 8, 4), torch.float16, torch.device("mps"))
        assert zeros.device.type == "mps"
        assert zeros.is_contiguous()
    # without MPS in this build, even a fake tensor there has no contiguous()
    for device, expected in (("mps", "dense"), ("cuda", "as it is"), ("cpu", "as it is")):
        q: Any = SimpleNamespace(device=torch.device(device), contiguous=lambda: "dense")
        assert attention._dense(q) == (q if expected == "as it is" else "dense")


def test_the_cache_is_head_major_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        options = (2, 3, 8, 4), torch.float16, torch.device("cuda")
        assert not cache._zeros(*options).is_contiguous()
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert cache._zeros(*options).is_contiguous()


def test_every_kernel_gets_such_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, whose cache has the same layout; the queries are made dense as on MPS."""
    attend, n_calls = F.scaled_dot_product_attention, 0

    def checked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        nonlocal n_calls
        n_calls += 1
        assert q.is_contiguous()
        for x in (k, v):
            assert x.stride()[-2:] == (x.shape[-1], 1)
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", checked)
    monkeypatch.setattr(attention, "_dense", Tensor.contiguous)
    model = new_model(PARAMS, random_weights(PARAMS), max_batch_size=2, max_seq_len=64)
    batches: list[Batch] = [
        Prefill([0, 1], [0, 0], [30, 10], CPU),
        Prefill([0, 1], [30, 10], [10, 10], CPU),
        Decode(torch.tensor([40, 20]), 41, ragged=True),
    ]
    with torch.inference_mode():
        for batch in batches:
            model.hidden(torch.zeros(len(batch.positions), dtype=torch.int64), batch)
    assert n_calls == PARAMS["n_layers"] * (2 + 2 + 1)
