"""Native checkpoint folders: find the shards, read params.json, load one rank's tensors.

A folder holds ``consolidated.00.pth`` ... ``consolidated.{M-1:02d}.pth``, one dict of tensors for
each of M model-parallel ranks, and ``params.json``. Rank and size are arguments here, so nothing
needs a process group. Files are not trusted: only tensors are unpickled, and every key, shape and
dtype is checked.
"""

import ctypes
import json
import mmap
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama.model import ModelArgs

# In Llama 2's files, and no parameter: RoPE's frequencies follow from params.json.
IGNORED_KEYS = {"rope.freqs"}
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# params.json of Llama 2 has no rope_theta: 10000 is what it was trained with.
LLAMA2_ROPE_THETA = 10000.0
# Longest context each generation was trained for, told by its rotary embedding.
LLAMA31_CONTEXT = 131072
CONTEXTS = {10000.0: 4096, 500000.0: 8192}
_CHUNK_BYTES = 64 * 2**20


def find_shards(folder: str) -> list[Path]:
    """The shards of a checkpoint folder, in order of rank.

    Raises:
        FileNotFoundError: there is no such folder, no shard in it, or one is missing.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint folder at {folder!r}: give ckpt_dir, the folder that holds "
            "consolidated.00.pth and params.json"
        )
    shards = sorted(path.glob("consolidated.*.pth"))
    names = [shard.name for shard in shards]
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(shards))]
    if not shards:
        present = sorted(p.name for p in path.iterdir())
        raise FileNotFoundError(
            f"{folder!r} holds no consolidated.00.pth, but {', '.join(present[:8]) or 'nothing'}"
            f"{', ...' if len(present) > 8 else ''}: expected a folder in Meta's native layout"
        )
    if names != expected:
        missing = sorted(set(expected) - set(names))
        raise FileNotFoundError(
            f"{folder!r} holds {', '.join(names)}, but not {', '.join(missing)}: download it again"
        )
    return shards


def read_params(folder: str, n_words: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """ModelArgs of a folder's params.json for a tokenizer of ``n_words`` and a cache of this size.

    Raises:
        FileNotFoundError: there is no params.json.
        ValueError: it cannot be read, has an unknown or impossible value, does not go with the
            tokenizer, or ``max_seq_len`` is longer than the context of this model.
    """
    path = Path(folder) / "params.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(path)!r} is missing: download it again") from error
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is {found!r:.60}, expected an object of model parameters")
    sizes = {"max_seq_len": max_seq_len, "max_batch_size": max_batch_size}
    known = ModelArgs.__dataclass_fields__.keys() - sizes.keys()
    if unknown := sorted(found.keys() - known):
        raise ValueError(
            f"{str(path)!r} has the unknown parameter(s) {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    params: dict[str, Any] = {"rope_theta": LLAMA2_ROPE_THETA} | found
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = n_words
    try:
        args = ModelArgs(**(params | sizes))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} or an argument of build: {error}") from None
    if args.vocab_size != n_words:
        raise ValueError(
            f"{folder!r} was trained on {args.vocab_size} tokens, but the tokenizer has {n_words}: "
            "give the tokenizer.model that was downloaded with these weights"
        )
    context = LLAMA31_CONTEXT if args.use_scaled_rope else CONTEXTS.get(args.rope_theta)
    if context is not None and max_seq_len > context:
        raise ValueError(
            f"max_seq_len is {max_seq_len}, but this model was trained for at most {context} tokens"
        )
    return args


def load_shard(
    path: Path,
    expected: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
) -> dict[str, Tensor]:
    """Tensors of one shard, with ``dtype`` and on ``device``.

    The file is mapped, not read. A tensor that is right as it is stays mapped; of the others a copy
    is made, piece by piece, and the pages it came from are given back at once, so that memory holds
    little more than the result.

    Args:
        expected: what the shard must hold: a tensor (on "meta", say) of the right shape by its key.
        progress: show a bar on stderr if it takes more than a second.

    Raises:
        ValueError: the file cannot be read or does not hold exactly this; the message says where.
    """
    tensors = _open(path)
    _check(path, tensors, expected)
    total = sum(tensors[key].nbytes for key in expected)
    users = Counter(tensors[key].untyped_storage().data_ptr() for key in expected)
    loaded = {}
    with tqdm(
        total=total,
        desc=f"Loading {path.name}",
        unit="B",
        unit_scale=True,
        delay=1,
        disable=not progress,
    ) as bar:
        for key in expected:
            source = tensors.pop(key)
            alone = users[source.untyped_storage().data_ptr()] == 1
            loaded[key] = _converted(source, dtype, device, release=alone)
            bar.update(source.nbytes)
    return loaded


def _open(path: Path) -> dict[str, Any]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds more than tensors, or is damaged, and was not loaded: compare it "
            f"with checklist.chk or download it again ({str(error).splitlines()[0]})"
        ) from error
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise ValueError(
            f"{str(path)!r} is no readable checkpoint (an incomplete download?): compare it with "
            f"checklist.chk or download it again ({repr(error).splitlines()[0]})"
        ) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{str(path)!r} holds a {type(tensors).__name__}, expected a dict")
    return tensors


def _check(path: Path, tensors: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    def listed(keys: set[str]) -> str:
        names = sorted(map(str, keys))
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    if missing := expected.keys() - tensors.keys():
        raise ValueError(f"{str(path)!r} lacks {listed(missing)}: does params.json belong to it?")
    if unknown := tensors.keys() - expected.keys() - IGNORED_KEYS:
        raise ValueError(
            f"{str(path)!r} has the unknown key(s) {listed(unknown)}: does params.json belong to "
            "it?"
        )
    for key, wanted in expected.items():
        tensor = tensors[key]
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"{key} in {str(path)!r} is no dense tensor: {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{key} in {str(path)!r} is {tensor.dtype}, expected bfloat16, float16, float32 or "
                "float64: quantized checkpoints are not supported"
            )
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"{key} in {str(path)!r} has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(wanted.shape)} for this rank: does params.json belong to it?"
            )


def _converted(
    source: Tensor, dtype: torch.dtype, device: torch.device, *, release: bool
) -> Tensor:
    if source.dtype == dtype and device.type == "cpu" and source.is_contiguous():
        return source
    result = torch.empty(source.shape, dtype=dtype, device=device)
    rows = max(1, _CHUNK_BYTES // max(1, source[:1].nbytes))
    for start in range(0, len(source), rows):
        piece = source[start : start + rows]
        result[start : start + rows].copy_(piece)
        if release and piece.is_contiguous():
            _release_pages(piece)
    return result


def _release_pages(tensor: Tensor) -> None:
    """Tell the system that the mapped pages below ``tensor`` are not needed any more. They must
    not be: torch swaps the bytes of a big-endian file in place, and that would be lost."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED
        )
