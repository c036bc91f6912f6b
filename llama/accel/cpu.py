"""Linear layers and memory allocation on the CPU."""

import ctypes
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.hooks import is_unmodified, version
from llama.model import FeedForward, Transformer, swiglu

# oneDNN reorders the right-hand matrix of a matmul in every call, and F.linear passes the weight
# there: a third of a decoding step's time.

_MAX_ROWS = 256  # per matmul, so that intermediate results stay in cache
_FEW_ROWS = 8  # up to here, each row count may have its own kernel
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


def swiglu_weight_lhs(
    x: Tensor, w1: ColumnParallelLinear, w2: RowParallelLinear, w3: ColumnParallelLinear
) -> Tensor:
    """``model.swiglu`` with all three weights on the left. Intermediate results stay transposed;
    only the last one is transposed back."""
    if not (is_unmodified(w1) and is_unmodified(w2) and is_unmodified(w3)):
        return swiglu(x, w1, w2, w3)

    def product(rows: Tensor) -> Tensor:
        columns = _columns(rows)  # [dim, T]
        h = F.silu(torch.mm(w1.weight, columns), inplace=True).mul_(torch.mm(w3.weight, columns))
        return torch.mm(w2.weight, h).t()

    return w2.groups.all_reduce(_in_chunks(x, product))


class PackedLinear:
    """``F.linear`` on a copy of the weight packed in oneDNN's layout."""

    def __init__(self, weight: Tensor) -> None:
        self.source, self.version = weight, version(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight is not self.source or version(weight) != self.version:
            return linear(x, weight)  # the weight was changed or replaced
        product = torch.ops.mkldnn._linear_pointwise
        return _in_chunks(x, lambda rows: product(rows, self.packed, None, "none", [], ""))


# Values of ONEDNN_MAX_CPU_ISA (dnnl::cpu_isa in oneDNN's reference) that exclude AMX.
_WITHOUT_BFLOAT16 = {
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
}
_WITHOUT_AMX = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def cpu_features() -> set[str]:
    """CPU features as listed by Linux, without those disabled for oneDNN."""
    if platform.system() != "Linux":
        return set()
    features = set(Path("/proc/cpuinfo").read_text().split())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in _WITHOUT_BFLOAT16 | _WITHOUT_AMX:  # oneDNN ignores other values
        features = {feature for feature in features if not feature.startswith("amx")}
    if limit in _WITHOUT_BFLOAT16:
        features.discard("avx512_bf16")
    return features


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has bfloat16 matrix instructions."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_features())


def linear_form(device: torch.device, dtype: torch.dtype) -> tuple[str, str | None]:
    """The form of large linear layers, and why it isn't a faster one; see ``Ways``."""
    if device.type != "cpu":
        return "F.linear", None
    if dtype != torch.bfloat16:
        return "F.linear", f"the dtype is {str(dtype).removeprefix('torch.')}, not bfloat16"
    features = cpu_features()
    if "amx_bf16" in features:
        return "weight on the left", None
    if "avx512_bf16" in features:
        return "packed weights", None
    return "F.linear", "the processor has neither AMX nor AVX512-BF16"


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether large linear layers will hold a second, packed copy of their weights."""
    return linear_form(device, dtype)[0] == "packed weights"


def choose_linear(model: Transformer) -> None:
    """Choose the matmul implementations of the linear layers and SwiGLU."""
    form, _ = linear_form(model.device, model.dtype)
    if form == "F.linear":
        return
    packs = form == "packed weights"
    for layer in model.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            continue
        if layer.weight.nbytes < _MIN_WEIGHT_BYTES:
            layer.linear = linear
        else:
            layer.linear = PackedLinear(layer.weight) if packs else weight_lhs_matmul
    for ffn in model.modules():
        if not isinstance(ffn, FeedForward) or packs:
            continue
        if ffn.w1.weight.nbytes >= _MIN_WEIGHT_BYTES:
            ffn.compute = swiglu_weight_lhs


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
