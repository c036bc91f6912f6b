"""The C kernels of ``csrc``, through ctypes.

They are built when the package is installed, if there is a C compiler, for all instruction sets of
the architecture; the best that the processor has is chosen here. Their OpenMP threads are torch's:
the library has no OpenMP runtime of its own, and takes the one that torch has loaded.
"""

import ctypes
import dataclasses
import functools
import os
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama import quantize as plain
from llama.accel import features
from llama.attention import attention
from llama.cache import Batch, Decode, KVCache
from llama.files import summary
from llama.pages import use_huge_pages
from llama.quantize import Bits, QuantizedWeight

# Instruction sets, the fastest first, and the features of /proc/cpuinfo that they need.
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}
INSTRUCTION_SETS = {
    "avx512bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx2": _AVX2,
    "neon": {"asimd", "asimddp", "asimdhp"},
}
_LANES = {"avx512bf16": 16, "avx512": 16, "avx2": 8, "neon": 4}
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
HALF = (torch.bfloat16, torch.float16)
_TILE = 16  # rows, see csrc/quantized.h
_MAX_HEAD_DIM = 256  # larger ones aren't tested
_VARIABLE = "LLAMA_KERNELS"
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "products": [_POINTER, _LONG, _INT, _INT, _LONG, _POINTER, _LONG],
    "decode_step": [_POINTER, _LONG, *[_POINTER] * 3, _LONG, *[_POINTER] * 5],
    "decode_attention": [
        *(_POINTER, _POINTER, _POINTER, _INT, _POINTER),
        *(_LONG, _LONG, _LONG, _LONG, _LONG, _POINTER),
    ],
    "quantize": [_POINTER, _INT, _LONG, _LONG, _INT, _POINTER, _POINTER],
    "interleave": [_POINTER, _LONG, _LONG, _INT, _POINTER],
}


Form = tuple[int, int]  # of a matrix: the bits of its integers, or 16; the kind of its floats


class Matrix(ctypes.Structure):
    """``matrix`` of csrc/types.h: addresses, valid while the tensors live."""

    _fields_ = [*((name, _POINTER) for name in ("weight", "scale", "zero", "y")), ("n", _LONG)]

    @classmethod
    def of(
        cls, weight: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, n: int = 0
    ) -> "Matrix":
        """``n``: rows, if ``weight`` is in tiles."""
        tensors = (weight, scale, zero)
        addresses = (None if x is None else x.data_ptr() for x in tensors)
        return cls(*addresses, None, n or len(weight))


@functools.cache
def _library() -> "ctypes.CDLL | str":
    """The compiled kernels, or why there are none."""
    folder = Path(__file__).parent
    for path in (folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES):
        if path.is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError as error:
                remedy = "install the package again, on Linux with gcc"
                return f"{path.name} can't be loaded ({summary(error)}): {remedy}"
    return "the kernels aren't built: install the package again where there is a C compiler"


@functools.cache
def _choose() -> tuple[str | None, str | None]:
    """The instruction set, or None and why the kernels can't be used."""
    wanted = os.environ.get(_VARIABLE, "")
    if wanted not in ("", "none", *INSTRUCTION_SETS):
        raise ValueError(
            f"{_VARIABLE} is {wanted!r}, expected none or one of {', '.join(INSTRUCTION_SETS)}"
        )
    if wanted == "none":
        return None, f"{_VARIABLE} is none"
    found = features.cpu_features()
    usable = [name for name, needed in INSTRUCTION_SETS.items() if needed <= found]
    library = _library()
    if usable and isinstance(library, str):
        return None, library
    for name in usable:
        if wanted in ("", name) and hasattr(library, f"products_{name}"):
            return name, None
    which = " or ".join(INSTRUCTION_SETS) if wanted == "" else wanted
    return None, f"the processor, or this build of the kernels, lacks {which}"


def instruction_set() -> str | None:
    """The name of the instruction set that the kernels use; None if there are no kernels."""
    return _choose()[0]


def form() -> str | None:
    """The kernels' form of a linear layer, as in ``Ways``; None if there are no kernels."""
    instructions = instruction_set()
    return None if instructions is None else f"C kernels, {instructions}"


