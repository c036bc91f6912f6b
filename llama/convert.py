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
import re
import shutil
import stat
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
from llama.files import listed, md5
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
        force: replace ``target`` if it is an empty folder, or a checkpoint folder that holds
            nothing else and no file of the source.

    Raises:
        FileExistsError: ``target`` is there.
        ImportError: ``layout`` is "hf", and the package safetensors is missing.
        OSError: the disk is full, or cannot be written to; nothing is left on it.
        ValueError: the source is damaged, does not divide by ``n_shards``, or holds numbers that
            ``dtype`` cannot; the message names the tensor.
    """
    sources = [*found.folder.iterdir(), tokenizer_path]
    _check_target(target, sources, force)
    if n_shards not in args.rank_counts:
        raise ValueError(
            f"the model does not divide by {n_shards} shards, but by "
            f"{', '.join(map(str, args.rank_counts))}"
        )
    weights = Weights(found, args)
    target.parent.mkdir(parents=True, exist_ok=True)
    n_files = n_shards if layout == "native" else 1
    keys = list(weights.cuts)
    if layout == "hf" and _is_tied(weights):
        keys.remove("output.weight")
    _check_room(weights, keys, n_files, dtype, tokenizer_path, target)
    part = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    part.mkdir()
    try:
        one = sum(checkpoint.n_bytes(weights.cuts[key], n_files, torch.uint8) for key in keys)
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
                _write_huggingface(weights, keys, part, dtype, bos_token, stop_tokens, bar.update)
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        replaced = _put_in_place(part, target, sources, force)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"{str(target)!r} could not be written, and nothing of it is left: {error}"
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if replaced:
        _delete(replaced)


def _is_tied(weights: Weights) -> bool:
    """Whether the source has one tensor for the embedding and the output layer."""
    return weights.place("tok_embeddings.weight", 1, 0) == weights.place("output.weight", 1, 0)


def _check_room(
    weights: Weights,
    keys: list[str],
    n_files: int,
    dtype: torch.dtype | None,
    tokenizer_path: Path,
    target: Path,
) -> None:
    """Every file has norms, and key/value heads that its ranks share, of its own."""
    n_bytes = tokenizer_path.stat().st_size + n_files * sum(
        checkpoint.n_bytes(weights.cuts[key], n_files, dtype or _dtype(weights, key))
        for key in keys
    )
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise OSError(
            f"{str(target)!r} needs {n_bytes / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB "
            "free: make room, or give another folder"
        )


# --- The target ---------------------------------------------------------------------------------

# Files that convert or the publishers write. Not README.md: it may be the user's.
_CHECKPOINT_FILES = re.compile(
    r"consolidated\.\d\d\.pth|params\.json|(tokenizer_)?checklist\.chk|tokenizer\.(model|json)"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(generation_|tokenizer_)?config\.json|special_tokens_map\.json|chat_template\.jinja"
    r"|LICENSE(\.txt)?|USE_POLICY(\.md)?"
)


def _check_target(target: Path, sources: list[Path], force: bool) -> None:
    """Raise FileExistsError unless ``target`` may be written, or replaced."""
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(f"{str(target)!r} is there already: give --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(
            f"{str(target)!r} isn't a folder and is not replaced: give another name, or move it "
            "away"
        )
    for source in sources:  # links lead to the file that would be lost
        if any(folder.samefile(target) for folder in source.resolve().parents):
            raise FileExistsError(
                f"{str(target)!r} holds {str(source)!r} of the source, which replacing it would "
                "delete: give another name"
            )
    _check_replaceable(target)


def _check_replaceable(folder: Path) -> None:
    """Raise FileExistsError for a folder that has more in it than a checkpoint."""
    paths = sorted(folder.iterdir())
    others = [
        path.name
        for path in paths
        if not _CHECKPOINT_FILES.fullmatch(path.name) or not stat.S_ISREG(path.lstat().st_mode)
    ]
    if others:
        raise FileExistsError(
            f"{str(folder)!r} holds {listed(others)}, which replacing it would delete: only a "
            "checkpoint without other files is replaced; move them away, or give another name"
        )
    if paths:
        try:
            checkpoint.find(str(folder))
        except (FileNotFoundError, ValueError) as error:
            raise FileExistsError(
                f"{str(folder)!r} is not replaced, since it isn't a checkpoint folder ({error}): "
                "give another name, or move it away"
            ) from None


def _put_in_place(part: Path, target: Path, sources: list[Path], force: bool) -> Path | None:
    """Give the new folder its name; where the folder that had it is now."""
    _check_target(target, sources, force)  # it may have come since
    if not target.exists():
        part.rename(target)
        return None
    old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
    target.rename(old)
    try:
        _check_replaceable(old)  # a file may have come before it was moved
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    return old


def _delete(folder: Path) -> None:
    """Delete a checkpoint's files, and the folder unless it has got others since."""
    for path in list(folder.iterdir()):
        if _CHECKPOINT_FILES.fullmatch(path.name):
            path.unlink()
    try:
        folder.rmdir()
    except OSError as error:
        raise OSError(
            f"the new folder is in place, but the replaced one, {str(folder)!r}, can't be deleted: "
            f"{error}"
        ) from error


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
                tensor = _read(weights, key, n_shards, rank, dtype)
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


