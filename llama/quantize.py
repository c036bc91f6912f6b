"""Weights of linear layers in 8 or 4 bits.

In groups of 32 neighbours in a row, w = (q - zero) * scale, with integers q of 8 or 4 bits. The
layout is that of compressed-tensors' ``pack-quantized``, so that a folder's tensors are used as
they are.
"""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Bits = Literal[4, 8]
GROUP = 32
# Shrinking the range clips the largest weight of a group and rounds the others more finely.
_SHRINK = tuple(1 - i / 32 for i in range(13))


class QuantizedWeight(NamedTuple):
    """A weight [N, K], whose groups of 32 columns are padded to a multiple of 32.

    Attributes:
        packed: int32 [N, G * 4 or G * 8], 8 or 4 unsigned integers each, the first in the lowest
            bits.
        scale: float [N, G].
        zero: uint8 [N, G], the integer that stands for 0; None for 2^(bits - 1) everywhere.
    """

    bits: Bits
    shape: tuple[int, int]
    packed: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], computed in float32."""
        values = unpack(self.packed, self.bits).unflatten(1, (-1, GROUP)).float()
        zero = 2 ** (self.bits - 1) if self.zero is None else self.zero[..., None].float()
        weight = (values - zero) * self.scale.float()[..., None]
        return weight.flatten(1)[:, : self.shape[1]].to(dtype)

    def to(self, device: torch.device) -> "QuantizedWeight":
        zero = None if self.zero is None else self.zero.to(device)
        return self._replace(packed=self.packed.to(device), scale=self.scale.to(device), zero=zero)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.packed, self.scale, self.zero) if x is not None)


def quantize(weight: Tensor, bits: Bits) -> QuantizedWeight:
    """The nearest integers, with each group's scale chosen from 13 to minimize the squared error.

    Scales are rounded to bfloat16 before the integers are chosen, so that this costs no accuracy.
    """
    n, k = weight.shape
    groups = F.pad(weight.float(), (0, -k % GROUP)).unflatten(1, (-1, GROUP))  # [N, G, 32]
    largest, half = groups.abs().amax(-1), 2 ** (bits - 1)
    # the range is [-half, half - 1]: the weight of largest magnitude becomes -half
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    best = torch.full_like(largest, torch.inf)
    scale, q = torch.zeros_like(largest), torch.zeros_like(groups)
    for shrink in _SHRINK if bits == 4 else _SHRINK[:1]:
        tried = (extreme * (-shrink / half)).bfloat16().float()
        inverse = torch.where(tried == 0, 0, 1 / tried)
        integers = (groups * inverse[..., None]).round_().clamp_(-half, half - 1)
        error = (integers * tried[..., None] - groups).square_().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        q = torch.where(better[..., None], integers, q)
    return QuantizedWeight(bits, (n, k), pack(q.flatten(1) + half, bits), scale.bfloat16())


def pack(values: Tensor, bits: Bits) -> Tensor:
    """int32 [N, K * bits / 32] of unsigned integers [N, K]."""
    n_per_word = 32 // bits
    words = values.long().unflatten(1, (-1, n_per_word))
    shifts = torch.arange(n_per_word, device=values.device) * bits
    return (words << shifts).sum(-1).to(torch.int32)


def unpack(packed: Tensor, bits: Bits) -> Tensor:
    """uint8 [N, K] of int32 words [N, K * bits / 32]."""
    if bits == 8:
        return packed.contiguous().view(torch.uint8)
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)


def parse_quantize(name: str | None) -> Bits | None:
    """The bits of "int8" or "int4".

    Raises:
        ValueError: another name.
    """
    names: dict[str | None, Bits | None] = {None: None}
    names |= {f"int{bits}": bits for bits in get_args(Bits)}
    if name not in names:
        raise ValueError(f"quantize is {name!r}, expected 'int8' or 'int4'")
    return names[name]
