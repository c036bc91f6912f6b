"""The tensors of quantized layers in Hugging Face folders, read as QuantizedWeight.

compressed-tensors' ``pack-quantized`` has our layout: without conversion, its tensors stay mapped.
AWQ's is transposed and in another order. Files aren't trusted: every tensor's shape and dtype is
checked before any is read.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.huggingface import halves_as_pairs, huggingface_key
from llama.checkpoint.quantization_config import Quantization, Scheme
from llama.checkpoint.sharding import ShardSpec, Slices, is_linear, local_slices
from llama.checkpoint.tensor_files import is_plain
from llama.files import listed
from llama.pages import release_pages
from llama.quantize import GROUP, Bits, QuantizedWeight, unpack

_SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTEGERS = (torch.int32,)
_CHUNK_BYTES = 2**20
# AWQ stores output 8 i + c of a row of 4-bit integers at the position _AWQ_ORDER[c] of word i.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class _Expected(NamedTuple):
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


class StoredWeight(ABC):
    """A quantized layer in a file, whose weight is [n, k].

    Attributes:
        layer: its name in the file.
        tensors: by their names after the layer's; not checked until ``faults`` was called.
    """

    names: ClassVar[tuple[str, ...]]

    def __init__(self, layer: str, scheme: Scheme, tensors: dict[str, Any]) -> None:
        self.layer, self.scheme, self.tensors = layer, scheme, tensors

    @abstractmethod
    def expected(self, n: int, k: int) -> dict[str, _Expected]: ...

    @abstractmethod
    def read(self, n: int, k: int, part: Slices) -> QuantizedWeight:
        """A part of the weight, its rows in the file's order. The columns are whole groups."""

    @property
    @abstractmethod
    def scale(self) -> tuple[str, Tensor]:
        """The scales and their name in the file."""

    def faults(self, spec: ShardSpec, name: str) -> Iterator[str]:
        """All faults of the tensors of a weight, in the file or folder ``name``."""
        n, k = spec.sizes
        group = self.scheme.group or GROUP
        if k % group:
            yield (
                f"{self.layer} in {name!r} is quantized in groups of {group} columns, but has {k}: "
                "expected a multiple"
            )
            return
        wanted = self.expected(n, k)
        if missing := wanted.keys() - self.tensors.keys():
            keys = listed(f"{self.layer}.{part}" for part in sorted(missing))
            yield f"{name!r} lacks {keys} of a quantized layer: download it again"
        if extra := self.tensors.keys() - wanted.keys():
            keys = listed(f"{self.layer}.{part}" for part in sorted(extra))
            yield f"{name!r} has {keys}, which {self.scheme} doesn't need: download it again"
        for part, (dtypes, shape) in wanted.items():
            if part not in self.tensors:
                continue
            tensor, shown = self.tensors[part], f"{self.layer}.{part} in {name!r}"
            if not is_plain(tensor):
                yield f"{shown} isn't a dense tensor: {type(tensor).__name__}"
            elif tensor.dtype not in dtypes:
                names = " or ".join(str(dtype) for dtype in dtypes)
                yield f"{shown} is {tensor.dtype}, expected {names}"
            elif tensor.shape != shape:
                yield (
                    f"{shown} has the shape {tuple(tensor.shape)}, expected {shape} for "
                    f"{self.scheme}: is config.json of another model?"
                )
            elif part == "weight_shape" and tensor.tolist() != [n, k]:
                yield f"{shown} is {tensor.tolist()}, expected [{n}, {k}]"

    def n_not_finite(self) -> int:
        """The number of scales that are infinite or not a number."""
        return int((~torch.isfinite(self.scale[1])).sum())

    def release(self) -> None:
        """Release the mapped pages."""
        for tensor in self.tensors.values():
            release_pages(tensor)

    def _per_group(self, values: Tensor, k: int, columns: tuple[int, int]) -> Tensor:
        """Values [rows, the file's groups], for our groups in ``columns``."""
        n_copies = (self.scheme.group or k) // GROUP
        start, stop = columns[0] // GROUP, columns[1] // GROUP
        if n_copies > 1:
            values = values.repeat_interleave(n_copies, dim=1)
        return values[:, start:stop].contiguous()


