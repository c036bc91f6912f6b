"""Queries, keys and values in few kernels, for CUDA: one matrix product, and one rotation.

The kernels of a decoding step are short, and starting each costs microseconds. The complex rotation
takes three for queries and three for keys: conversion to float32, product, conversion back. On the
CPU it is the faster one: 2 to 60 times, from 4 to 1024 tokens.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.accel.selfcheck import difference
from llama.cache import Batch
from llama.files import summary
from llama.hooks import is_unmodified
from llama.model import Attention, Transformer, precompute_freqs_cis, project, rotate

JOINT = "F.linear, q, k and v in one"


def check_rotation(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the rotation can't be used on a device, or None."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, head_dim, generator=generator).to(device=device, dtype=dtype)
    freqs_cis = precompute_freqs_cis(head_dim, 5).to(device)
    try:
        return difference(_rotate(x, *_rotation(freqs_cis)), rotate(x, freqs_cis))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises, the plain form still works
        return summary(error)


def join_projections(model: Transformer) -> None:
    for layer in model.modules():
        if isinstance(layer, Attention) and layer.wq.weight is not None:  # not quantized
            layer.project = JointProjection(layer)
            # the freed blocks are too small for the next layer's matrix
            torch.cuda.empty_cache()


def _rotation(freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Where (1, 0) and (0, 1) are rotated to: (cos, sin) and (-sin, cos), [T, 1, D / 2, 2] each."""
    rows = torch.view_as_real(freqs_cis)[:, None]
    cos, sin = rows.unbind(-1)
    return rows, torch.stack((-sin, cos), dim=-1)


def _rotate(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``model.rotate`` of x [T, H, D] in real numbers. Two kernels, which also convert to float32
    and back."""
    even, odd = x.unflatten(-1, (-1, 2)).split(1, dim=-1)  # [T, H, D / 2, 1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.addcmul(even * first, odd, second, out=y.unflatten(-1, (-1, 2)))
    return y


class JointProjection:
    """``model.project`` with one product for queries, keys and values, and one rotation.

    The weights of wq, wk and wv become parts of one matrix, so that changes in place take effect.
    A layer with hooks, or whose weights were replaced, is computed plainly.
    """

    def __init__(self, layer: Attention) -> None:
        self.layers = layer.wq, layer.wk, layer.wv
        sizes = [len(part.weight) for part in self.layers]
        # a Parameter: torch.compile takes their sizes as constants
        self.weight = nn.Parameter(torch.cat([p.weight for p in self.layers]), requires_grad=False)
        for part, weight in zip(self.layers, self.weight.split(sizes), strict=True):
            part.weight = nn.Parameter(weight, requires_grad=False)
        self.weights = [part.weight for part in self.layers]

    def __call__(self, layer: Attention, x: Tensor, freqs_cis: Tensor, batch: Batch) -> Tensor:
        for name, part, weight in zip(("wq", "wk", "wv"), self.layers, self.weights, strict=True):
            now = getattr(layer, name)
            if now is not part or now.weight is not weight or not is_unmodified(now):
                return project(layer, x, freqs_cis, batch)
        n_q, n_kv = layer.n_local_heads, layer.n_local_kv_heads
        y = F.linear(x, self.weight).view(-1, n_q + 2 * n_kv, layer.head_dim)
        qk, v = y.split((n_q + n_kv, n_kv), dim=1)
        # once per pass; a caller may give a layer other rotations
        if batch.rotation is None or batch.rotation[0] is not freqs_cis:
            batch.rotation = freqs_cis, *_rotation(freqs_cis)
        q, k = _rotate(qk, *batch.rotation[1:]).split((n_q, n_kv), dim=1)
        layer.cache.update(k, v, batch)
        return q

    def __reduce__(self) -> tuple[type, tuple[object]]:
        """Copies project plainly: their weights are separate."""
        return functools.partial, (project,)
