"""Programs that the first rank drives, such as an interactive chat or a server.

It decides which requests start and end; the other ranks repeat that, and compute with it.
"""

import contextlib
import dataclasses
import itertools
from types import TracebackType
from typing import Any

from llama import memory
from llama.distributed import collectives
from llama.distributed.watchdog import RankError
from llama.generation import Llama
from llama.request import Request, TokenEvent
from llama.sampling import SamplingParams, new_generator


class Driver:
    """The engine of a model, driven by the first rank.

    All ranks enter it as a context. The first one adds and cancels requests and steps; the others
    only call ``follow``, which returns when the first one leaves the context.

    Raises:
        ValueError: there are several copies of the weights.
    """

    def __init__(self, llm: Llama) -> None:
        self._engine, self._groups = llm.engine, llm.model.groups
        if self._groups.n_replicas > 1:
            raise ValueError(
                f"there are {self._groups.n_replicas} copies of the weights, expected one: leave "
                "model_parallel_size out, or start the program once for each copy"
            )
        self._numbers: dict[Request, int] = {}  # of requests that haven't finished
        self._count = itertools.count()
        self._added: list[tuple[Request, int]] = []
        self._cancelled: list[Request] = []
        self._context = contextlib.ExitStack()

    def __enter__(self) -> "Driver":
        self._context.enter_context(self._groups.collective_call("Driver"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._context:
            if self.is_first and not isinstance(error, RankError):
                self._share(None)
                self._engine.cancel_all()

    @property
    def is_first(self) -> bool:
        return self._groups.rank == 0

    @property
    def is_busy(self) -> bool:
        """Whether requests are waiting or running."""
        return bool(self._added) or self._engine.is_busy

    def add(self, request: Request, seed: int) -> None:
        """Let a request of the engine start; it draws from a generator with this seed."""
        self._numbers[request] = next(self._count)
        self._added.append((request, seed))

    def cancel(self, request: Request) -> None:
        """End a request before the next step computes, and free its slot."""
        self._cancelled.append(request)

    def step(self) -> list[tuple[Request, TokenEvent]]:
        """``Engine.step``, on all ranks.

        Raises:
            FloatingPointError: logits aren't finite. All requests are cancelled; others may follow.
            torch.OutOfMemoryError: the message has the memory plan.
            RankError: another rank has failed or is gone.
        """
        self._share(
            {
                "added": [[r.prompt, dataclasses.asdict(r.params), s] for r, s in self._added],
                "cancelled": [self._numbers[r] for r in self._cancelled if r in self._numbers],
            }
        )
        engine = self._engine
        with memory.explain_oom(lambda: memory.plan_of(engine.model, engine.max_prefill_tokens)):
            return self._advance()

    def follow(self) -> None:
        """Repeat the steps of the first rank until it leaves the context.

        Raises:
            RankError: another rank has failed or is gone.
        """
        while (command := self._share(None)) is not None:
            for prompt, params, seed in command["added"]:
                self.add(self._engine.request(prompt, SamplingParams(**params)), seed)
            by_number = {number: request for request, number in self._numbers.items()}
            for number in command["cancelled"]:
                self.cancel(by_number[number])
            with contextlib.suppress(FloatingPointError):  # the first rank reports it
                self._advance()

    def _advance(self) -> list[tuple[Request, TokenEvent]]:
        added, self._added = self._added, []
        cancelled, self._cancelled = self._cancelled, []
        for request, seed in added:
            self._engine.add([request], new_generator(seed, self._engine.model.device))
        for request in cancelled:
            self._engine.cancel(request)
        try:
            return self._engine.step()
        finally:
            self._numbers = {r: n for r, n in self._numbers.items() if not r.finish_reason}

    def _share(self, command: Any) -> Any:
        """The first rank's command."""
        return collectives.broadcast_json(command, self._groups.control)
