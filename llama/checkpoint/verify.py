"""Verify a folder: checksums of its files and archives, and every tensor in them."""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama.checkpoint import pth_safety
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.reader import Weights, chunks
from llama.config import ModelArgs
from llama.files import LARGEST_CONFIG, md5, read_bounded

_READ_BYTES = 16 * 2**20
# A name must not escape the folder or look like an option. Llama 3.2's lists put ./ in front.
_CHECKLIST_LINE = re.compile(
    rb"[ \t]*([0-9A-Fa-f]{32})[ \t]+\*?(?:\./)?([A-Za-z0-9_][A-Za-z0-9._-]*)[ \t]*\r?"
)


def verify(ckpt: Checkpoint, args: ModelArgs, tokenizer_path: Path, *, progress: bool) -> list[str]:
    """Faults of a folder: files whose checksums differ, damaged archives, tensors that are missing,
    unknown, of a wrong shape or dtype, or not finite, and shards of different models."""
    faults = []
    # Llama 2's tokenizer is in the parent folder, with a list of its own
    lists = [ckpt.folder / "checklist.chk", ckpt.folder / "tokenizer_checklist.chk"]
    if tokenizer_path.parent != ckpt.folder:
        lists.append(tokenizer_path.parent / "tokenizer_checklist.chk")
    listed = [
        (path.parent / name, digest, path.name)
        for path in lists
        for name, digest in read_checklist(path).items()
        # Llama 3.2 3B Instruct's list has this file, which Meta's own tool doesn't download either
        if name != "orig_params.json" or (path.parent / name).exists()
    ]
    archives = [path for path in ckpt.files if path.suffix != ".safetensors"]
    paths = [path for path, _, _ in listed] + archives
    total = sum(path.stat().st_size for path in paths if path.is_file())
    with tqdm(
        total=total, desc=ckpt.folder.name, unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for path, digest, name in listed:
            if not path.is_file():
                faults.append(f"{str(path)!r} is missing, but {name} lists it")
            elif (got := md5(path, bar.update)) != digest:
                faults.append(f"{str(path)!r} has the MD5 sum {got}, but {name} lists {digest}")
        for path in archives:
            faults += _archive_faults(path, bar.update)
    weights = Weights(ckpt, args)
    shard_faults = [fault for i in range(ckpt.n_shards) for fault in weights.faults(i)]
    if not shard_faults:
        shard_faults = list(_not_finite(weights))
    return faults + shard_faults


def _not_finite(weights: Weights) -> Iterator[str]:
    for i in range(weights.ckpt.n_shards):
        name = weights.ckpt.files[i] if weights.ckpt.layout == "native" else weights.ckpt.folder
        for key, tensor in weights.shard(i).items():
            n_faults = 0
            for start, stop in chunks(tensor):
                n_faults += int((~torch.isfinite(tensor[start:stop])).sum())
                weights.release(tensor[start:stop])
            if n_faults:
                shown = weights.stored_key(key)
                yield f"{shown} in {str(name)!r} has {n_faults} values that aren't finite"
    for stored in weights.quantized.values():
        if n_faults := stored.n_not_finite():
            shown, name = stored.scale[0], weights.ckpt.folder
            yield f"{shown} in {str(name)!r} has {n_faults} values that aren't finite"
    try:
        weights.check_same_model()
    except ValueError as error:
        yield str(error)


def read_checklist(path: Path) -> dict[str, str]:
    """MD5 sums by file name; empty if there is no list. download.sh applies the same rules.

    Raises:
        ValueError: it is too long, empty, or has a line that isn't a sum and a file name.
    """
    try:
        lines = read_bounded(path, LARGEST_CONFIG).split(b"\n")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
    sums = {}
    for number, line in enumerate(lines, start=1):
        if not line.removesuffix(b"\r").strip(b" \t"):
            continue
        match = _CHECKLIST_LINE.fullmatch(line)
        if not match or b".." in match[2]:
            raise ValueError(
                f"{str(path)!r} is damaged: line {number} is {line[:60]!r}, expected an MD5 sum "
                "and a file name"
            )
        sums[match[2].decode()] = match[1].decode().lower()
    if not sums:
        raise ValueError(f"{str(path)!r} is damaged: it lists no file")
    return sums


def _archive_faults(path: Path, read: Callable[[int], Any]) -> Iterator[str]:
    """Members of a shard whose bytes don't match their checksum in the archive."""
    try:
        with path.open("rb") as file:
            for member in pth_safety.members(file):
                crc, left = 0, member.size
                file.seek(member.start)
                while piece := file.read(min(left, _READ_BYTES)):
                    crc, left = zlib.crc32(piece, crc), left - len(piece)
                    read(len(piece))
                if crc != member.crc:
                    yield f"{str(path)!r} is damaged: Bad CRC-32 for {member.name!r}"
    except (zipfile.BadZipFile, pth_safety.UnsafeFileError, OSError) as error:
        yield f"{str(path)!r} can't be read as an archive: {error}"