def why_not() -> str | None:
    """Why the kernels can't be used, if so.

    Raises:
        ValueError: LLAMA_KERNELS isn't an instruction set.
    """
    return _choose()[1]


def is_switched_off() -> bool:
    return os.environ.get(_VARIABLE) == "none"


@functools.cache
def _function(name: str, instructions: str) -> Callable[..., int]:
    function = getattr(_library(), f"{name}_{instructions}")
    function.argtypes = _ARGUMENTS[name]
    return function


def run(name: str, *arguments: Any) -> None:
    """Call a kernel. Tensors are passed by address: dense, and alive until it returns."""
    instructions = instruction_set()
    assert instructions is not None
    torch.get_num_threads()  # makes set_num_threads apply to this thread too
    values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    result = _function(name, instructions)(*values)
    if result == -1:
        raise MemoryError(f"the kernel {name} has no memory for its copy of the activations")
    if result == -2:
        raise ValueError("a sequence is longer than the cache")


def can_run(*tensors: Tensor) -> bool:
    """Whether the kernels can read these tensors; else, or for gradients, torch's functions run."""
    if instruction_set() is None or not all(x.is_cpu for x in tensors):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


# --- Linear layers ------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``F.linear``; 16-bit weights are read without conversion, and sums are float32."""
    if torch.compiler.is_compiling():
        return _linear_op(x, weight)
    form = half_form(weight)
    if form is None or x.shape[-1:] != weight.shape[1:] or not can_run(x, weight):
        return F.linear(x, weight.to(x.dtype))
    return _product(x, Matrix.of(weight), form, len(weight))


def half_form(weight: Tensor) -> Form | None:
    """The format of a matrix that the kernels read as it is; else None."""
    is_dense = weight.dtype in HALF and weight.is_contiguous() and weight.is_cpu
    return (16, KINDS[weight.dtype]) if is_dense else None


