"""Reshard a checkpoint on disk for another number of ranks, or convert it to the other layout.

Only one tensor at a time is in memory. The new folder is written under a temporary name next to the
target, params.json or config.json last, and renamed once it is complete.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from llama.chat import ChatFormat, Llama2ChatFormat
from llama.chat_template import LLAMA2_TEMPLATE, LLAMA3_TEMPLATE, chat_format
from llama.checkpoint import huggingface
from llama.checkpoint.folder import Checkpoint, find_checkpoint
from llama.checkpoint.lora import read_adapter
from llama.checkpoint.pth_writer import PthWriter
from llama.checkpoint.quantization_config import quantization_config
from llama.checkpoint.quantized import check_groups, stored_tensors, with_rows
from llama.checkpoint.reader import Weights, chunks
from llama.checkpoint.sharding import n_bytes, quantized_bits, quantized_bytes
from llama.config import ROPE_FIELDS, ModelArgs, RopeScaling
from llama.files import LARGEST_INDEX, listed, md5, read_json
from llama.quantize import Bits
from llama.tokenizer import AnyTokenizer
from llama.vocab.file import is_tokenizer_json, read_vocabulary
from llama.vocab.tokenizer_json import tokenizer_config, tokenizer_json

_CPU = torch.device("cpu")
# The tensors of one safetensors file are in memory together.
_SAFETENSORS_BYTES = 2 * 2**30


def convert(
    ckpt: Checkpoint,
    args: ModelArgs,
    target: Path,
    *,
    layout: Literal["native", "hf"],
    n_shards: int,
    dtype: torch.dtype | None,
    quantize: Bits | None = None,
    tokenizer: AnyTokenizer,
    tokenizer_path: Path,
    force: bool,
    progress: bool,
    adapter: Path | None = None,
) -> None:
    """Write a checkpoint in ``layout`` to the folder ``target``, with its tokenizer.

    Args:
        n_shards: for a native folder; ignored for a Hugging Face folder.
        dtype: None keeps every tensor's own.
        quantize: write the weights of linear layers in these bits; needs the layout "hf".
        tokenizer_path: the file of ``tokenizer``, which is copied with the files next to it that
            Hugging Face's tokenizers read. For a Hugging Face folder, those missing are written.
        force: replace ``target`` if it is an empty folder, or a checkpoint folder that contains
            nothing else and none of the source's files.
        adapter: the folder of a LoRA adapter to merge.

    Raises:
        FileExistsError: ``target`` exists and may not be replaced.
        ImportError: ``layout`` is "hf", and the package safetensors is missing.
        OSError: the disk is full or can't be written to; partial output is removed.
        ValueError: the source is damaged, can't be split into ``n_shards``, or holds values beyond
            ``dtype``'s range, or the source is quantized or can't be quantized; the message
            names the tensor.
    """
    if ckpt.quantization is not None:
        raise ValueError(
            f"{str(ckpt.folder)!r} is quantized ({ckpt.quantization}), and is read only as it is: "
            "convert the unquantized model"
        )
    sources = [*ckpt.folder.iterdir(), tokenizer_path]
    if adapter is not None and adapter.is_dir():
        sources += adapter.iterdir()
    _check_target(target, sources, force)
    args.check_tp_size(n_shards, parts="shards")
    weights = Weights(ckpt, args, None if adapter is None else read_adapter(adapter, args))
    target.parent.mkdir(parents=True, exist_ok=True)
    n_files = n_shards if layout == "native" else 1
    keys = list(weights.specs)
    bits = quantized_bits(weights.specs, quantize)
    check_groups(weights.specs, bits)
    if layout == "hf" and not bits and _is_tied(weights):
        keys.remove("output.weight")
    sizes = {key: _stored_bytes(weights, key, n_files, dtype, bits.get(key)) for key in keys}
    _check_room(n_files * sum(sizes.values()), tokenizer_path, target)
    part = target.parent / f".{target.name}.partial-{uuid.uuid4().hex[:8]}"
    part.mkdir()
    try:
        one = sum(n_bytes(weights.specs[key], n_files, torch.uint8) for key in keys)
        with tqdm(
            total=one * n_files,
            desc=target.name,
            unit=" numbers",
            unit_scale=True,
            disable=not progress,
        ) as bar:
            _copy_tokenizer(tokenizer_path, part)
            if layout == "native":
                _write_native(weights, part, n_shards, dtype, bar.update)
            else:
                _write_tokenizer(tokenizer, part)
                _write_huggingface(weights, sizes, bits, part, dtype, tokenizer, bar.update)
        for path in part.iterdir():
            with path.open("rb+") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
        replaced = _put_in_place(part, target, sources, force)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(
            f"{str(target)!r} couldn't be written, and no partial output is left: {error}"
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if replaced:
        _delete(replaced)


def _is_tied(weights: Weights) -> bool:
    """Whether the source stores one tensor for the embedding and the output layer."""
    return weights.place("tok_embeddings.weight", 1, 0) == weights.place("output.weight", 1, 0)


def _stored_bytes(
    weights: Weights, key: str, n_files: int, dtype: torch.dtype | None, bits: Bits | None
) -> int:
    if bits is not None:
        return quantized_bytes(weights.specs[key], n_files, bits)
    return n_bytes(weights.specs[key], n_files, dtype or _dtype(weights, key))


def _check_room(n_bytes_of_weights: int, tokenizer_path: Path, target: Path) -> None:
    """Raise OSError if the disk is too full. Norms and shared key/value heads are in every file."""
    needed = tokenizer_path.stat().st_size + n_bytes_of_weights
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(
            f"{str(target)!r} needs {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB "
            "free: make room, or give another folder"
        )


# --- Tokenizer ----------------------------------------------------------------------------------

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def _copy_tokenizer(path: Path, folder: Path) -> None:
    """Copy a vocabulary, named by its content, and the files next to it."""
    is_json = is_tokenizer_json(read_vocabulary(str(path), 16))
    shutil.copyfile(path, folder / ("tokenizer.json" if is_json else "tokenizer.model"))
    for name in _TOKENIZER_FILES:
        source = path.parent / name
        if source.is_file() and not (folder / name).exists():
            shutil.copyfile(source, folder / name)


def _write_tokenizer(tokenizer: AnyTokenizer, folder: Path) -> None:
    """Write Hugging Face's files of a tokenizer, as far as they weren't copied."""
    is_written = False
    if not (folder / "tokenizer.json").exists():
        text = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False, indent=1)
        (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
        is_written = True
    path = folder / "tokenizer_config.json"
    given = read_json(path, LARGEST_INDEX) if path.exists() else {}
    config = dict(given or tokenizer_config(tokenizer))
    if isinstance(formatter := chat_format(tokenizer), ChatFormat | Llama2ChatFormat):
        if is_written:
            config["tokenizer_class"] = tokenizer_config(tokenizer)["tokenizer_class"]
        if tokenizer.chat_template is None:
            is_llama3 = isinstance(formatter, ChatFormat)
            config["chat_template"] = LLAMA3_TEMPLATE if is_llama3 else LLAMA2_TEMPLATE
    if config != given:
        path.write_text(json.dumps(config, indent=1) + "\n")


# --- The target ---------------------------------------------------------------------------------

# Files written by convert or the publishers. Not README.md: it may be the user's.
_CHECKPOINT_FILES = re.compile(
    r"consolidated\.\d\d\.pth|params\.json|(tokenizer_)?checklist\.chk|tokenizer\.(model|json)"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(generation_|tokenizer_)?config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|chat_template\.jinja"
    r"|LICENSE(\.txt)?|USE_POLICY(\.md)?"
)


def _check_target(target: Path, sources: list[Path], force: bool) -> None:
    """Raise FileExistsError unless ``target`` may be written, or replaced."""
    if not os.path.lexists(target):
        return
    if not force:
        raise FileExistsError(f"{str(target)!r} already exists: give --force to replace it")
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(
            f"{str(target)!r} isn't a folder and is not replaced: give another name, or move it "
            "away"
        )
    for source in sources:  # resolved, since a link may point to a file that would be deleted
        if any(folder.samefile(target) for folder in source.resolve().parents):
            raise FileExistsError(
                f"{str(target)!r} holds {str(source)!r} of the source, which replacing it would "
                "delete: give another name"
            )
    _check_replaceable(target)


def _check_replaceable(folder: Path) -> None:
    """Raise FileExistsError for a folder that holds more than a checkpoint."""
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
            find_checkpoint(str(folder))
        except (FileNotFoundError, ValueError) as error:
            raise FileExistsError(
                f"{str(folder)!r} is not replaced, since it isn't a checkpoint folder ({error}): "
                "give another name, or move it away"
            ) from None


def _put_in_place(part: Path, target: Path, sources: list[Path], force: bool) -> Path | None:
    """Rename the new folder to ``target``. Returns the new path of the replaced folder, if any."""
    _check_target(target, sources, force)  # it may have been created in the meantime
    if not target.exists():
        part.rename(target)
        return None
    old = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:8]}"
    target.rename(old)
    try:
        _check_replaceable(old)  # a file may have been added before the rename
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    return old


def _delete(folder: Path) -> None:
    """Delete a checkpoint's files, and the folder unless other files were added to it."""
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
    """The content of params.json, with all defaults spelled out."""
    params = dataclasses.asdict(args) | {"n_kv_heads": args.kv_heads}
    dropped = {"max_seq_len", "max_batch_size"}
    if args.ffn_dim_multiplier is None:
        dropped.add("ffn_dim_multiplier")
    # published code doesn't know the other fields: they are written only where they matter
    if args.head_dim * args.n_heads == args.dim:
        dropped.add("attention_head_dim")
    if not args.use_scaled_rope:
        dropped |= {"use_scaled_rope", *ROPE_FIELDS}
    elif args.rope_scaling == RopeScaling(args.rope_scaling_factor):
        dropped |= {*ROPE_FIELDS} - {"rope_scaling_factor"}
    return {key: value for key, value in params.items() if key not in dropped}