def _read(weights: Weights, key: str, n_ranks: int, rank: int, dtype: torch.dtype | None) -> Tensor:
    """A rank's part of a tensor.

    Raises:
        ValueError: the dtype's range is too small for it. Numbers that are not finite in the source
            stay so: ``verify`` finds them.
    """
    tensor = weights.read(key, n_ranks, rank, dtype or _dtype(weights, key), _CPU)
    if any(tensor[a:b].isinf().any() for a, b in checkpoint.chunks(tensor)):
        for piece, _ in weights.pieces(key, n_ranks, rank):
            for a, b in checkpoint.chunks(piece):
                source = piece[a:b]
                finite = source.masked_fill(~source.isfinite(), 0)
                if finite.to(tensor.dtype).isinf().any():
                    raise ValueError(
                        f"{key} holds {finite.abs().max():g}, but {tensor.dtype} ends at "
                        f"{torch.finfo(tensor.dtype).max:g}: give --dtype bfloat16 or float32"
                    )
    return tensor


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
    keys: list[str],
    folder: Path,
    dtype: torch.dtype | None,
    bos_token: int,
    stop_tokens: set[int],
    wrote: Callable[[int], Any],
) -> None:
    safetensors = huggingface.import_safetensors()
    groups: list[list[str]] = [[]]
    held = 0
    for key in keys:
        size = checkpoint.n_bytes(weights.cuts[key], 1, dtype or _dtype(weights, key))
        if groups[-1] and held + size > _SAFETENSORS_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += size
    files, n_bytes = {}, 0
    for i, group in enumerate(groups, start=1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for key in group:
            tensor = _read(weights, key, 1, 0, dtype)
            if huggingface.is_rotated(key):
                rotated = huggingface.pairs_as_halves(tensor, weights.args.head_dim)
                tensor = rotated.reshape(tensor.shape)
            tensors[huggingface.huggingface_key(key)] = tensor.contiguous()
            files[huggingface.huggingface_key(key)] = name
            wrote(tensor.numel())
            n_bytes += tensor.nbytes
        try:
            safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # the disk is full, say
            raise OSError(str(error)) from error
        for tensor in tensors.values():
            weights.release(tensor)
    if len(groups) > 1:
        index = {"metadata": {"total_size": n_bytes}, "weight_map": files}
        (folder / huggingface.INDEX).write_text(json.dumps(index, indent=1) + "\n")
    ids = {"bos_token_id": bos_token, "eos_token_id": sorted(stop_tokens)}
    (folder / "generation_config.json").write_text(json.dumps(ids) + "\n")
    stored = dtype or _dtype(weights, "tok_embeddings.weight")
    tied = "output.weight" not in keys
    config = huggingface.write_config(weights.args, weights.found.context, stored, tied=tied) | ids
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
