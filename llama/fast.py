"""Faster ways to compute what model.py says, chosen once, by what the device can do.

| device and dtype                       | linear layers      | attention | a decoding step       |
|----------------------------------------|--------------------|-----------|-----------------------|
| CPU with AMX, bfloat16                 | weight first       | SDPA      | as it is              |
| CPU with AVX512-BF16 alone, bfloat16   | weight packed once | SDPA      | as it is              |
| other CPUs and dtypes, MPS             | F.linear           | SDPA      | as it is              |
| CUDA from Ampere on, bfloat16, float16 | F.linear           | flash     | CUDA graph            |
| CUDA otherwise                         | F.linear           | SDPA      | CUDA graph per length |

``compile=True`` puts torch.compile into the last column. benchmarks/README.md has the measurements
behind the choices.
"""

import ctypes
import mmap
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.model import Attention, FeedForward, KVCache, Places, Transformer, swiglu
from llama.parallel import ColumnParallelLinear, RowParallelLinear

_M = TypeVar("_M", bound=nn.Module)

# --- CPU: linear layers -------------------------------------------------------------------------

# oneDNN lays the right-hand matrix of a product out anew in every call, and F.linear puts the
# weight there. In decoding that costs a third of the time.

_MAX_ROWS = 256  # at a time: what is between two products stays in the caches
_FEW_ROWS = 8  # up to which oneDNN may meet every number of them
_MIN_WEIGHT_BYTES = 2**20  # smaller ones stay in the caches, and F.linear starts sooner