def _product(x: Tensor, matrix: Matrix, form: Form, n: int) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = rows.new_empty(len(rows), n)
    matrix.y = y.data_ptr()
    run("products", ctypes.byref(matrix), 1, *form, rows.shape[1], rows, len(rows))
    return y.view(*x.shape[:-1], n).to(x.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class TiledLinear:
    """``QuantizedLinear`` by a kernel, on a copy of the weight in the kernel's order.

    Its tensors' numbers may change, but not their storage: ``KernelStep`` keeps the addresses.
    """

    bits: Bits
    shape: tuple[int, int]
    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    @classmethod
    def of(cls, weight: QuantizedWeight) -> "TiledLinear":
        """Raises ValueError if a tensor's shape doesn't follow from the weight's."""
        n, k = weight.shape
        n_groups = -(-k // plain.GROUP)
        widths = {"packed": n_groups * weight.bits, "scale": n_groups, "zero": n_groups}
        for name, width in widths.items():
            x = getattr(weight, name)
            if x is not None and x.shape != (n, width):
                raise ValueError(f"{name} is {[*x.shape]}, expected {[n, width]} for {n} x {k}")
        packed, scale = _interleave(weight.packed), _interleave(weight.scale)
        zero = None if weight.zero is None else _interleave(weight.zero)
        return cls(weight.bits, weight.shape, packed, scale, zero)

    @property
    def form(self) -> Form:
        return self.bits, KINDS[self.scale.dtype]

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed, self.scale, self.zero

    @property
    def matrix(self) -> Matrix:
        return Matrix.of(*self.parts, self.shape[0])

    def __call__(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return _quantized_op(x, self.packed, self.scale, self.zero, *self.form, self.shape[0])
        if x.shape[-1:] != self.shape[1:] or not can_run(x, self.packed):
            return F.linear(x, self.dequantize(x.dtype))
        return _product(x, self.matrix, self.form, self.shape[0])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See ``QuantizedWeight``."""
        zero = None if self.zero is None else self._rows_of(self.zero)
        packed, scale = self._rows_of(self.packed), self._rows_of(self.scale)
        return QuantizedWeight(self.bits, self.shape, packed, scale, zero).dequantize(dtype)

    def _rows_of(self, tiles: Tensor) -> Tensor:
        return tiles.transpose(1, 2).flatten(0, 1)[: self.shape[0]]


def _interleave(rows: Tensor) -> Tensor:
    """[N, W] as [N / 16, W, 16], padded with zeros."""
    n, width = rows.shape
    tiles = torch.empty(-(-n // _TILE), width, _TILE, dtype=rows.dtype)
    use_huge_pages(tiles)
    run("interleave", rows.contiguous(), n, width, rows.element_size(), tiles)
    return tiles


def quantize(weight: Tensor, bits: Bits) -> QuantizedWeight:
    """``llama.quantize.quantize``, by the kernel where there is one."""
    if instruction_set() is None or weight.dtype not in KINDS or weight.device.type != "cpu":
        return plain.quantize(weight, bits)
    n, k = weight.shape
    n_groups = -(-k // plain.GROUP)
    packed = torch.empty(n, n_groups * bits, dtype=torch.int32)
    scale = torch.empty(n, n_groups, dtype=torch.bfloat16)
    kind = KINDS[weight.dtype]
    run("quantize", weight.contiguous(), kind, n, k, bits, packed, scale)
    return QuantizedWeight(bits, (n, k), packed, scale)


# --- Attention ----------------------------------------------------------------------------------


def decode_attention(q: Tensor, cache: KVCache, batch: Batch) -> Tensor:
    """``attention``, of decoding steps by a kernel."""
    if not isinstance(batch, Decode):
        return attention(q, cache, batch)
    if torch.compiler.is_compiling():
        return _attention_op(q, cache.k, cache.v, batch.seqlens_k)
    n_slots, n_kv_heads, _, head_dim = cache.k.shape
    fits = len(q) <= n_slots and q.shape[1] % n_kv_heads == 0 and q.shape[2] == head_dim
    is_dense = cache.k.is_contiguous() and cache.v.is_contiguous()
    is_dense = is_dense and cache.k.dtype == cache.v.dtype and cache.k.dtype in KINDS
    if not (fits and is_dense and can_attend(head_dim) and can_run(q, cache.k, cache.v)):
        return attention(q, cache, batch)
    return _decode_attention(q, cache.k, cache.v, batch.seqlens_k)


def can_attend(head_dim: int) -> bool:
    """Whether ``decode_attention`` supports heads of this size."""
    instructions = instruction_set()
    return (
        instructions is not None
        and head_dim % _LANES[instructions] == 0
        and head_dim <= _MAX_HEAD_DIM
    )


def _decode_attention(q: Tensor, k: Tensor, v: Tensor, seqlens_k: Tensor) -> Tensor:
    n_rows, n_heads, head_dim = q.shape
    n_kv_heads, max_seq_len = k.shape[1], k.shape[2]
    queries = q.float().contiguous()
    y = torch.empty_like(queries)
    sizes = n_rows, n_kv_heads, n_heads // n_kv_heads, max_seq_len, head_dim
    run("decode_attention", queries, k, v, KINDS[k.dtype], seqlens_k.int().contiguous(), *sizes, y)
    return y.to(q.dtype)


# --- For torch.compile, which can't trace ctypes ------------------------------------------------


def _as_op(name: str, function: Callable[..., Tensor], like: Callable[..., Tensor]) -> Any:
    op = torch.library.custom_op(f"llama::{name}", function, mutates_args=())
    op.register_fake(like)
    return op


def _linear_eagerly(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight)


def _quantized_eagerly(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: int, n: int
) -> Tensor:
    return _product(x, Matrix.of(packed, scale, zero, n), (bits, kind), n)


_linear_op = _as_op(
    "linear", _linear_eagerly, lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0])
)
_quantized_op = _as_op(
    "quantized_linear",
    _quantized_eagerly,
    lambda x, packed, scale, zero, bits, kind, n: x.new_empty(*x.shape[:-1], n),
)
_attention_op = _as_op(
    "decode_attention", _decode_attention, lambda q, k, v, seqlens_k: q.new_empty(q.shape)
)
