"""On a CUDA device: loading through pinned buffers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, random_weights, write_checkpoint

from llama.__main__ import convert_folder
from llama.checkpoint import reader
from llama.checkpoint.device_copy import DeviceCopier
from llama.checkpoint.folder import find_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_conversion_on_the_device_gives_the_bits_of_the_cpu(
    source_dtype: torch.dtype, target_dtype: torch.dtype
) -> None:
    edges = torch.tensor([0.0, -0.0, 1e-40, 6e-8, 1 / 3, 65519.0, 1e30, -torch.inf], device="cpu")
    source = torch.cat((edges, torch.randn(2**20 - 8) * 10)).to(source_dtype).view(1024, 1024)
    target = torch.zeros(1024, 2048, dtype=target_dtype, device=CUDA)[:, ::2]
    copier = DeviceCopier(buffer_bytes=100_000)
    copier.copy(target, source)
    copier.finish()
    got, expected = target.cpu().contiguous(), source.to(target_dtype)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_a_buffer_isnt_overwritten_while_the_device_reads_it() -> None:
    source = torch.arange(2**24, dtype=torch.float32)
    target = torch.zeros(2**24, device=CUDA)
    copier = DeviceCopier(buffer_bytes=2**20)
    torch.cuda._sleep(10**8)  # cycles: the copies start late
    copier.copy(target, source)
    copier.finish()
    assert torch.equal(target.cpu(), source)


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    ckpt = find_checkpoint(str(folder))
    args = ckpt.args(PARAMS["vocab_size"], 16, 1)
    return reader.load(ckpt, args, 1, 0, dtype=dtype, device=device, progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["native", "shards", "hf"])
def test_loaded_weights_equal_those_on_the_cpu(
    tmp_path: Path, layout: str, dtype: torch.dtype
) -> None:
    weights = {key: w.bfloat16() for key, w in random_weights(PARAMS).items()}
    write_checkpoint(tmp_path / "native", PARAMS, weights)
    write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    convert_folder(str(tmp_path / "native"), str(tmp_path / "hf"), format="hf")
    on_device = load(tmp_path / layout, CUDA, dtype)
    for key, expected in load(tmp_path / layout, torch.device("cpu"), dtype).items():
        assert on_device[key].device == CUDA
        assert torch.equal(on_device[key].cpu(), expected), key


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_loading_to_another_than_the_current_device(folder: Path) -> None:
    second = torch.device("cuda", 1)
    expected = load(folder, torch.device("cpu"), torch.bfloat16)
    for key, tensor in load(folder, second, torch.bfloat16).items():
        assert tensor.device == second
        assert torch.equal(tensor.cpu(), expected[key]), key
