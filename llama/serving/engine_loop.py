"""The engine's side of the server: one thread steps it, for the requests of all API calls."""

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence

from llama.driver import Driver
from llama.generation import Llama
from llama.request import Request, TokenEvent

Events = list[tuple[Request, TokenEvent]]

_POLL = 0.5  # seconds; on Windows, signal handlers run only between two waits


class QueueFullError(RuntimeError):
    """As many requests are running and waiting as the server allows."""


class StoppingError(RuntimeError):
    """The server is stopping, and doesn't start requests."""


class Call:
    """The requests of one API call. Create it in a coroutine, which then iterates ``steps``.

    Args:
        seeds: of each request's generator.
    """

    def __init__(self, requests: Sequence[Request], seeds: Sequence[int]) -> None:
        self.requests, self.seeds = list(requests), list(seeds)
        self.n_left = len(requests)  # that haven't finished; the engine's thread counts them
        self._asyncio_loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Events | Exception | None] = asyncio.Queue()

    async def steps(self) -> AsyncIterator[Events]:
        """The events of each step, until all requests have finished.

        Raises:
            FloatingPointError: logits aren't finite.
            StoppingError: the server stopped before all of them had started, or failed.
        """
        while (step := await self._steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            yield step

    def deliver(self, step: Events | Exception | None) -> None:
        """Hand a step to ``steps`` from another thread; None is the end."""
        with contextlib.suppress(RuntimeError):  # the asyncio loop is closed
            self._asyncio_loop.call_soon_threadsafe(self._steps.put_nowait, step)


class EngineLoop:
    """Runs API calls on the engine: their requests join and leave the batch between steps.

    ``submit`` and ``cancel`` may be called in any thread, and ``stop`` also in a signal handler.

    Args:
        max_queue: requests that may wait for a slot, at least; a call isn't divided.
    """

    def __init__(self, llm: Llama, driver: Driver, max_queue: int) -> None:
        self._driver = driver
        self._n_slots = llm.model.params.max_batch_size
        self._capacity = self._n_slots + max_queue
        self.is_stopping = False
        # a call to add, one to cancel, or a reason to look at is_stopping. Unlike other queues,
        # SimpleQueue.put may interrupt itself, as a signal handler does.
        self._inbox: queue.SimpleQueue[tuple[Call, bool] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._n_open = 0  # requests that were submitted and haven't ended
        # only used by the thread of ``run``:
        self._waiting: deque[tuple[Request, int, Call]] = deque()
        self._running: dict[Request, Call] = {}

    def submit(self, call: Call) -> None:
        """Run the requests of a call as slots become free.

        Raises:
            QueueFullError: the queue is full.
            StoppingError: the server is stopping.
        """
        with self._lock:
            if self.is_stopping:
                raise StoppingError("the server is stopping")
            if self._n_open >= self._capacity:
                raise QueueFullError(
                    f"{self._n_open} requests are running or waiting, and the server allows "
                    f"{self._capacity} (--max_batch_size plus --max_queue): try again later"
                )
            self._n_open += len(call.requests)
            self._inbox.put((call, False))

    def cancel(self, call: Call) -> None:
        """End a call before the next step, and free its slots; does nothing if it has ended."""
        self._inbox.put((call, True))

    def stop(self) -> None:
        """Let ``run`` return once the requests that hold slots have finished."""
        self.is_stopping = True
        self._inbox.put(None)

    def run(self) -> None:
        """Step until ``stop``. Under torchrun, on the first rank.

        Raises:
            RankError: another rank has failed or is gone.
            Exception: a step failed otherwise than by logits that aren't finite, which only ends
                the calls that run.
        """
        refusal = StoppingError("the server has stopped")
        try:
            while not self.is_stopping or self._driver.is_busy:
                self._receive()
                if self.is_stopping:
                    self._fail([call for _, _, call in self._waiting], refusal)
                while self._waiting and len(self._running) < self._n_slots:
                    request, seed, call = self._waiting.popleft()
                    self._running[request] = call
                    self._driver.add(request, seed)
                if self._driver.is_busy:
                    self._step()
        except Exception as error:
            refusal = StoppingError(f"the server failed ({type(error).__name__}) and stops")
            raise
        finally:
            with self._lock:  # no call is submitted after this
                self.is_stopping = True
            self._receive()
            waiting = [call for _, _, call in self._waiting]
            self._fail([*waiting, *self._running.values()], refusal)

    # --- In the thread of ``run`` -----------------------------------------------------------------

    def _receive(self) -> None:
        """Take what has come in; if there is nothing to do, wait for it."""
        is_idle = not (self.is_stopping or self._waiting or self._driver.is_busy)
        with contextlib.suppress(queue.Empty):
            item = self._inbox.get(block=is_idle, timeout=_POLL)
            while True:
                if item is not None:
                    call, is_cancelled = item
                    if is_cancelled:
                        for request in self._remove(call):
                            self._driver.cancel(request)
                    else:
                        pairs = zip(call.requests, call.seeds, strict=True)
                        self._waiting.extend((*pair, call) for pair in pairs)
                item = self._inbox.get(block=False)

    def _step(self) -> None:
        try:
            events = self._driver.step()
        except FloatingPointError as error:
            self._fail(self._running.values(), error)
            return
        by_call: dict[Call, Events] = {}
        for request, event in events:
            if call := self._running.get(request):
                by_call.setdefault(call, []).append((request, event))
        finished = [request for request in self._running if request.finish_reason]
        for request in finished:
            call = self._running.pop(request)
            call.n_left -= 1
            by_call.setdefault(call, [])  # one without room to generate has no events
        self._close(len(finished))  # first: the client may send its next call at once
        for call, its_events in by_call.items():
            if its_events:
                call.deliver(its_events)
            if call.n_left == 0:
                call.deliver(None)

    def _fail(self, calls: Iterable[Call], error: Exception) -> None:
        for call in list(dict.fromkeys(calls)):
            for request in self._remove(call):
                self._driver.cancel(request)
            call.deliver(error)

    def _remove(self, call: Call) -> list[Request]:
        """Forget a call. Returns those of its requests that the engine has."""
        running = [request for request, other in self._running.items() if other is call]
        for request in running:
            del self._running[request]
        n_waiting = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[2] is not call)
        self._close(len(running) + n_waiting - len(self._waiting))
        return running

    def _close(self, n_requests: int) -> None:
        with self._lock:
            self._n_open -= n_requests
