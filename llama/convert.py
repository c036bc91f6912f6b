"""Checkpoints on disk: cut for another number of ranks, or turned into the other layout.

A tensor at a time is in memory. The new folder has its name only when it is whole: it is written
under another one beside it, params.json or config.json last.
"""

import collections
import ctypes
import dataclasses
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from llama import checkpoint, huggingface
from llama.checkpoint import Checkpoint, Weights
from llama.files import md5
from llama.model import ModelArgs
from llama.vocabulary import read_vocabulary

_CPU = torch.device("cpu")
# Tensors of one safetensors file are in memory together.
_SAFETENSORS_BYTES = 2 * 2**30
_WRITE_BYTES = 16 * 2**20
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}


def convert(
    found: Checkpoint,
    args: ModelArgs,
    target: Path,
    *,
    layout: Literal["native", "hf"],
    n_shards: int,
    dtype: torch.dtype | None,
    tokenizer_path: Path,
    bos_token: int,
    stop_tokens: set[int],
    force: bool,
    progress: bool,
) -> None:
    """Write a checkpoint in ``layout`` to the folder ``target``, with its tokenizer.

    Args:
        n_shards: of a native folder; a Hugging Face folder has none.
        dtype: None keeps every tensor's own.
        bos_token, stop_tokens: for the configs of a Hugging Face folder.
        force: replace ``target`` if it is there. Only a checkpoint or an empty folder is.

    Raises:
        FileExistsError: ``target`` is there.
        OSError: the disk is full, or cannot be written to; nothing is left on it.
        ValueError: the source is damaged, or does not divide by ``n_shards``.
    """
    _check_target(target, found.folder, force)
    if n_shards not in args.rank_counts:
        raise ValueError(
            f"the model does not divide by {n_shards} shards, but by "
            f"{', '.join(map(str, args.rank_counts))}"
        )
    weights = Weights(found, args)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(weights, target, dtype)
    part = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    part.mkdir()
    try:
        n_files = n_shards if layout == "native" else 1
        one = sum(checkpoint.n_bytes(cut, n_files, torch.uint8) for cut in weights.cuts.values())
        with tqdm(
            total=one * n_files,
            desc=target.name,
            unit=" numbers",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            # under the name that goes with its content, whatever it was called
            is_json = read_vocabulary(str(tokenizer_path), 1) == b"{"
            name = "tokenizer.json" if is_json else "tokenizer.model"
            shutil.copyfile(tokenizer_path, part / name)
            if layout == "native":
                _write_native(weights, part, n_shards, dtype, bar.update)
            else:
                _write_huggingface(weights, part, dtype, bos_token, stop_tokens, bar.update)
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _put_in_place(part, target, found.folder, force)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"{str(target)!r} could not be written, and nothing of it is left: {error}"
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _check_room(weights: Weights, target: Path, dtype: torch.dtype | None) -> None:
    n_bytes = sum(
        checkpoint.n_bytes(cut, 1, dtype or _dtype(weights, key))
        for key, cut in weights.cuts.items()
    )
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise OSError(
            f"{str(target)!r} needs {n_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB "
            "free: make room, or give another folder"
        )


def _check_target(target: Path, source: Path, force: bool) -> None:
    """Raise FileExistsError unless ``target`` may be written, or replaced."""
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(f"{str(target)!r} is there already: give --force to replace it")
    if target.resolve() in source.resolve().parents:
        raise FileExistsError(f"{str(target)!r} holds the source: it cannot be replaced")
    is_folder = target.is_dir() and not target.is_symlink()
    names = {path.name for path in target.iterdir()} if is_folder else set()
    is_checkpoint = not names.isdisjoint({"params.json", "config.json"})
    if not is_folder or (names and not is_checkpoint):
        raise FileExistsError(
            f"{str(target)!r} is no checkpoint folder and is not replaced: give another name, or "
            "move it away"
        )


def _put_in_place(part: Path, target: Path, source: Path, force: bool) -> None:
    _check_target(target, source, force)  # it may have come since
    if not target.exists():
        part.rename(target)
        return
    old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


# --- Native -----------------------------------------------------------------------------------


def resolved_params(args: ModelArgs) -> dict[str, Any]:
    """What params.json says, with nothing left to defaults."""
    params = dataclasses.asdict(args) | {"n_kv_heads": args.kv_heads}
    dropped = {"max_seq_len", "max_batch_size"}
    if args.ffn_dim_multiplier is None:
        dropped.add("ffn_dim_multiplier")
    if not args.use_scaled_rope:
        dropped |= {"use_scaled_rope", "rope_scaling_factor"}
    return {key: value for key, value in params.items() if key not in dropped}


def _write_native(
    weights: Weights,
    folder: Path,
    n_shards: int,
    dtype: torch.dtype | None,
    wrote: Callable[[int], Any],
) -> None:
    for rank in range(n_shards):
        with _ShardFile(folder / f"consolidated.{rank:02d}.pth") as file:
            for key in weights.cuts:
                tensor = weights.read(key, n_shards, rank, dtype or _dtype(weights, key), _CPU)
                file.add(key, tensor)
                weights.release(tensor)
                wrote(tensor.numel())
    names = sorted(path.name for path in folder.iterdir())
    sums = {name: md5(folder / name) for name in names}
    params = json.dumps(resolved_params(weights.args)) + "\n"
    sums["params.json"] = hashlib.md5(params.encode(), usedforsecurity=False).hexdigest()
    lines = (f"{digest}  {name}\n" for name, digest in sums.items())
    (folder / "checklist.chk").write_text("".join(lines))
    (folder / "params.json").write_text(params)


def _dtype(weights: Weights, key: str) -> torch.dtype:
    return weights.pieces(key, 1, 0)[0][0].dtype


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


class _ShardFile:
    """A file like torch.save's, written tensor by tensor: torch.save wants all of them in memory.

    It is a zip archive of stored members: ``data.pkl``, and ``data/0``, ``data/1``, ... with the
    numbers of each tensor, which start at multiples of 64 bytes so that they can be mapped.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._entries: dict[str, _Entry] = {}

    def __enter__(self) -> "_ShardFile":
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
        info = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: the same bytes every time
        info.file_size = size
        assert self._zip.fp is not None
        # 30 bytes of header, the name, 20 bytes of long sizes, and an extra field that fills up
        start = self._zip.fp.tell() + 30 + len(info.filename) + 20 + 4
        filling = -start % 64
        info.extra = b"FB" + filling.to_bytes(2, "little") + bytes(filling)
        with self._zip.open(info, "w", force_zip64=True) as member:
            for piece in pieces:
                member.write(piece)


def _bytes_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a contiguous tensor, in pieces."""
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    view = memoryview(array).cast("B")
    for start in range(0, len(view), _WRITE_BYTES):
        yield view[start : start + _WRITE_BYTES]


# --- Hugging Face -----------------------------------------------------------------------------


def _write_huggingface(
    weights: Weights,
    folder: Path,
    dtype: torch.dtype | None,
    bos_token: int,
    stop_tokens: set[int],
    wrote: Callable[[int], Any],
) -> None:
    groups: list[list[str]] = [[]]
    held = 0
    for key, cut in weights.cuts.items():
        size = checkpoint.n_bytes(cut, 1, dtype or _dtype(weights, key))
        if groups[-1] and held + size > _SAFETENSORS_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += size
    from safetensors.torch import save_file

    files, n_bytes = {}, 0
    for i, keys in enumerate(groups, start=1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for key in keys:
            tensor = weights.read(key, 1, 0, dtype or _dtype(weights, key), _CPU)
            if huggingface.is_rotated(key):
                rotated = huggingface.pairs_as_halves(tensor, weights.args.head_dim)
                tensor = rotated.reshape(tensor.shape)
            tensors[huggingface.huggingface_key(key)] = tensor.contiguous()
            files[huggingface.huggingface_key(key)] = name
            wrote(tensor.numel())
            n_bytes += tensor.nbytes
        save_file(tensors, folder / name, metadata={"format": "pt"})
        for tensor in tensors.values():
            weights.release(tensor)
    if len(groups) > 1:
        index = {"metadata": {"total_size": n_bytes}, "weight_map": files}
        (folder / huggingface.INDEX).write_text(json.dumps(index, indent=1) + "\n")
    ids = {"bos_token_id": bos_token, "eos_token_id": sorted(stop_tokens)}
    (folder / "generation_config.json").write_text(json.dumps(ids) + "\n")
    stored = dtype or _dtype(weights, "tok_embeddings.weight")
    config = huggingface.write_config(weights.args, weights.found.context, stored) | ids
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
