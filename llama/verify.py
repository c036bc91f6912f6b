"""Check a folder: sums of its files, archives, and every tensor in them."""

import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llama import checkpoint, pth_safety
from llama.checkpoint import Checkpoint, Weights
from llama.files import LARGEST_CONFIG, md5, read_bounded
from llama.model import ModelArgs

_READ_BYTES = 16 * 2**20
# A name may not lead out of the folder or look like an option.
_CHECKLIST_LINE = re.compile(
    rb"[ \t]*([0-9A-Fa-f]{32})[ \t]+\*?([A-Za-z0-9_][A-Za-z0-9._-]*)[ \t]*\r?"
)


def verify(found: Checkpoint, args: ModelArgs, *, progress: bool) -> list[str]:
    """Faults of a folder: files that are not the listed ones, damaged archives, tensors that are
    missing, unknown, of a wrong shape or dtype, or not finite, and shards of different models."""
    faults = []
    listed = read_checklist(found.folder / "checklist.chk")
    archives = found.files if found.layout == "native" else []
    paths = [found.folder / name for name in listed] + archives
    total = sum(path.stat().st_size for path in paths if path.is_file())
    with tqdm(
        total=total, desc=found.folder.name, unit="B", unit_scale=True, disable=not progress
    ) as bar:
        for name, digest in listed.items():
            path = found.folder / name
            if not path.is_file():
                faults.append(f"{str(path)!r} is missing, but checklist.chk lists it")
            elif (got := md5(path, bar.update)) != digest:
                faults.append(
                    f"{str(path)!r} has the MD5 sum {got}, but checklist.chk lists {digest}"
                )
        for path in archives:
            faults += _archive_faults(path, bar.update)
    weights = Weights(found, args)
    of_shards = [fault for i in range(found.n_shards) for fault in weights.faults(i)]
    if not of_shards:
        of_shards = list(_wrong_numbers(weights))
    return faults + of_shards


def _wrong_numbers(weights: Weights) -> Iterator[str]:
    for i in range(weights.found.n_shards):
        name = weights.found.files[i] if weights.found.layout == "native" else weights.found.folder
        for key, tensor in weights.shard(i).items():
            n_wrong = 0
            for start, stop in checkpoint.chunks(tensor):
                n_wrong += int((~torch.isfinite(tensor[start:stop])).sum())
                weights.release(tensor[start:stop])
            if n_wrong:
                yield f"{key} in {str(name)!r} has {n_wrong} values that are not finite"
    try:
        weights.check_same_model()
    except ValueError as error:
        yield str(error)


def read_checklist(path: Path) -> dict[str, str]:
    """MD5 sums by file name, empty if there is no list. download.sh reads it by the same rules.

    Raises:
        ValueError: it is too long, empty, or a line of it isn't a sum and the name of a file.
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
        found = _CHECKLIST_LINE.fullmatch(line)
        if not found or b".." in found[2]:
            raise ValueError(
                f"{str(path)!r} is damaged: line {number} is {line[:60]!r}, expected an MD5 sum "
                "and a file name"
            )
        sums[found[2].decode()] = found[1].decode().lower()
    if not sums:
        raise ValueError(f"{str(path)!r} is damaged: it lists no file")
    return sums


def _archive_faults(path: Path, read: Callable[[int], Any]) -> Iterator[str]:
    """Members of a shard whose bytes do not have the check sum that the archive holds for them."""
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
        yield f"{str(path)!r} is no readable archive: {error}"
