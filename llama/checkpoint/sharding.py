"""Resharding of tensors, as pure functions: from any number of shards to any number of ranks.

A file's shard and a rank's part are both slices of the full tensor; a rank copies the overlap of
its own slices with each shard's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.config import ModelArgs
from llama.quantize import GROUP, Bits


class ShardSpec(NamedTuple):
    """A tensor's sizes, and how it is split over ranks.

    Attributes:
        axis: the axis that is split; None if the tensor is replicated.
        unit: the axis is split in multiples of this, so that heads aren't split.
    """

    sizes: tuple[int, ...]
    axis: int | None
    unit: int = 1


# A part of a tensor: start and stop on every axis.
Slices = tuple[tuple[int, int], ...]

# Megatron's scheme: projections out of the residual stream are split on axis 0 (their outputs),
# those back into it on axis 1 (their inputs).
_LAYER_SPECS = {
    "attention.wq": ("heads", "dim", 0),
    "attention.wk": ("kv_heads", "dim", 0),
    "attention.wv": ("kv_heads", "dim", 0),
    "attention.wo": ("dim", "heads", 1),
    "feed_forward.w1": ("ffn", "dim", 0),
    "feed_forward.w2": ("dim", "ffn", 1),
    "feed_forward.w3": ("ffn", "dim", 0),
    "attention_norm": ("dim", None),
    "ffn_norm": ("dim", None),
}
_SPECS = {
    "tok_embeddings": ("vocab", "dim", 0),  # axis 1 in Llama 2's files
    "norm": ("dim", None),
    "output": ("vocab", "dim", 0),
}


def shard_specs(args: ModelArgs) -> dict[str, ShardSpec]:
    """The spec of every tensor of the model, by key."""
    head = args.head_dim
    units = {"heads": head, "kv_heads": head}
    sizes = {
        "heads": args.n_heads * head,
        "kv_heads": args.kv_heads * head,
        "dim": args.dim,
        "ffn": args.ffn_hidden_dim,
        "vocab": args.vocab_size,
    }

    def spec(*names_and_axis: Any) -> ShardSpec:
        *names, axis = names_and_axis
        unit = 1 if axis is None else units.get(names[axis], 1)
        return ShardSpec(tuple(sizes[name] for name in names), axis, unit)

    modules = {name: spec(*rule) for name, rule in _SPECS.items()}
    for i in range(args.n_layers):
        modules |= {f"layers.{i}.{name}": spec(*rule) for name, rule in _LAYER_SPECS.items()}
    return {f"{name}.weight": found for name, found in modules.items()}


def local_slices(spec: ShardSpec, n_ranks: int, rank: int) -> Slices:
    """A rank's part of a tensor. With more ranks than units (key/value heads), neighbouring ranks
    hold the same one: the head that their query heads share."""
    slices = [(0, size) for size in spec.sizes]
    if spec.axis is not None:
        n_units = spec.sizes[spec.axis] // spec.unit
        start = rank * n_units // n_ranks
        stop = max(start + 1, (rank + 1) * n_units // n_ranks)
        slices[spec.axis] = (start * spec.unit, stop * spec.unit)
    return tuple(slices)


class Copy(NamedTuple):
    """A piece to copy: its slices in a shard's tensor, and in the rank's."""

    shard: int
    source: Slices
    target: Slices


def copies(
    source: ShardSpec, n_shards: int, target: ShardSpec, n_ranks: int, rank: int
) -> list[Copy]:
    """The pieces that make up a rank's part of a tensor stored in ``n_shards``.

    Data replicated in several shards is read from the nearest one, so that with as many ranks as
    shards each rank opens only its own.
    """
    wanted = local_slices(target, n_ranks, rank)
    seen: set[Slices] = set()
    found = []
    for i in range(n_shards):
        shard = (rank * n_shards // n_ranks + i) % n_shards
        held = local_slices(source, n_shards, shard)
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(held, wanted, strict=True))
        if held in seen or any(a >= b for a, b in common):
            continue
        seen.add(held)
        found.append(Copy(shard, _relative(common, held), _relative(common, wanted)))
    return found


def _relative(part: Slices, whole: Slices) -> Slices:
    return tuple((a - c, b - c) for (a, b), (c, _) in zip(part, whole, strict=True))


def narrow(tensor: Tensor, part: Slices) -> Tensor:
    """View of a part of a tensor."""
    return tensor[tuple(slice(a, b) for a, b in part)]


def n_bytes(spec: ShardSpec, n_ranks: int, dtype: torch.dtype) -> int:
    """Bytes of a rank's part of a tensor."""
    size = dtype.itemsize
    for a, b in local_slices(spec, n_ranks, 0):
        size *= b - a
    return size


def is_linear(key: str, spec: ShardSpec) -> bool:
    """Whether a tensor is the weight of a linear layer."""
    return len(spec.sizes) == 2 and not key.startswith("tok_embeddings")


def quantized_bits(specs: Mapping[str, ShardSpec], quantize: Bits | None) -> dict[str, Bits]:
    """The bits of the tensors that ``quantize`` quantizes: the weights of all linear layers, with
    8 for the output layer's in both modes."""
    if quantize is None:
        return {}
    linear = (key for key, spec in specs.items() if is_linear(key, spec))
    return {key: 8 if key == "output.weight" else quantize for key in linear}


def quantized_bytes(spec: ShardSpec, n_ranks: int, bits: Bits) -> int:
    """Bytes of a rank's part of a weight in ``bits``, with a scale of 2 bytes per group."""
    (row, end_row), (column, end_column) = local_slices(spec, n_ranks, 0)
    n_groups = -(-(end_column - column) // GROUP)
    return (end_row - row) * n_groups * (GROUP * bits // 8 + 2)
