"""Linear layers and memory allocation on the CPU."""

import ctypes
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.accel import features, kernels
from llama.distributed.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from llama.hooks import is_unmodified
from llama.model import Attention, FeedForward, RMSNorm, Transformer, swiglu

# oneDNN reorders the right-hand matrix of a matmul in every call, and F.linear passes the weight
# there: a third of a decoding step's time.

_MAX_ROWS = 256  # per matmul, so that intermediate results stay in cache
_FEW_ROWS = 8  # up to here, each row count may have its own kernel
_KERNEL_ROWS = 4  # with AMX: up to here, the kernels are faster
_MIN_WEIGHT_BYTES = 2**20  # smaller weights stay in cache, and F.linear has less overhead


def _in_chunks(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``product`` to the rows of x [..., dim], in chunks padded with zero rows.

    oneDNN JIT-compiles a kernel per row count, which takes 5 to 15 ms and up to a megabyte, and
    never frees it; rounding up leaves 27 row counts.
    """
    rows = x.flatten(0, -2)
    if len(rows) <= _FEW_ROWS:
        y = product(rows)[: len(rows)].contiguous()
        return y.view(*x.shape[:-1], y.shape[-1])
    results = []
    for chunk in rows.split(_MAX_ROWS):
        n_rows = len(chunk)
        n_padding = -n_rows % (8 if n_rows <= 64 else 16)
        padded = F.pad(chunk, (0, 0, 0, n_padding)) if n_padding else chunk
        results.append(product(padded)[:n_rows])
    y = results[0].contiguous() if len(results) == 1 else torch.cat(results)
    return y.view(*x.shape[:-1], y.shape[-1])


def _columns(rows: Tensor) -> Tensor:
    """[dim, T]. A single row is repeated: torch's kernel for one column is slower."""
    return rows.t() if len(rows) != 1 else rows.t().expand(-1, 2)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` with few distinct row counts."""
    return _in_chunks(x, lambda rows: F.linear(rows, weight))


def weight_lhs_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` as weight @ x.T: oneDNN doesn't reorder the left-hand matrix."""
    return _in_chunks(x, lambda rows: torch.mm(weight, _columns(rows)).t())


def _is_for_kernels(x: Tensor) -> bool:
    """Whether x [..., dim] has few rows, for which the kernels are faster than oneDNN."""
    return x.shape[:-1].numel() <= _KERNEL_ROWS and kernels.instruction_set() is not None


def swiglu_weight_lhs(
    x: Tensor, w1: ColumnParallelLinear, w2: RowParallelLinear, w3: ColumnParallelLinear
) -> Tensor:
    """``model.swiglu`` with all three weights on the left. Intermediate results stay transposed;
    only the last one is transposed back."""
    if _is_for_kernels(x) or not all(is_unmodified(w) for w in (w1, w2, w3)):
        return swiglu(x, w1, w2, w3)

    def product(rows: Tensor) -> Tensor:
        columns = _columns(rows)  # [dim, T]
        h = F.silu(torch.mm(w1.weight, columns), inplace=True).mul_(torch.mm(w3.weight, columns))
        return torch.mm(w2.weight, h).t()

    return w2.groups.all_reduce(_in_chunks(x, product))


def _weight_lhs_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``weight_lhs_matmul``, or for a few rows the kernel, which reads faster."""
    return kernels.linear(x, weight) if _is_for_kernels(x) else weight_lhs_matmul(x, weight)


def activation_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype of activations for weights of ``dtype``: float32 for 16-bit weights on a CPU with
    the kernels, except with AMX, whose matrix products are in bfloat16."""
    return torch.float32 if _uses_kernels(device, dtype) else dtype


def _uses_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    is_half = device.type == "cpu" and dtype in kernels.HALF
    return is_half and not _uses_amx(dtype) and kernels.instruction_set() is not None


def _uses_amx(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and "amx_bf16" in features.cpu_features()


def linear_form(device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The form of large linear layers, and why it isn't a faster one; see ``Ways``."""
    if device.type != "cpu":
        return "F.linear", None
    if dtype not in kernels.HALF:
        return "F.linear", f"the dtype is {str(dtype).removeprefix('torch.')}, not 16 bits"
    if _uses_amx(dtype):
        return "weight on the left", None
    return kernels.form() or "F.linear", kernels.why_not()


def choose_linear(model: Transformer) -> None:
    """Choose the matmul implementations of the linear layers and SwiGLU."""
    dtype = model.tok_embeddings.weight.dtype
    form, _ = linear_form(model.device, dtype)
    for layer in model.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            continue
        if layer.weight is None:  # quantized, see ``quantized_form``
            continue
        if _uses_kernels(model.device, dtype):
            layer.linear = kernels.linear
        elif dtype != torch.float32:
            is_small = layer.weight.nbytes < _MIN_WEIGHT_BYTES or form == "F.linear"
            layer.linear = linear if is_small else _weight_lhs_linear
    for ffn in model.modules():
        if not isinstance(ffn, FeedForward) or form != "weight on the left":
            continue
        w1 = ffn.w1.weight
        if w1 is not None and w1.nbytes >= _MIN_WEIGHT_BYTES:
            ffn.compute = swiglu_weight_lhs


def use_float32_activations(model: Transformer) -> None:
    """Compute in float32, with keys and values cached in float16: its mantissa has three more bits
    than bfloat16's, and they stay far below its largest number."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight = nn.Parameter(module.weight.float(), requires_grad=False)
        elif isinstance(module, VocabParallelEmbedding):
            module.out_dtype = torch.float32
        elif isinstance(module, Attention):
            module.cache.dtype = torch.float16
            if kernels.can_attend(module.head_dim):
                module.attend = kernels.decode_attention


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks for reuse. By default it returns blocks of a few MiB to the
    kernel, which zeroes each page before handing it out again: up to a third of prefill time. The
    process then stays as large as its largest pass.

    Returns:
        Whether this is glibc and it accepted the settings.
    """
    if platform.system() != "Linux":  # on Windows, CDLL(None) raises TypeError
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return all(mallopt(option, 2**30) == 1 for option in (trim_threshold, mmap_threshold))
