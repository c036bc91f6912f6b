"""Errors in words: what a file that cannot be read seems to be instead."""

import json
import os
import stat
from pathlib import Path
from typing import Any

_LARGEST_JSON = 64 * 2**20  # an index of 405B's files has 0.1 MB


def check_regular(path: str | Path) -> None:
    """Raise ValueError for what is there but no file with an end: reading a pipe or a device could
    take for ever. Links are followed; FileNotFoundError if there is nothing."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{str(path)!r} is no regular file: give a folder of plain files")


def what_to_do(path: str | Path) -> str:
    """The likely cause why a file cannot be read and what to do, as the end of a message."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            start, size = file.read(512), os.fstat(file.fileno()).st_size
    except (OSError, ValueError):  # not on this machine, or no file
        return "download it again"
    return seems(start) or (
        f"it has {size:,} bytes, which may be an interrupted download: compare it with "
        "checklist.chk (python -m llama verify) or download it again"
    )


def seems(start: bytes) -> str | None:
    """What a file that begins like this is, and what to do, if it is a well-known mistake."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "it is empty, the download did not start or the disk was full: download it again"
    if start.startswith(b"version https://git-lfs."):
        return "it is a Git LFS pointer, not the file: run 'git lfs pull' where it was cloned"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<error")):
        return (
            "it is a web page or an error message of the server: the link has expired, or needs a "
            "login; download it again"
        )
    if start.startswith(b"GGUF"):
        return "it is llama.cpp's (GGUF): download the model in Meta's or Hugging Face's layout"
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file that holds a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    try:
        check_regular(path)
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(path)!r} is missing: download it again") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} is not valid JSON ({error}): {what_to_do(path)}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is {found!r:.60}, expected a JSON object")
    return found


def summary(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]:.300}" if lines else type(error).__name__
