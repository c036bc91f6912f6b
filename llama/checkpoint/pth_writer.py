"""Write ``.pth`` shards one tensor at a time."""

import collections
import ctypes
import io
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_WRITE_BYTES = 16 * 2**20
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}


class _Storage(NamedTuple):
    number: int
    dtype: torch.dtype
    size: int


class _Entry(NamedTuple):
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Pickles a dict of _Entry as torch.save pickles a dict of contiguous tensors."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Entry):
            return NotImplemented
        stride, strides = 1, []
        for size in reversed(obj.shape):
            strides.append(stride)
            stride *= size
        rebuild = torch._utils._rebuild_tensor_v2
        hooks: dict[Any, Any] = collections.OrderedDict()
        return rebuild, (obj.storage, 0, obj.shape, tuple(reversed(strides)), False, hooks)

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        return "storage", _STORAGES[obj.dtype], str(obj.number), "cpu", obj.size


class PthWriter:
    """Writes torch.save's format one tensor at a time; torch.save needs all tensors in memory.

    The file is a zip archive of stored members: ``data.pkl``, and ``data/0``, ``data/1``, ... with
    the bytes of each tensor, aligned to 64 bytes so that they can be memory-mapped.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._entries: dict[str, _Entry] = {}

    def __enter__(self) -> "PthWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            data = io.BytesIO()
            _Pickler(data, protocol=2).dump(self._entries)
            self._write("data.pkl", iter([data.getvalue()]), data.tell())
            order = sys.byteorder.encode()
            self._write("byteorder", iter([order]), len(order))
            self._write("version", iter([b"3\n"]), 2)
        self._zip.close()

    def add(self, key: str, tensor: Tensor) -> None:
        tensor = tensor.contiguous()
        storage = _Storage(len(self._entries), tensor.dtype, tensor.numel())
        self._write(f"data/{storage.number}", _bytes_of(tensor), tensor.nbytes)
        self._entries[key] = _Entry(storage, tuple(tensor.shape))

    def _write(self, name: str, pieces: Iterator[Any], size: int) -> None:
        info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so that the bytes are reproducible
        info.file_size = size
        assert self._zip.fp is not None
        # 30 bytes of header, the name, 20 bytes of zip64 sizes, and an extra field as padding
        start = self._zip.fp.tell() + 30 + len(info.filename) + 20 + 4
        padding = -start % 64
        info.extra = b"FB" + padding.to_bytes(2, "little") + bytes(padding)
        with self._zip.open(info, "w", force_zip64=True) as member:
            for piece in pieces:
                member.write(piece)


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor, in pieces."""
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    view = memoryview(array).cast("B")
    for start in range(0, len(view), _WRITE_BYTES):
        yield view[start : start + _WRITE_BYTES]