def _in_parts(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The product for the rows of x [T, dim], some of them at a time, with zeros behind the last.

    oneDNN writes a program for every number of rows, which takes it 5 to 15 ms and up to a megabyte
    that it never gives back: here it meets 27 numbers.
    """
    if len(x) <= _FEW_ROWS:
        return product(x)[: len(x)].contiguous()
    results = []
    for rows in x.split(_MAX_ROWS):
        n_rows = len(rows)
        missing = -n_rows % (8 if n_rows <= 64 else 16)
        results.append(product(F.pad(rows, (0, 0, 0, missing)) if missing else rows)[:n_rows])
    return results[0].contiguous() if len(results) == 1 else torch.cat(results)


def _columns(rows: Tensor) -> Tensor:
    """[dim, T]. One row is taken twice: for a single column torch has another, slower kernel."""
    return rows.t() if len(rows) > 1 else rows.t().expand(-1, 2)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear``, for few numbers of rows."""
    if x.dim() != 2 or len(x) <= _FEW_ROWS:  # nothing to turn round: straight to it
        return F.linear(x, weight)
    return _in_parts(x, lambda rows: F.linear(rows, weight))


def weight_first(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` as weight @ x.T: the weight is the left-hand matrix, which oneDNN reads as it
    is."""
    if x.dim() != 2:
        return F.linear(x, weight)
    return _in_parts(x, lambda rows: torch.mm(weight, _columns(rows)).t())


def swiglu_weight_first(
    x: Tensor, w1: ColumnParallelLinear, w2: RowParallelLinear, w3: ColumnParallelLinear
) -> Tensor:
    """``model.swiglu`` with all three weights first. What is between them stays transposed, so that
    only the result has to be turned round."""
    if x.dim() != 2:
        return swiglu(x, w1, w2, w3)

    def product(rows: Tensor) -> Tensor:
        columns = _columns(rows)  # [dim, T]
        h = F.silu(torch.mm(w1.weight, columns), inplace=True).mul_(torch.mm(w3.weight, columns))
        return torch.mm(w2.weight, h).t()

    return w2.groups.all_reduce(_in_parts(x, product))


class Packed:
    """``F.linear`` with a second copy of the weight in the layout that oneDNN wants."""

    def __init__(self, weight: Tensor) -> None:
        self.source, self.version = weight, _version(weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight is not self.source or _version(weight) != self.version:
            return linear(x, weight)  # it was changed or moved since
        if x.dim() != 2:
            return F.linear(x, weight)
        product = torch.ops.mkldnn._linear_pointwise
        return _in_parts(x, lambda rows: product(rows, self.packed, None, "none", [], ""))


def _version(weight: Tensor) -> int:
    """Changes when the numbers do; tensors of inference mode do not count."""
    return 0 if weight.is_inference() else weight._version


# what ONEDNN_MAX_CPU_ISA may be set to (dnnl::cpu_isa in oneDNN's reference), but for AMX
_WITHOUT_BFLOAT16 = {
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
}
_WITHOUT_AMX = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def cpu_features() -> set[str]:
    """What Linux lists as features of the processor, less what oneDNN was told not to use."""
    if platform.system() != "Linux":
        return set()
    features = set(Path("/proc/cpuinfo").read_text().split())
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in _WITHOUT_BFLOAT16 | _WITHOUT_AMX:  # oneDNN takes no notice of other words
        features = {feature for feature in features if not feature.startswith("amx")}
    if limit in _WITHOUT_BFLOAT16:
        features.discard("avx512_bf16")
    return features


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has bfloat16 matrix instructions."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_features())


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the linear layers (but for small ones) will be held twice."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    features = cpu_features()
    return "avx512_bf16" in features and "amx_bf16" not in features


def _choose_linear(model: Transformer) -> None:
    if model.output.weight.dtype != torch.bfloat16:
        return
    features = cpu_features()
    packs = packs_weights(model.output.weight.device, torch.bfloat16)
    if not packs and "amx_bf16" not in features:
        return
    for layer in model.modules():
        if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
            continue
        if layer.weight.nbytes < _MIN_WEIGHT_BYTES:
            layer.linear = linear
        else:
            layer.linear = Packed(layer.weight) if packs else weight_first
    for ffn in _modules(model, FeedForward):
        if not packs and ffn.w1.weight.nbytes >= _MIN_WEIGHT_BYTES:
            ffn.compute = swiglu_weight_first


# --- CPU: memory --------------------------------------------------------------------------------


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for the next tensor of their size. By default it gives those of
    some MiB back to the system, which hands them out again page by page, filled with zeros: that
    is up to a third of a prompt's time. The process then stays as large as its largest pass.

    Returns:
        Whether this is glibc, and it will.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    return all(mallopt(option, 2**30) == 1 for option in (trim_threshold, mmap_threshold))


def ask_for_large_pages(model: nn.Module) -> None:
    """Ask Linux for pages of 2 MiB where weights are mapped from files and not read yet: with pages
    of 4 KiB, looking up addresses takes up to a tenth of a decoding step."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    for parameter in model.parameters():
        start = parameter.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = parameter.data_ptr() + parameter.nbytes - start
        ctypes.CDLL(None).madvise(  # advice only: what it answers does not matter
            ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE
        )


# --- CUDA: attention ----------------------------------------------------------------------------


def flash_attention(xq: Tensor, cache: KVCache, places: Places) -> Tensor:
    """``model.attention`` in one call of the flash kernel (Dao, 2023), for whole prompts, pieces
    of them and single tokens: it takes rows of unequal length, knows shared key heads, splits long
    rows over the device, and reads the lengths there, so that a CUDA graph can hold it."""
    # the cache as one sequence of max_batch_size * max_seq_len tokens [., K, D]
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (cache.k, cache.v))
    n_rows, max_length = len(places.used), cache.k.shape[2]
    row_starts = torch.arange(n_rows + 1, dtype=torch.int32, device=xq.device) * max_length
    longest = 1 if places.spans is None else max(s.length for s in places.spans)
    return _flash_kernel(
        xq, k, v, places.starts, row_starts, longest, places.length, seqused_k=places.used
    )


def _flash_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    seqused_k: Tensor,
) -> Tensor:
    # torch.nn.attention.varlen.varlen_attn offers seqused_k from torch 2.12 on; this is what it
    # calls, and what torch has had since 2.4. Its causal mask is aligned at the last token.
    outputs = torch.ops.aten._flash_attention_forward(
        q, k, v, starts_q, starts_k, longest_q, longest_k, 0.0, True, False, seqused_k=seqused_k
    )
    return outputs[0]


# --- One decoding step --------------------------------------------------------------------------


class Step(Protocol):
    """``Transformer.step``, or the same in another form."""

    def __call__(
        self, tokens: Tensor, positions: Tensor, length: int, *, masked: bool
    ) -> Tensor: ...


def accelerate(model: Transformer, *, compile: bool = False) -> Step:
    """Exchange layers and attention of a model whose weights are in place, and return its decoding
    step.

    Args:
        compile: run the step through torch.compile, which takes up to a minute at first use.
    """
    device, dtype = model.output.weight.device, model.output.weight.dtype
    if device.type == "cpu":
        keep_freed_memory()
        ask_for_large_pages(model)
        _choose_linear(model)
    flash = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    flash = flash and torch.cuda.get_device_capability(device) >= (8, 0)
    if flash:
        for layer in _modules(model, Attention):
            layer.attend = flash_attention
    step: Step = model.step
    if compile:
        step = _compiled(model)
    if device.type == "cuda":
        step = StaticStep(model, step, any_length=flash, capture=_cuda_graph)
    return step


def _modules(model: Transformer, kind: type[_M]) -> list[_M]:
    return [module for module in model.modules() if isinstance(module, kind)]


def rotate_real(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """``model.rotate`` in real numbers: torch.compile does not fuse complex ones."""
    cos, sin = torch.view_as_real(freqs_cis)[:, None].unbind(-1)  # [S, 1, D / 2] each
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., S, H, D / 2] each
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _compiled(model: Transformer) -> Step:
    """One program for a single row, tuned for it, and one for every other number of rows; both for
    every length."""
    for layer in _modules(model, Attention):
        layer.rotate = rotate_real
    # what is complex is the table alone, and only seen as pairs of real numbers
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    on_cuda = model.output.weight.device.type == "cuda"
    mode = "max-autotune-no-cudagraphs" if on_cuda else "default"
    one = torch.compile(model.step, fullgraph=True, dynamic=True, mode=mode)
    many = torch.compile(model.step, fullgraph=True, dynamic=True)

    def step(tokens: Tensor, positions: Tensor, length: int, *, masked: bool) -> Tensor:
        if len(tokens) == 1:
            return one(tokens, positions, length, masked=masked)
        return many(tokens, positions, length, masked=True)

    return step


class StaticStep:
    """A step whose sizes take few values and whose tensors stay in place, for each of which it is
    captured once and then replayed.

    The rows are rounded up to a power of two; the rows behind the batch are computed and dropped.
    So is the length, unless attention reads the lengths on the device.

    Args:
        capture: takes a function, and returns one that computes the same into the same tensor.
    """

    def __init__(
        self,
        model: Transformer,
        step: Step,
        *,
        any_length: bool,
        capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]],
    ) -> None:
        self._model, self._step, self._capture = model, step, capture
        self._any_length = any_length
        self._captured: dict[tuple[int, int], tuple[Tensor, Tensor, Callable[[], object], Tensor]]
        self._captured = {}
        self._cache: object = None

    def __call__(self, tokens: Tensor, positions: Tensor, length: int, *, masked: bool) -> Tensor:
        args = self._model.params
        n_rows = _round_up(len(tokens), args.max_batch_size)
        length = args.max_seq_len if self._any_length else _round_up(length, args.max_seq_len, 256)
        if self._model.cache is not self._cache:  # it has moved, and what was captured knows where
            self._captured.clear()
            self._cache = self._model.cache
        if (n_rows, length) not in self._captured:
            self._captured[n_rows, length] = self._new(n_rows, length, tokens, positions)
        all_tokens, all_positions, replay, logits = self._captured[n_rows, length]
        all_tokens[: len(tokens)] = tokens
        all_positions[: len(tokens)] = positions
        replay()
        return logits[: len(tokens)]

    def _new(
        self, n_rows: int, length: int, tokens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[], object], Tensor]:
        # Capturing runs the step: it must write into the cache what belongs there. A row behind
        # the batch writes to its position 0, which the next prompt of that row writes again.
        all_tokens, all_positions = tokens.new_zeros(n_rows), positions.new_zeros(n_rows)
        all_tokens[: len(tokens)] = tokens
        all_positions[: len(tokens)] = positions
        replay, logits = self._capture(
            lambda: self._step(all_tokens, all_positions, length, masked=not self._any_length)
        )
        return all_tokens, all_positions, replay, logits


def _round_up(n: int, limit: int, least: int = 1) -> int:
    """The next power of two from ``least`` on, at most ``limit``."""
    return min(max(least, 1 << (n - 1).bit_length()), limit)


def _cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Capture a function as a CUDA graph (collective calls of NCCL included)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries and compilers set themselves up before the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # NCCL's own thread may call CUDA meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output
