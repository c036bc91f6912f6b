"""Open a file of tensors, memory-mapped: safetensors, or a dict of tensors written by torch.save.

Files aren't trusted: the size of a safetensors header is limited, and a pickle is checked to hold
only tensors before torch.load opens it.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint import pth_safety
from llama.checkpoint.huggingface import import_safetensors
from llama.files import check_regular, summary, what_to_do

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST_HEADER = 2**20  # bytes; 405B's, if in one file, would have 0.15 million


def open_file(path: Path) -> dict[str, Any]:
    """The tensors of a file by key, unchecked; a pickle may hold other values.

    Raises:
        ImportError: the package safetensors is needed and missing.
        ValueError: the file is damaged, or holds more than a dict of tensors.
    """
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = import_safetensors()
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > _LARGEST_HEADER:
            raise ValueError(f"its header has {size:,} bytes, expected at most {_LARGEST_HEADER:,}")
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # a damaged file can make the library raise anything
        raise ValueError(
            f"{str(path)!r} can't be read as a safetensors file ({summary(error)}): "
            f"{what_to_do(path)}"
        ) from error


def _open_pickle(path: Path) -> dict[str, Any]:
    try:
        check_regular(path)
        with path.open("rb") as file:
            byte_order = pth_safety.check(file)
            # by its descriptor: the path may name another file by now. Windows has no /dev/fd, but
            # doesn't let open files be replaced.
            opened = f"/dev/fd/{file.fileno()}"
            opened = opened if os.path.exists(opened) else str(path)
            tensors = torch.load(opened, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except pth_safety.UnsafeFileError as error:
        raise ValueError(
            f"{str(path)!r} was not loaded: {error}; expected a dict of dense tensors. Compare it "
            "with checklist.chk, and ask where it came from"
        ) from None
    except MemoryError as error:
        raise MemoryError(f"{str(path)!r} needs more memory than is available") from error
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise ValueError(
            f"{str(path)!r} can't be read as a checkpoint ({summary(error)}): {what_to_do(path)}"
        ) from error
    if byte_order != sys.byteorder:  # torch would have swapped bytes in pages that we release
        raise ValueError(
            f"{str(path)!r} is {byte_order!r:.20}-endian and this machine {sys.byteorder!r}: save "
            "it again on a machine like this one"
        )
    if not isinstance(tensors, dict):
        raise ValueError(f"{str(path)!r} holds a {type(tensors).__name__}, expected a dict")
    if strange := [key for key in tensors if not isinstance(key, str)]:
        raise ValueError(f"{str(path)!r} has the key {strange[0]!r:.80}, expected names of tensors")
    return tensors


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is dense, with a storage at least as large as its shape."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_neg()
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )
