"""Named shapes, and random checkpoints of them: speed doesn't depend on the weights' values."""

import base64
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.probes import probe_bytes
from llama import ModelArgs, memory
from llama.checkpoint.sharding import local_slices, shard_specs


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model as params.json describes it; ``n_ranks`` > 1 means one rank's part of it."""

    params: dict[str, Any]
    n_ranks: int = 1


_LLAMA3 = {
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": 128256,
}
_SHAPE_1B = {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "n_kv_heads": 8,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.5,
}
_SHAPE_3B = _SHAPE_1B | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0}
_SHAPE_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
}
_SHAPE_70B = _SHAPE_8B | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}
# so narrow that only the overhead of the calls is left, with as many layers as 1B
_SHAPE_TINY = {
    "dim": 64,
    "n_layers": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 64,
    "vocab_size": 512,
}

SHAPES = {
    "tiny": Shape(_LLAMA3 | _SHAPE_TINY),
    "1B": Shape(_LLAMA3 | _SHAPE_1B),
    "3B": Shape(_LLAMA3 | _SHAPE_3B),
    "8B": Shape(_LLAMA3 | _SHAPE_8B),
    "70B-rank-of-8": Shape(_LLAMA3 | _SHAPE_70B, n_ranks=8),
}


def largest_shape(device: torch.device, dtype: torch.dtype, total: int) -> tuple[str, str]:
    """The largest of 8B, 3B and 1B that the benchmark can measure in ``total`` bytes, and the
    reason. A comparison holds two copies of the weights: this library's and a peer's."""
    spare = probe_bytes(device) + 3 * memory.GIB  # contexts of three processes, and their kernels
    too_large = []
    for name in ("8B", "3B", "1B"):

        def planned(batch: int, length: int, name: str = name) -> int:
            args = ModelArgs(**SHAPES[name].params, max_batch_size=batch, max_seq_len=length)
            return memory.plan(args, 1, dtype, device).total

        needed = spare + max(2 * planned(8, 1024), planned(128, 256), planned(1, 8256))
        if needed <= total:
            break
        too_large.append(f"{name} needs {needed / memory.GIB:.0f} GiB with a peer")
    found = f"{total / memory.GIB:.0f} GiB of memory"
    return name, "; ".join([f"{name} for {found}", *too_large])


def checkpoint_of(name: str, where: Path, device: str = "cpu") -> Path:
    """The folder of a random bfloat16 checkpoint of a shape; written if it doesn't exist yet.

    Args:
        device: draws the numbers; the 16 GB of 8B take minutes on a CPU.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in SHAPES:
        raise ValueError(f"shape is {name!r}, expected one of {', '.join(SHAPES)}")
    folder = where / name
    if (folder / "params.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    params = SHAPES[name].params
    torch.save(random_weights(SHAPES[name], device), folder / "consolidated.00.pth")
    _write_tokenizer(folder / "tokenizer.model", params["vocab_size"] - 256)
    partial = folder / ".params.json"
    partial.write_text(json.dumps(params))
    os.replace(partial, folder / "params.json")  # last: it marks the folder as complete
    return folder


def random_weights(shape: Shape, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Weights that keep the size of the activations, as a trained model's do, in host memory."""
    generator = torch.Generator(device).manual_seed(1)
    weights = {}
    for key, spec in shard_specs(ModelArgs(**shape.params)).items():
        sizes = [stop - start for start, stop in local_slices(spec, shape.n_ranks, 0)]
        tensor = torch.ones(sizes, dtype=torch.bfloat16, device=device)
        if len(sizes) == 2:
            std = 1.0 if key.startswith("tok_embeddings") else spec.sizes[1] ** -0.5
            tensor.normal_(std=std, generator=generator)
        weights[key] = tensor.cpu()
    return weights


def _write_tokenizer(path: Path, n_tokens: int) -> None:
    """A tiktoken vocabulary of every string of one byte, then of two, then of three."""
    strings = itertools.chain.from_iterable(
        itertools.product(range(256), repeat=length) for length in (1, 2, 3)
    )
    with path.open("wb") as file:
        for rank, string in zip(range(n_tokens), strings, strict=False):
            file.write(base64.b64encode(bytes(string)) + b" %d\n" % rank)
