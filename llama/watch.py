"""Ranks that torchrun started together end together, and one of them says why.

A collective call waits for a rank that is gone for good. So every process has a thread that gives a
sign of life in torchrun's store twice a second, and looks at the others':

- A rank is killed: torchrun sends SIGTERM to the others, or their connections to it break.
- A rank fails: with an exception that nobody catches, or in the middle of a pass, where its
  partners wait for it.
- A rank is stopped, hangs or cannot be reached: its signs of life stay away.
- The ranks' programs differ: one has begun its next call, another is still in the last one.
- torchrun itself is gone, and its store with it.

Who learns of it first writes it to the store; only the first to do so prints it. A process that
computes, loads, or waits for its user gives signs of life, however long it takes.
"""

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from llama.files import summary

_INTERVAL = 0.5  # seconds between two signs of life
# With less, a busy machine that delays a few of them ends healthy ranks.
MIN_TIMEOUT = 4 * _INTERVAL
_LEFT = "left"  # the last sign of a process that ends of itself
_TERMINATED = "terminated"  # and of one that was told to, as the others will be
# How long the reason of a broken connection is looked for: it shows before its process has ended.
_PATIENCE = 2.0


class RankError(RuntimeError):
    """Another rank has failed or is gone; the message says which, and why."""


class Watch:
    """One process's view of the others. Needs the environment that torchrun gives.

    Attributes:
        timeout: seconds without a sign of life after which a rank is given up.
        has_told: whether this rank has said that all end.
    """

    def __init__(self, rank: int, n_ranks: int) -> None:
        self.timeout = math.inf
        self._rank = rank
        # a connection of its own: a call that waits on the process group's would hold it up
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False)
        self._store = PrefixStore(f"llama/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        self._lives = [f"life/{r}" for r in range(n_ranks)]
        self._beats = 0
        self._calls, self._in_call = 0, False
        self._has_left = self.has_told = False
        self._speaking = threading.RLock()  # held until a message is out: nobody ends before
        self._seen = [""] * n_ranks
        self._silent = [0] * n_ranks  # looks at a rank without a new sign of life
        self._astray = [0] * n_ranks  # looks at a rank that was a call ahead of this one
        self._beat()
        self._store.set(f"process/{rank}", f"{os.environ['GROUP_RANK']} {os.getpid()}")
        processes = [self._store.get(f"process/{r}").decode().split() for r in range(n_ranks)]
        self._launchers = [int(launcher) for launcher, _ in processes]
        self._pids = [int(pid) for _, pid in processes]
        self._forking = threading.local()  # the signal mask of a thread that forks
        self._alarm, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        self._hear_sigterm()
        self._next_hook = sys.excepthook
        sys.excepthook = self._uncaught
        self._thread = threading.Thread(target=self._run, name="llama watch", daemon=True)
        self._thread.start()

    # --- For the main thread --------------------------------------------------------------------

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A call that all ranks are to make together."""
        self._calls, self._in_call = self._calls + 1, True
        try:
            yield
        finally:
            self._in_call = False

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A part of it in which they wait for each other: they end if it fails on one of them.

        Raises:
            RankError: the body has raised because another rank is gone.
        """
        try:
            yield
        except (FloatingPointError, ValueError):
            raise  # what all ranks find in the same numbers
        except Exception as error:
            if isinstance(error, RuntimeError) and (reason := self.lost()):
                raise RankError(reason) from error
            self._tell(f"rank {self._rank} failed ({summary(error)})")
            raise

    def lost(self) -> str | None:
        """Why another rank cannot be reached; None if all can, as far as this one can tell."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                if reason := self._told() or self._killed() or self._ended(_LEFT):
                    return reason
            except RuntimeError:  # no store any more
                return "torchrun is gone"
            time.sleep(0.05)
        return self._ended(_TERMINATED)  # but this one was not

    def leave(self) -> None:
        """The process ends of itself. Others may go on without it, unless they wait for it."""
        with self._speaking:
            self._has_left = True
            with contextlib.suppress(RuntimeError):
                self._store.set(self._lives[self._rank], _LEFT)
        os.write(self._wake, b"\0")
        self._thread.join()

    def before_fork(self) -> None:
        """A SIGTERM for the child waits until the child has detached itself."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def after_fork(self) -> None:
        if hasattr(self._forking, "mask"):  # else the watch began while another thread forked
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def detach_child(self) -> None:
        """In a forked process: remove the rank's signal handler, pipe and excepthook. A SIGTERM to
        the child would arrive in the rank, whose pipe it shares, and its failure end all ranks."""
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            descriptor = signal.set_wakeup_fd(-1)
            if descriptor not in (-1, self._wake):  # an event loop's
                signal.set_wakeup_fd(descriptor)
        os.close(self._alarm)
        os.close(self._wake)
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._next_hook
        self.after_fork()

    # --- What goes wrong ------------------------------------------------------------------------

    def _told(self) -> str | None:
        """What a rank has said."""
        if not self._store.check(["told"]):
            return None
        return self._store.get("told").decode()

    def _killed(self) -> str | None:
        """A rank of this machine whose process is gone, though it did not leave."""
        for rank, life in enumerate(self._all_lives()):
            if life not in (_LEFT, _TERMINATED) and self._state(rank) in ("Z", "X"):
                return (
                    f"rank {rank} (process {self._pids[rank]}) was killed or has crashed; "
                    "torchrun's report has the signal (SIGKILL often means that the machine ran "
                    "out of memory)"
                )
        return None

    def _state(self, rank: int) -> str | None:
        """A rank's process's state; None if it is on another machine."""
        here = self._launchers[rank] == self._launchers[self._rank]
        return _state(self._pids[rank]) if here else None

    def _ended(self, how: str) -> str | None:
        gone = [rank for rank, life in enumerate(self._all_lives()) if life == how]
        if not gone:
            return None
        return (
            f"rank {gone[0]} has ended, and rank {self._rank} still waits for it: every rank must "
            "make the same calls"
        )

    def _tell(self, reason: str) -> None:
        """Say why all ranks end, unless one has done so."""
        with self._speaking:
            try:
                first = self._store.add("voices", 1) == 1
                if first:
                    self._store.set("told", reason)
            except RuntimeError:  # no store, and no way to agree who speaks
                first = os.environ["LOCAL_RANK"] == "0"
            if first and not self.has_told:
                self.has_told = True
                sys.stderr.write(f"llama: {reason}; all ranks end\n")  # in one piece
                sys.stderr.flush()

    def _end(self, reason: str) -> NoReturn:
        self._tell(reason)
        self._exit(1)

    def _exit(self, code: int) -> NoReturn:
        with self._speaking:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)  # the main thread may wait where no exception reaches it

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """sys.excepthook: of a failure that all ranks share, one shows the traceback."""
        is_ours = isinstance(error, RankError)
        if isinstance(error, RuntimeError) and not is_ours and (reason := self.lost()):
            error = RankError(reason)
        with self._speaking:
            if isinstance(error, RankError):
                self._tell(str(error))
            elif isinstance(error, KeyboardInterrupt):
                self._tell("interrupted")
            else:
                self._tell(f"rank {self._rank} failed ({summary(error)})")
                if self.has_told or summary(error) not in (self._told() or ""):
                    self._next_hook(kind, error, trace)

    # --- The thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            heard, _, _ = select.select([self._alarm], [], [], _INTERVAL)
            terminated = heard and signal.SIGTERM in os.read(self._alarm, 4096)
            # the user's program may have set a handler of its own since
            if terminated and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                self._terminated()
            if self._has_left:
                return
            self._look()

    def _look(self) -> None:
        try:
            self._beat()
            lives = self._all_lives()
            told = self._store.check(["told"])
        except RuntimeError:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                return  # it was the first rank's store, which may end before the others
            self._end("torchrun is gone")
        if told and not self.has_told:
            self._exit(1)
        for rank, life in enumerate(lives):
            if rank == self._rank or life in (_LEFT, _TERMINATED):
                continue
            self._silent[rank] = self._silent[rank] + 1 if life == self._seen[rank] else 0
            self._seen[rank] = life
            if self._silent[rank] * _INTERVAL >= self.timeout:
                self._give_up(rank)
            ahead = self._in_call and int(life.split()[1]) > self._calls
            self._astray[rank] = self._astray[rank] + 1 if ahead else 0
            if self._astray[rank] * _INTERVAL >= self.timeout:
                self._end(
                    f"rank {rank} has begun its call {life.split()[1]}, but rank "
                    f"{self._rank} is still in call {self._calls}: every rank must make the same "
                    "calls, and take all of a stream"
                )

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(self._lives[self._rank], f"{self._beats} {self._calls}")

    def _all_lives(self) -> list[str]:
        return [life.decode() for life in self._store.multi_get(self._lives)]

    def _give_up(self, rank: int) -> NoReturn:
        pid = self._pids[rank]
        stopped = self._state(rank) == "T"
        why = "it is stopped (SIGSTOP)" if stopped else "it hangs, or its machine is out of reach"
        self._tell(
            f"rank {rank} (process {pid}) gave no sign of life for {self.timeout:g} s: {why}"
        )
        if stopped:
            os.kill(pid, signal.SIGKILL)  # the only signal that a stopped process obeys
        self._exit(1)

    def _hear_sigterm(self) -> None:
        """Let SIGTERM, by which torchrun ends the ranks that are left, wake the thread: the main
        thread may be where it does not see signals. A handler of the user's own stays."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            return
        signal.signal(signal.SIGTERM, self._on_sigterm)
        other = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        if other != -1:  # an event loop's
            signal.set_wakeup_fd(other)

    def _on_sigterm(self, number: int, frame: object) -> None:
        os.write(self._wake, bytes([number]))

    def _terminated(self) -> NoReturn:
        with contextlib.suppress(RuntimeError):
            self._store.set(self._lives[self._rank], _TERMINATED)
            if reason := self._killed():
                self._tell(reason)
        self._exit(128 + signal.SIGTERM)


def _state(pid: int) -> str:
    """A process's state as Linux names it: Z or X if it has ended, T if it is stopped."""
    try:
        os.kill(pid, 0)
        if sys.platform != "linux":
            return "R"
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] if fields else "X"  # nothing is read of one that is just going
    except (ProcessLookupError, FileNotFoundError):
        return "X"