def _write_native(
    weights: Weights,
    folder: Path,
    n_shards: int,
    dtype: torch.dtype | None,
    wrote: Callable[[int], Any],
) -> None:
    for rank in range(n_shards):
        with PthWriter(folder / f"consolidated.{rank:02d}.pth") as file:
            for key in weights.specs:
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
    (folder / "params.json").write_bytes(params.encode())  # write_text changes \n on Windows


def _dtype(weights: Weights, key: str) -> torch.dtype:
    return weights.pieces(key, 1, 0)[0][0].dtype


def _read(weights: Weights, key: str, n_ranks: int, rank: int, dtype: torch.dtype | None) -> Tensor:
    """A rank's part of a tensor.

    Raises:
        ValueError: a value is beyond the dtype's range. Values that aren't finite in the source are
            kept; ``verify`` reports them.
    """
    tensor = weights.read(key, n_ranks, rank, dtype or _dtype(weights, key), _CPU)
    if any(tensor[a:b].isinf().any() for a, b in chunks(tensor)):
        for _, chunk in weights.read_chunks(key, n_ranks, rank):
            finite = chunk.masked_fill(~chunk.isfinite(), 0)
            if finite.to(tensor.dtype).isinf().any():
                raise ValueError(
                    f"{weights.stored_key(key)} holds {finite.abs().max():g}, but the largest "
                    f"{tensor.dtype} is {torch.finfo(tensor.dtype).max:g}: give --dtype bfloat16 "
                    "or float32"
                )
    return tensor


