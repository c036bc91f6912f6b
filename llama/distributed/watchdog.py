"""Fail-fast watchdog: if one rank dies or hangs, all ranks exit and exactly one reports why.

A collective hangs forever once a rank is gone. So each process runs a thread that writes a
heartbeat to torchrun's store twice a second and reads those of the others. It detects that

- a rank is killed: torchrun sends SIGTERM to the others, or their connections to it break;
- a rank fails with an uncaught exception, or in a collective, where the others wait for it;
- a rank is stopped, hangs or can't be reached: its heartbeat stops;
- the ranks diverge: one has begun its next call, or has ended, while another is still in the
  previous one;
- torchrun itself is gone, and its store with it.

The first rank to notice writes the reason to the store and prints it. A process that is computing,
loading or waiting for user input keeps sending heartbeats.
"""

import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from llama.files import summary

_INTERVAL = 0.5  # seconds between two heartbeats
# With less, delayed heartbeats on a busy machine would kill healthy ranks.
MIN_TIMEOUT = 4 * _INTERVAL
# Final heartbeats: of a process that exits on its own, and of one that got SIGTERM.
_LEFT = "left"
_TERMINATED = "terminated"
# Seconds to look for the cause of a broken connection: it breaks before the process has exited.
_PATIENCE = 2.0


class RankError(RuntimeError):
    """Another rank has failed or is gone; the message names it and the cause."""