class _CompressedTensors(StoredWeight):
    names = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def expected(self, n: int, k: int) -> dict[str, _Expected]:
        bits, n_groups = self.scheme.bits, k // (self.scheme.group or k)
        wanted = {
            "weight_packed": _Expected(_INTEGERS, (n, k * bits // 32)),
            "weight_scale": _Expected(_SCALE_DTYPES, (n, n_groups)),
            "weight_shape": _Expected((torch.int64, torch.int32), (2,)),
        }
        if not self.scheme.symmetric:
            # packed along the other axis, with padding
            words = -(-n * bits // 32)
            wanted["weight_zero_point"] = _Expected(_INTEGERS, (words, n_groups))
        return wanted

    @property
    def scale(self) -> tuple[str, Tensor]:
        return f"{self.layer}.weight_scale", self.tensors["weight_scale"]

    def read(self, n: int, k: int, part: Slices) -> QuantizedWeight:
        bits, ((row, end_row), columns) = self.scheme.bits, part
        first, last = (column * bits // 32 for column in columns)
        packed = self.tensors["weight_packed"][row:end_row, first:last].contiguous()
        scale = self._per_group(self.tensors["weight_scale"][row:end_row], k, columns)
        zero = None
        if not self.scheme.symmetric:
            points = unpack(self.tensors["weight_zero_point"].T, bits)[:, row:end_row].T
            zero = self._per_group(points, k, columns)
        shape = (end_row - row, columns[1] - columns[0])
        return QuantizedWeight(bits, shape, packed, scale, zero)


class _Awq(StoredWeight):
    names = ("qweight", "qzeros", "scales")

    def expected(self, n: int, k: int) -> dict[str, _Expected]:
        n_groups, words = k // (self.scheme.group or k), -(-n // 8)
        return {
            "qweight": _Expected(_INTEGERS, (k, words)),
            "qzeros": _Expected(_INTEGERS, (n_groups, words)),
            "scales": _Expected(_SCALE_DTYPES, (n_groups, n)),
        }

    @property
    def scale(self) -> tuple[str, Tensor]:
        return f"{self.layer}.scales", self.tensors["scales"]

    def read(self, n: int, k: int, part: Slices) -> QuantizedWeight:
        (row, end_row), columns = part
        words = (row // 8, -(-end_row // 8))
        inner = slice(row - 8 * words[0], end_row - 8 * words[0])
        qweight = self.tensors["qweight"][columns[0] : columns[1], words[0] : words[1]]
        packed = torch.empty(8 * qweight.shape[1], len(qweight) // 8, dtype=torch.int32)
        shifts = 4 * torch.arange(8, dtype=torch.int32)[:, None]
        step = max(1, _CHUNK_BYTES // (4 * qweight.shape[1]) // GROUP) * GROUP
        for start in range(0, len(qweight), step):
            chunk = qweight[start : start + step].unflatten(0, (-1, 8))
            for c, position in enumerate(_AWQ_ORDER):
                # the integers of outputs c, c + 8, ...; those of 8 inputs become a word
                integers = (chunk >> 4 * position & 15) << shifts
                words_of_c = integers.sum(1, dtype=torch.int32).T
                packed[c::8, start // 8 : start // 8 + len(chunk)] = words_of_c
        points = _in_order(self.tensors["qzeros"][:, words[0] : words[1]])[:, inner].T
        zero = self._per_group(points, k, columns)
        scale = self._per_group(self.tensors["scales"][:, row:end_row].T, k, columns)
        return QuantizedWeight(4, (end_row - row, len(qweight)), packed[inner], scale, zero)


def _in_order(words: Tensor) -> Tensor:
    """uint8 [rows, 8 * words] of AWQ's int32 words."""
    return unpack(words, 4).unflatten(1, (-1, 8))[:, :, _AWQ_ORDER].flatten(1)


_KINDS: dict[str, type[StoredWeight]] = {"compressed-tensors": _CompressedTensors, "awq": _Awq}


def gather_quantized(
    tensors: dict[str, Any], specs: dict[str, ShardSpec], quantization: Quantization
) -> None:
    """Replace the tensors of every quantized layer by one StoredWeight, under its native key.

    Layers that only have a plain weight aren't quantized, whatever the config says. Tensors that
    the config doesn't account for stay, and are reported as unknown.
    """
    kind = _KINDS[quantization.method]
    for key, spec in specs.items():
        layer = huggingface_key(key).removesuffix(".weight")
        names = {part: f"{layer}.{part}" for part in kind.names}
        found = {part: name for part, name in names.items() if name in tensors}
        if not is_linear(key, spec) or not found or key in tensors:
            continue
        if scheme := quantization.scheme(layer):
            parts = {part: tensors.pop(name) for part, name in found.items()}
            tensors[key] = kind(layer, scheme, parts)


def with_rows(weight: QuantizedWeight, order: Callable[[Tensor], Tensor]) -> QuantizedWeight:
    """A weight whose rows are reordered."""
    packed, scale, zero = (
        None if x is None else order(x).reshape(x.shape)
        for x in (weight.packed, weight.scale, weight.zero)
    )
    assert packed is not None
    assert scale is not None
    return weight._replace(packed=packed, scale=scale, zero=zero)


def read_part(
    stored: StoredWeight, spec: ShardSpec, part: Slices, head_dim: int | None
) -> QuantizedWeight:
    """A part of a layer's weight.

    Args:
        head_dim: its rows are whole heads of this size in Hugging Face's order; None for others.

    Raises:
        ValueError: a scale isn't finite.
    """
    n, k = spec.sizes
    weight = stored.read(n, k, part)
    if not torch.isfinite(weight.scale).all():
        raise ValueError(f"{stored.scale[0]} holds scales that aren't finite: download it again")
    if head_dim is not None:
        weight = with_rows(weight, lambda x: halves_as_pairs(x, head_dim))
    return weight


def check_groups(specs: Mapping[str, ShardSpec], keys: Iterable[str]) -> None:
    """Raise ValueError if a tensor has a part of a group, which compressed-tensors can't store."""
    for key in keys:
        if specs[key].sizes[1] % GROUP:
            raise ValueError(
                f"{key} has {specs[key].sizes[1]} columns, and can't be stored in groups of "
                f"{GROUP}: give quantize to build instead"
            )


def stored_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of compressed-tensors' format for a symmetric weight, by their names."""
    return {
        f"{name}_packed": weight.packed,
        f"{name}_scale": weight.scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }


def check_quantize(ckpt: Checkpoint, quantize: Bits | None, adapter: object = None) -> None:
    """Raise ValueError if a folder is quantized, and would have to be quantized otherwise or to
    take an adapter."""
    found = ckpt.quantization
    if found is None:
        return
    what = f"{str(ckpt.folder)!r} is quantized ({found})"
    if quantize not in (None, found.bits):
        raise ValueError(
            f"{what}, but quantize is 'int{quantize}': leave it out, or give the folder of the "
            "unquantized model"
        )
    if adapter is not None:
        raise ValueError(
            f"{what}, and an adapter can't be merged into quantized weights: give the folder of "
            f"the unquantized model and quantize='int{found.bits}'"
        )


def valid_cuts(specs: Sequence[ShardSpec], sizes: Iterable[int]) -> list[int]:
    """Those of some numbers of ranks whose cuts don't split groups of these quantized tensors."""

    def is_valid(n_ranks: int) -> bool:
        return all(
            column % GROUP == 0
            for spec in specs
            for rank in range(n_ranks)
            for column in local_slices(spec, n_ranks, rank)[1]
        )

    return list(filter(is_valid, sizes))
