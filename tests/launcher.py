"""torchrun without its import time: a fork server that has imported it forks a process for each
call, which runs torchrun's own ``main``."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.distributed.run import main

_context = multiprocessing.get_context("forkserver")
# pytest's too: multiprocessing imports the parent's main module in every child
_context.set_forkserver_preload(["torch.distributed.run", "pytest.__main__"])


def launch(
    arguments: list[str], environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Equivalent of ``subprocess.run(["torchrun", *arguments])``.

    Raises:
        subprocess.TimeoutExpired: it has not ended after ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        process = _context.Process(target=_run, args=(arguments, environment, outputs))
        process.start()
        process.join(timeout)
        stdout, stderr = (path.read_text() for path in outputs)
        if process.exitcode is None:
            process.kill()  # its ranks notice and exit
            raise subprocess.TimeoutExpired(arguments, timeout, stdout, stderr)
        return subprocess.CompletedProcess(arguments, process.exitcode, stdout, stderr)


def _run(arguments: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = ["torchrun", *arguments]
    main()
