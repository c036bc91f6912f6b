"""Build, generate and convert without what Windows lacks (the test of it is test_windows.py)."""

import ctypes
import fcntl
import mmap
import os
import platform
import select
import signal
import sys
from pathlib import Path
from typing import Any

import fire  # noqa: F401
import torch.distributed.elastic

# Only llama is imported after this: what it finds missing, it must not use.
for module, names in {
    mmap: ["MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_SHARED", "MADV_DONTNEED", "MADV_HUGEPAGE"],
    os: ["register_at_fork", "sysconf", "sysconf_names", "fork", "sched_getaffinity"],
    select: ["poll"],
    signal: ["pthread_sigmask", "SIGKILL", "SIGSTOP"],
}.items():
    for name in names:
        delattr(module, name)
platform.system = lambda: "Windows"
real = {"CDLL": ctypes.CDLL, "exists": os.path.exists, "is_file": Path.is_file, "fsync": os.fsync}


def library(name: str | None, *args: Any, **kwargs: Any) -> ctypes.CDLL:
    if name is None:
        raise TypeError("argument of type 'NoneType' is not iterable")
    return real["CDLL"](name, *args, **kwargs)


def fsync(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    real["fsync"](descriptor)


def write_text(path: Path, text: str) -> None:
    path.write_bytes(text.replace("\n", "\r\n").encode())


def is_posix(path: str | Path) -> bool:
    return str(path).startswith(("/dev/", "/proc/"))


ctypes.CDLL = library
os.fsync = fsync
os.path.exists = lambda path: not is_posix(path) and real["exists"](path)
Path.is_file = lambda path: not is_posix(path) and real["is_file"](path)
Path.write_text = write_text

from llama import Llama, __main__, memory  # noqa: E402

assert memory.free_bytes(torch.device("cpu"), 1) is None
folder, new = sys.argv[1:]
sys.argv[1:] = ["convert", folder, new, "--mp", "2"]
__main__.main()
sys.argv[1:] = ["verify", new]
__main__.main()
llm = Llama.build(new, device="cpu")
answer = llm.chat_completion([[{"role": "user", "content": "What is 23 + 45?"}]], temperature=0)
print(answer[0]["generation"]["content"])
