"""4-bit linear layers on CUDA and MPS by torch's own kernel (tinygemm), for bfloat16.

It has w = (q - 8) * scale + zero in groups of 32. torch has no kernel for 8 bits in groups: these
weights are dequantized in every call.
"""

import torch
from torch import Tensor

from llama.accel.selfcheck import difference
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.files import summary
from llama.model import Transformer
from llama.quantize import GROUP, QuantizedLinear, QuantizedWeight

_INNER_K_TILES = 8  # the widest loads that the kernel has


class TinyGemmLinear:
    """``QuantizedLinear`` on a copy of a 4-bit weight in the kernel's order."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.bits, self.shape = weight.bits, weight.shape
        # two integers per byte: the files have the first in the lower half, the kernel in the upper
        pairs = weight.packed.contiguous().view(torch.uint8)
        swapped = pairs << 4 | pairs >> 4
        self.packed = torch.ops.aten._convert_weight_to_int4pack(swapped, _INNER_K_TILES)
        scale = weight.scale.float()
        zero = torch.zeros_like(scale) if weight.zero is None else (8 - weight.zero.float()) * scale
        self.scales = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous().bfloat16()

    def __call__(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.ops.aten._weight_int4pack_mm(rows, self.packed, GROUP, self.scales)
        return y.view(*x.shape[:-1], self.shape[0])


def why_not_tinygemm(
    weight: QuantizedWeight, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the kernel can't be used for a weight, or None. Tries it on random activations."""
    n, k = weight.shape
    if weight.bits != 4:
        return "torch has no kernel for 8 bits in groups"
    if dtype != torch.bfloat16:
        return f"tinygemm needs bfloat16, not {str(dtype).removeprefix('torch.')}"
    if n % 8 or k % (16 * _INNER_K_TILES):
        return f"tinygemm needs multiples of 8 rows and 128 columns, not {n} x {k}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, k, generator=generator).to(device=device, dtype=dtype)
    try:
        return difference(TinyGemmLinear(weight)(x), QuantizedLinear(weight)(x))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises, the plain form still works
        return summary(error)


def use_tinygemm(model: Transformer) -> str | None:
    """Replace the 4-bit linear layers where the kernel can be used.

    Returns:
        Why a layer is dequantized in every call, if one is.
    """
    reason: str | None = None
    checked: dict[tuple[int, tuple[int, int]], str | None] = {}  # by bits and shape
    for layer in model.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            continue
        if not isinstance(layer.linear, QuantizedLinear):
            continue
        weight = layer.linear.quantized
        kind = weight.bits, weight.shape
        if kind not in checked:
            checked[kind] = why_not_tinygemm(weight, model.dtype, model.device)
        if checked[kind] is None:
            layer.linear = TinyGemmLinear(weight)
        else:
            reason = checked[kind]
    return reason
