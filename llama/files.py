"""Files: size limits before parsing untrusted ones, messages for those that can't be read, and
writing as a whole."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Bytes. Parsed JSON takes up to 30 times its size in memory.
LARGEST_CONFIG = 2**20
LARGEST_INDEX = 2**23  # 405B's safetensors index has 0.1 MB
# Objects, arrays and items in one JSON document: Llama 3's tokenizer.json has 1.3 million.
_MOST_VALUES = 2**22
# A pickle of protocol 2 of the number that torch.save's former format starts with.
_FORMER_TORCH = b"\x80\x02\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
# Of matching a file's regular expressions; seconds.
MOST_STEPS = 10**7
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def check_regular(path: str | Path) -> None:
    """Raise ValueError for anything but a regular file: reading a pipe or a device could block
    forever. Symlinks are followed. Raise FileNotFoundError if the path doesn't exist."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{str(path)!r} isn't a regular file, expected one")


def replace_text(path: Path, text: str) -> None:
    """Write a file, or replace it whole: after an error, such as a full disk, the old one stays."""
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(text.encode())
    os.replace(partial, path)


def what_to_do(path: str | Path) -> str:
    """The likely reason why a file can't be read and the remedy, as the end of a message."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            start, size = file.read(512), os.fstat(file.fileno()).st_size
    except (OSError, ValueError):  # not on this machine, or not a file
        return "download it again"
    return seems(start) or (
        f"it has {size:,} bytes, which may be an interrupted download: compare it with "
        "checklist.chk (python -m llama verify) or download it again"
    )


def seems(start: bytes) -> str | None:
    """Cause and remedy if a file starts like a common wrong download; else None."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "it is empty: the download did not start, or the disk was full; download it again"
    if start.startswith(b"version https://git-lfs."):
        return "it is a Git LFS pointer, not the file: run 'git lfs pull' where it was cloned"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return (
            "it is a web page or an error message of the server: the link has expired, or needs a "
            "login; download it again"
        )
    if start.startswith(b"GGUF"):
        return "it is a GGUF file (llama.cpp): download Meta's or Hugging Face's layout instead"
    if start.startswith(_FORMER_TORCH):
        return (
            "it is in the format of torch before 1.6, which isn't read: if you trust it, load it "
            "with torch.load(path, weights_only=True) and save it again with torch.save"
        )
    return None


def expanded(path: str | Path) -> Path:
    """The path with ``~`` expanded. An unknown user's is left as it is: it won't be found."""
    return Path(os.path.expanduser(path))


def read_bounded(path: Path, largest: int) -> bytes:
    """Read a file of at most ``largest`` bytes.

    Raises:
        FileNotFoundError: the file doesn't exist.
        ValueError: it is a pipe or a device, or too large.
    """
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"{size:,} bytes are too many, expected at most {largest:,}")
    return data


def read_json(path: Path, largest: int = LARGEST_CONFIG) -> dict[str, Any]:
    """Read a file with a JSON object of at most ``largest`` bytes.

    Raises:
        FileNotFoundError: the file doesn't exist.
        ValueError: it contains anything else.
    """
    try:
        found = parse_json(read_bounded(path, largest))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(path)!r} is missing: download it again") from error
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON ({error}): {what_to_do(path)}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is {found!r:.60}, expected a JSON object")
    return found


def parse_json(data: bytes) -> Any:
    """Parse JSON with bounded memory.

    Raises:
        ValueError: it isn't valid JSON, is nested too deeply, or has millions of values.
    """
    check_values(data)
    try:
        return json.loads(data.decode())
    except RecursionError as error:
        raise ValueError(str(error)) from None


def check_values(data: bytes) -> None:
    """Raise ValueError for JSON of millions of values."""
    if data.count(b"{") + data.count(b"[") + data.count(b",") > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values")


def md5(path: Path, read: Callable[[int], Any] = lambda _: None) -> str:
    """MD5 sum of a file; ``read`` is called with the number of bytes of each chunk read."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(2**24):
            digest.update(piece)
            read(len(piece))
    return digest.hexdigest()


def summary(error: BaseException) -> str:
    """An error on one line."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__
    return escaped(text)


def listed(names: Iterable[object]) -> str:
    """Up to ten untrusted names, as literals: they may contain terminal escape sequences."""
    every = [f"{name!r:.80}" for name in names]
    more = f", and {len(every) - 10} more" if len(every) > 10 else ""
    return ", ".join(every[:10]) + more


def escaped(text: str) -> str:
    """The text with control characters escaped, other than newline and tab."""
    return _CONTROLS.sub(lambda control: repr(control[0])[1:-1], text)


def n_steps(pattern: str) -> float:
    """Most steps of matching a regular expression with a name, which backtracks: every alternative
    of every group, from each of some 50 characters for every repetition. Infinite if it is invalid
    or has repeated groups, whose steps grow exponentially."""
    plain = pattern.replace("(?:", "(")
    if len(pattern) > 200 or re.search(r"\)[*+?{]|\(\?", plain):
        return math.inf
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return math.inf
    n_branches, n_groups = 1 + plain.count("|"), plain.count("(")
    n_repeats = sum(map(plain.count, "*+?{"))
    return float(n_branches) ** max(1, n_groups) * 50.0**n_repeats