# --- Hugging Face -----------------------------------------------------------------------------


def _stored_tensors(
    weights: Weights, key: str, dtype: torch.dtype | None, bits: Bits | None
) -> dict[str, Tensor]:
    """A tensor by its name in the file, with the rows in Hugging Face's order; a quantized one as
    several tensors."""

    def rows(x: Tensor) -> Tensor:
        return huggingface.pairs_as_halves(x, weights.args.head_dim)

    name, is_rotated = huggingface.huggingface_key(key), huggingface.is_rotated(key)
    if bits is None:
        tensor = _read(weights, key, 1, 0, dtype)
        tensor = rows(tensor).reshape(tensor.shape) if is_rotated else tensor
        return {name: tensor.contiguous()}
    weight = weights.quantize(key, 1, 0, bits, _CPU)
    return stored_tensors(name, with_rows(weight, rows) if is_rotated else weight)


def _write_huggingface(
    weights: Weights,
    sizes: Mapping[str, int],
    bits: Mapping[str, Bits],
    folder: Path,
    dtype: torch.dtype | None,
    tokenizer: AnyTokenizer,
    wrote: Callable[[int], Any],
) -> None:
    """Write the tensors of ``sizes``, whose bytes it gives, and all but the tokenizer's files."""
    safetensors = huggingface.import_safetensors()
    groups: list[list[str]] = [[]]
    held = 0
    for key, size in sizes.items():
        if groups[-1] and held + size > _SAFETENSORS_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(key)
        held += size
    files, total_size = {}, 0
    for i, group in enumerate(groups, start=1):
        single = len(groups) == 1
        name = "model.safetensors" if single else f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for key in group:
            for stored_name, tensor in _stored_tensors(weights, key, dtype, bits.get(key)).items():
                tensors[stored_name] = tensor
                files[stored_name] = name
                total_size += tensor.nbytes
            wrote(n_bytes(weights.specs[key], 1, torch.uint8))
        try:
            safetensors.torch.save_file(tensors, folder / name, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # for example: the disk is full
            raise OSError(str(error)) from error
        for tensor in tensors.values():
            weights.release(tensor)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": files}
        (folder / huggingface.INDEX).write_text(json.dumps(index, indent=1) + "\n")
    stop_tokens = sorted(tokenizer.stop_tokens | weights.ckpt.stop_tokens)
    bos_id = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
    ids = {"bos_token_id": bos_id, "eos_token_id": stop_tokens}
    (folder / "generation_config.json").write_text(json.dumps(ids) + "\n")
    stored = dtype or _dtype(weights, "tok_embeddings.weight")
    tied = "output.weight" not in sizes
    config = huggingface.write_config(weights.args, weights.ckpt.context, stored, tied=tied) | ids
    if bits:
        config["quantization_config"] = quantization_config(bits)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