class Watchdog:
    """Monitors the other ranks from one process. Needs torchrun's environment variables.

    Attributes:
        timeout: seconds without a heartbeat after which a rank counts as lost.
        has_reported: whether this rank has printed why all ranks exit.
    """

    def __init__(self, rank: int, n_ranks: int) -> None:
        self.timeout = math.inf
        self._rank = rank
        # its own connection: on the process group's, it would queue behind blocking calls
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # use_libuv chooses the server's implementation, but torch for Windows, which is built
        # without libuv, refuses it in clients too
        store = TCPStore(address, port, is_master=False, use_libuv=False)
        self._store = PrefixStore(f"llama/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        self._keys = [f"heartbeat/{r}" for r in range(n_ranks)]
        self._n_beats = 0
        self._n_calls, self._in_call = 0, False
        self._partners: Sequence[int] = ()  # the ranks of the call in progress
        self._has_left = self.has_reported = False
        self._report_lock = threading.RLock()  # held until a report is printed, to delay exits
        self._seen = [""] * n_ranks
        self._missed = [0] * n_ranks  # consecutive checks without a new heartbeat
        self._ahead = [0] * n_ranks  # consecutive checks with the rank a call ahead
        self._absent = [0] * n_ranks  # consecutive checks with the rank gone during a call
        self._beat()
        self._store.set(f"process/{rank}", f"{os.environ['GROUP_RANK']} {os.getpid()}")
        processes = [self._store.get(f"process/{r}").decode().split() for r in range(n_ranks)]
        self._launchers = [int(launcher) for launcher, _ in processes]
        self._pids = [int(pid) for _, pid in processes]
        self._forking = threading.local()  # the signal mask of a thread that forks
        # sockets: on Windows, neither select nor set_wakeup_fd takes pipes
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._handle_sigterm()
        self._previous_hook = sys.excepthook
        sys.excepthook = self._uncaught
        self._thread = threading.Thread(target=self._run, name="llama watchdog", daemon=True)
        self._thread.start()

    # --- For the main thread --------------------------------------------------------------------

    @contextlib.contextmanager
    def call(self, ranks: Sequence[int] = ()) -> Iterator[None]:
        """A call that all ranks make together.

        Args:
            ranks: those that this one waits for during the call.
        """
        self._partners = ranks
        self._n_calls, self._in_call = self._n_calls + 1, True
        try:
            yield
        finally:
            self._in_call = False

    @contextlib.contextmanager
    def fail_fast(self) -> Iterator[None]:
        """A section in which ranks wait for each other: if it fails on one, all exit.

        Raises:
            RankError: the body failed because another rank is gone.
        """
        try:
            yield
        except (FloatingPointError, ValueError):
            raise  # every rank raises this for the same tensors
        except Exception as error:
            if isinstance(error, RuntimeError) and (reason := self.find_lost_rank()):
                raise RankError(reason) from error
            self._report(f"rank {self._rank} failed ({summary(error)})")
            raise

    def find_lost_rank(self) -> str | None:
        """Why another rank can't be reached; None if none is known to be gone."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                if reason := self._reported() or self._killed() or self._ended(_LEFT):
                    return reason
            except RuntimeError:  # the store is gone
                return "torchrun is gone"
            time.sleep(0.05)
        return self._ended(_TERMINATED)

    def stop(self) -> None:
        """Mark this process as exited. The others may continue unless they wait for it."""
        with self._report_lock:
            self._has_left = True
            with contextlib.suppress(RuntimeError):
                self._store.set(self._keys[self._rank], _LEFT)
            if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                with contextlib.suppress(ValueError):  # in another thread than the main one
                    # leaving the groups may block (NCCL waits for the others), and nothing would
                    # act on SIGTERM
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._wake_writer.send(b"\0")
        self._thread.join()

    def before_fork(self) -> None:
        """Block SIGTERM until the child has called ``detach_child``."""
        self._forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def after_fork(self) -> None:
        if hasattr(self._forking, "mask"):  # else the watchdog started while another thread forked
            signal.pthread_sigmask(signal.SIG_SETMASK, self._forking.mask)

    def detach_child(self) -> None:
        """In a forked process: remove the rank's signal handler, sockets and excepthook. Otherwise
        a SIGTERM to the child would reach the rank through the shared sockets and end all ranks."""
        if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            descriptor = signal.set_wakeup_fd(-1)
            if descriptor not in (-1, self._wake_writer.fileno()):  # an event loop's
                signal.set_wakeup_fd(descriptor)
        self._wake_reader.close()
        self._wake_writer.close()
        if sys.excepthook == self._uncaught:
            sys.excepthook = self._previous_hook
        self.after_fork()

    # --- Failures -------------------------------------------------------------------------------

    def _reported(self) -> str | None:
        """The reason reported by a rank, if any."""
        if not self._store.check(["report"]):
            return None
        return self._store.get("report").decode()

    def _killed(self) -> str | None:
        """Find a rank on this machine whose process died without a report."""
        # states first: a process writes its final heartbeat before it exits
        dead = [rank for rank in range(len(self._pids)) if self._state(rank) in ("Z", "X")]
        beats = self._heartbeats() if dead else []
        for rank in dead:
            if beats[rank] not in (_LEFT, _TERMINATED):
                return (
                    f"rank {rank} (process {self._pids[rank]}) was killed or has crashed; "
                    "torchrun's report has the signal (SIGKILL often means that the machine ran "
                    "out of memory)"
                )
        return None

    def _state(self, rank: int) -> str | None:
        """State of a rank's process; None on another machine."""
        here = self._launchers[rank] == self._launchers[self._rank]
        return _state(self._pids[rank]) if here else None

    def _ended(self, how: str) -> str | None:
        gone = [rank for rank, beat in enumerate(self._heartbeats()) if beat == how]
        return self._waits_for(gone[0]) if gone else None

    def _waits_for(self, rank: int) -> str:
        return (
            f"rank {rank} has ended, and rank {self._rank} still waits for it: every rank must "
            "make the same calls"
        )

    def _report(self, reason: str) -> None:
        """Print why all ranks exit, unless another rank already has."""
        with self._report_lock:
            try:
                first = self._store.add("n_reports", 1) == 1
                if first:
                    self._store.set("report", reason)
            except RuntimeError:  # no store, so the ranks can't agree on who reports
                first = os.environ["LOCAL_RANK"] == "0"
            if first and not self.has_reported:
                self.has_reported = True
                sys.stderr.write(f"llama: {reason}; all ranks exit\n")  # one write, one line
                sys.stderr.flush()

    def _report_and_exit(self, reason: str) -> NoReturn:
        self._report(reason)
        self._exit(1)

    def _exit(self, code: int) -> NoReturn:
        with self._report_lock:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)  # the main thread may be blocked where no exception reaches it

    def _uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """sys.excepthook: one rank shows the traceback of a failure that all ranks share."""
        is_ours = isinstance(error, RankError)
        if isinstance(error, RuntimeError) and not is_ours and (reason := self.find_lost_rank()):
            error = RankError(reason)
        with self._report_lock:
            if isinstance(error, RankError):
                self._report(str(error))
            elif isinstance(error, KeyboardInterrupt):
                self._report("interrupted")
            else:
                self._report(f"rank {self._rank} failed ({summary(error)})")
                if self.has_reported or summary(error) not in (self._reported() or ""):
                    self._previous_hook(kind, error, trace)

    # --- The thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._wake_reader], [], [], _INTERVAL)
            terminated = ready and signal.SIGTERM in self._wake_reader.recv(4096)
            # the user's program may have installed its own handler since
            if terminated and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                self._terminated()
            if self._has_left:
                return
            self._check()

    def _check(self) -> None:
        try:
            self._beat()
            beats = self._heartbeats()
            reported = self._store.check(["report"])
        except RuntimeError:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                return  # the first rank hosted the store, and may exit before the others
            self._report_and_exit("torchrun is gone")
        if reported and not self.has_reported:
            self._exit(1)
        for rank, beat in enumerate(beats):
            # with gloo, the connections of a rank that has left are closed, and the call fails;
            # with NCCL they stay open while that rank waits for the others in its own exit
            is_absent = beat == _LEFT and self._in_call and rank in self._partners
            self._absent[rank] = self._absent[rank] + 1 if is_absent else 0
            if self._absent[rank] * _INTERVAL >= self.timeout:
                self._report_and_exit(self._waits_for(rank))
            if rank == self._rank or beat in (_LEFT, _TERMINATED):
                continue
            self._missed[rank] = self._missed[rank] + 1 if beat == self._seen[rank] else 0
            self._seen[rank] = beat
            if self._missed[rank] * _INTERVAL >= self.timeout:
                self._report_lost(rank)
            is_ahead = self._in_call and int(beat.split()[1]) > self._n_calls
            self._ahead[rank] = self._ahead[rank] + 1 if is_ahead else 0
            if self._ahead[rank] * _INTERVAL >= self.timeout:
                self._report_and_exit(
                    f"rank {rank} has begun its call {beat.split()[1]}, but rank "
                    f"{self._rank} is still in call {self._n_calls}: every rank must make the same "
                    "calls, and consume streams to the end"
                )

    def _beat(self) -> None:
        self._n_beats += 1
        self._store.set(self._keys[self._rank], f"{self._n_beats} {self._n_calls}")

    def _heartbeats(self) -> list[str]:
        return [beat.decode() for beat in self._store.multi_get(self._keys)]

    def _report_lost(self, rank: int) -> NoReturn:
        pid = self._pids[rank]
        stopped = self._state(rank) == "T"
        why = "it is stopped (SIGSTOP)" if stopped else "it hangs, or its machine can't be reached"
        self._report(f"rank {rank} (process {pid}) sent no heartbeat for {self.timeout:g} s: {why}")
        if stopped:
            os.kill(pid, signal.SIGKILL)  # the only signal that ends a stopped process
        self._exit(1)

    def _handle_sigterm(self) -> None:
        """Let SIGTERM, which torchrun sends to the remaining ranks, wake the thread: the main
        thread may be blocked where Python runs no handlers. A user's own handler is kept."""
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            return
        signal.signal(signal.SIGTERM, self._on_sigterm)
        other = signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        if other != -1:  # an event loop's
            signal.set_wakeup_fd(other)

    def _on_sigterm(self, number: int, frame: object) -> None:
        self._wake_writer.send(bytes([number]))

    def _terminated(self) -> NoReturn:
        with contextlib.suppress(RuntimeError):
            self._store.set(self._keys[self._rank], _TERMINATED)
            if reason := self._killed():
                self._report(reason)
        self._exit(128 + signal.SIGTERM)


def _state(pid: int) -> str:
    """State of a process as Linux's letter: Z or X if it has exited, T if it is stopped."""
    if sys.platform == "win32":  # os.kill(pid, 0) would send Ctrl+C; heartbeats have to do
        return "R"
    try:
        os.kill(pid, 0)
        if sys.platform != "linux":
            return "R"
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] if fields else "X"  # an exiting process reads as empty
    except (ProcessLookupError, FileNotFoundError):
        return "X"
