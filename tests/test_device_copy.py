"""Loading through pinned buffers, with stand-ins for the device's stream and its events."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, random_weights, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from llama.__main__ import convert_folder
from llama.checkpoint import device_copy, reader
from llama.checkpoint.device_copy import DeviceCopier
from llama.checkpoint.folder import find_checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Stream:
    """Runs copies as late as their events allow."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.n_sent = self.n_done = 0
        self.log: list[str] = []

    def send(self, target: Tensor, source: Tensor) -> "Event":
        self.waiting.append((target, source))
        self.n_sent += 1
        self.log.append(f"send {self.n_sent}")
        return Event(self, self.n_sent)


class Event:
    def __init__(self, stream: Stream, n_copies: int) -> None:
        self.stream, self.n_copies = stream, n_copies

    def synchronize(self) -> None:
        stream = self.stream
        stream.log.append(f"wait {self.n_copies}")
        while stream.n_done < self.n_copies:
            target, source = stream.waiting.pop(0)
            target.copy_(source)
            stream.n_done += 1


def copier(stream: Stream, n_bytes: int) -> DeviceCopier:
    return DeviceCopier(send=stream.send, buffer_bytes=n_bytes, pinned=False)


def same_bits(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_a_buffer_isnt_reused_before_its_event() -> None:
    stream = Stream()
    copies = copier(stream, 64)
    source = torch.arange(5 * 16.0)
    target = torch.zeros_like(source)
    for i in range(5):  # each fills a buffer
        copies.copy(target[16 * i : 16 * i + 16], source[16 * i : 16 * i + 16])
        assert stream.n_sent - stream.n_done <= 2
    order = "send 1, send 2, wait 1, send 3, wait 2, send 4, wait 3, send 5"
    assert ", ".join(stream.log) == order
    copies.finish()
    assert not stream.waiting
    assert torch.equal(target, source)


def test_the_source_may_be_overwritten_after_the_call() -> None:
    stream, source, target = Stream(), torch.ones(8), torch.zeros(8)
    copies = copier(stream, 64)
    copies.copy(target, source)
    source.zero_()
    copies.finish()
    assert torch.equal(target, torch.ones(8))


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_every_pair_of_dtypes(source_dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    bits = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 1 / 3, 65519.0, 1e30, -torch.inf, torch.nan])
    source = torch.cat((bits, torch.randn(4087) * 10)).to(source_dtype).view(64, 64)
    target, stream = torch.zeros(64, 64, dtype=target_dtype), Stream()
    copies = copier(stream, 1000)
    copies.copy(target, source)
    copies.finish()
    assert same_bits(target, source.to(target_dtype))


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "columns": lambda x: x[:, 3:11],
    "transposed": lambda x: x.T,
    "heads": lambda x: x.unflatten(0, (-1, 2, 5)).transpose(1, 2),
    "one axis": lambda x: x.flatten(),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_bytes", [8, 40, 200, 10**6])
def test_chunks_larger_than_a_buffer(shape: str, n_bytes: int) -> None:
    source = SHAPES[shape](torch.arange(40 * 17.0).view(40, 17))
    whole = torch.zeros(*source.shape[:-1], 2 * source.shape[-1])
    target = whole[..., ::2]  # not contiguous
    stream = Stream()
    copies = copier(stream, n_bytes)
    copies.copy(target, source)
    copies.finish()
    assert torch.equal(target, source)
    assert not whole[..., 1::2].any()


# --- Loading --------------------------------------------------------------------------------------


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Loading to the CPU goes through two buffers of 10 kB and the stand-in."""
    stream = Stream()
    monkeypatch.setattr(reader, "needs_staging", lambda _: True)
    monkeypatch.setattr(reader, "DeviceCopier", lambda: copier(stream, 10_000))
    return stream


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 model in three layouts, and an adapter."""
    path = tmp_path_factory.mktemp("layouts")
    weights = {key: w.bfloat16() for key, w in random_weights(PARAMS).items()}
    write_checkpoint(path / "native", PARAMS, weights)
    write_checkpoint(path / "shards", PARAMS, weights, n_shards=2)
    convert_folder(str(path / "native"), str(path / "hf"), format="hf")
    (path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {}
    for module, width in (("q_proj", 128), ("k_proj", 64), ("o_proj", 128)):
        name = f"base_model.model.model.layers.1.self_attn.{module}"
        factors[f"{name}.lora_A.weight"] = torch.randn(4, 128)
        factors[f"{name}.lora_B.weight"] = torch.randn(width, 4)
    save_file(factors, path / "adapter" / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["native", "shards", "hf"])
def test_staged_weights_equal_those_of_the_cpu(
    layouts: Path, layout: str, dtype: torch.dtype, adapter: bool, request: pytest.FixtureRequest
) -> None:
    """On 1, 2 and 16 ranks, of which neighbours share a key/value head."""
    ckpt = find_checkpoint(str(layouts / layout))
    args = ckpt.args(PARAMS["vocab_size"], 16, 1)

    def load(n_ranks: int, rank: int) -> dict[str, Any]:
        return reader.load(
            ckpt,
            args,
            n_ranks,
            rank,
            dtype=dtype,
            device=torch.device("cpu"),
            progress=False,
            adapter=str(layouts / "adapter") if adapter else None,
        )

    roles = [(1, 0), (2, 0), (2, 1), (16, 5)]
    expected = [load(*role) for role in roles]
    stream = request.getfixturevalue("staged")
    for role, tensors in zip(roles, expected, strict=True):
        loaded = load(*role)
        assert not stream.waiting
        for key, tensor in tensors.items():
            assert same_bits(loaded[key], tensor), (role, key)
    assert stream.n_done > 4 * len(expected[0])  # tensors larger than a buffer take several copies


def test_only_cuda_devices_are_staged() -> None:
    names = ["cpu", "mps", "cuda", "cuda:1"]
    staged = [device_copy.needs_staging(torch.device(name)) for name in names]
    assert staged == [False, False, True, True]
