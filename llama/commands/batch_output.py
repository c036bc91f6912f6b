"""The answers of ``python -m llama batch`` on disk, and how a repeated command continues them."""

import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama.commands.batch_lines import id_of
from llama.files import read_json, replace_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Output:
    """The file of answers.

    Each answer is a line, written at once when it is finished, so a process that is killed leaves
    at most its last line incomplete. The first process writes the file. Each further copy of the
    weights writes ``FILE.part-1``, ... beside it: over NFS, several machines can't append to one
    file. The first process appends the parts at the end, or when the command is repeated.

    Args:
        run: the options and the input, recorded in ``FILE.run.json``.

    Raises:
        FileNotFoundError: the folder doesn't exist.
        ValueError: the file has answers of another run, or isn't a regular file.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self._path, self._run = path, dict(run)
        self._run_path = path.with_name(f"{path.name}.run.json")
        self._file: io.FileIO | None = None
        # on the first process: the numbers of the input's lines by id, and ids without an answer
        self._numbers: Mapping[str | int, int] = {}
        self._missing: set[str | int] = set()
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path} is in a folder that doesn't exist")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} isn't a regular file, expected one, or none")
        if (path.exists() and path.stat().st_size > 0) or self._parts():
            self._check_run()

    def _check_run(self) -> None:
        if not self._run_path.exists():
            raise ValueError(
                f"{self._path} exists, but {self._run_path.name}, which would have the options it "
                "was written with, doesn't: give another output"
            )
        before = read_json(self._run_path)
        changes = [
            f"{name} was {before.get(name)!r}, is {self._run.get(name)!r}"
            for name in before | self._run
            if before.get(name) != self._run.get(name)
        ]
        if changes:
            raise ValueError(
                f"{self._path} has the answers of another run ({'; '.join(changes)}): repeat the "
                "command with the same input and options, or give another output"
            )

    def begin(self, numbers: Mapping[str | int, int]) -> list[int]:
        """Read the answers that are there, and open the file for more; on the first process.

        Args:
            numbers: of the lines of the input, by id.

        Returns:
            The numbers of the lines that have no answer.

        Raises:
            ValueError: the file has lines that don't answer lines of the input, or another process
                has it open.
        """
        self._numbers, self._missing = numbers, set(numbers)
        self._file = _open_locked(self._path)
        if self._path.stat().st_size > 0:  # written since, by a command that has ended
            self._check_run()
        replace_text(self._run_path, json.dumps(self._run, indent=1))
        size = 0
        for key, text in self._answers(self._path):
            if key not in self._missing:
                raise ValueError(
                    f"{self._path} has two lines with the id {key!r:.80}: remove one of them, or "
                    "give another output"
                )
            self._missing.remove(key)
            size += len(text)
        self._file.truncate(size)
        self._append_parts()
        return sorted(numbers[key] for key in self._missing)

    def open_part(self, replica: int) -> None:
        """Open the part of a further copy of the weights, on its first rank.

        Raises:
            ValueError: the folder isn't the first process's.
        """
        if not self._run_path.exists():
            raise ValueError(
                f"{self._run_path} doesn't exist on this machine, but the first process has "
                "written it: give an output in a folder that all machines share"
            )
        self._file = _open_locked(self._path.with_name(f"{self._path.name}.part-{replica}"))

    def write(self, key: str | int, answer: bytes) -> None:
        assert self._file is not None
        _write(self._file, answer)
        self._missing.discard(key)

    def end(self) -> None:
        """Append the parts, which have been closed; on the first process.

        Raises:
            ValueError: answers are missing.
        """
        self._append_parts()
        if self._missing:
            raise ValueError(
                f"{len(self._missing)} answers aren't in {self._path}: give an output in a folder "
                "that all machines share, or copy the parts from the other machines there and "
                "repeat the command"
            )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _parts(self) -> list[Path]:
        name = re.compile(re.escape(self._path.name) + r"\.part-\d+")
        return sorted(path for path in self._path.parent.iterdir() if name.fullmatch(path.name))

    def _append_parts(self) -> None:
        for path in self._parts():
            with _open_locked(path):
                for key, text in self._answers(path):
                    if key in self._missing:  # else it was appended, but the part not removed
                        self.write(key, text)
                assert self._file is not None
                os.fsync(self._file.fileno())
                path.unlink()

    def _answers(self, path: Path) -> Iterator[tuple[str | int, bytes]]:
        """The lines of a file with their ids, without a last one that doesn't end."""
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if text.endswith(b"\n"):
                    key = id_of(text)
                    if key not in self._numbers:
                        raise ValueError(
                            f"line {number} of {path} is {text[:60]!r}, which doesn't answer a "
                            "line of the input: remove it, or give another output"
                        )
                    yield key, text


def _open_locked(path: Path) -> io.FileIO:
    """A file to append to, closed to other processes that call this, where the file system has
    locks: torchrun's processes may outlive it by seconds."""
    file = io.FileIO(path, "a")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"another process is writing {path}: wait until it has ended, or give another output"
        ) from None
    except OSError:
        pass
    return file


def _write(file: io.FileIO, data: bytes) -> None:
    while data:  # one write, unless the disk is full or a signal arrives
        data = data[file.write(data) :]
