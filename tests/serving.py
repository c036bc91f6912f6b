"""A server in this process, or as a program, for the tests."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from conftest import environment

from llama import Llama
from llama.driver import Driver
from llama.request import Request, TokenEvent
from llama.serving.app import build_app
from llama.serving.command import _bound_socket, _served
from llama.serving.engine_loop import EngineLoop

NAME = "demo"


class GatedDriver(Driver):
    """A driver whose steps tests can count and hold back."""

    def __init__(self, llm: Llama) -> None:
        super().__init__(llm)
        self.n_begun = self.n_steps = 0
        self.failure: Exception | None = None  # raised by the next step
        self._is_held = False
        self._allowed = threading.Semaphore(0)

    def step(self) -> list[tuple[Request, TokenEvent]]:
        self.n_begun += 1
        if self._is_held:
            self._allowed.acquire()
        failure, self.failure = self.failure, None
        try:
            if failure is not None:
                self._engine.cancel_all()
                raise failure
            return super().step()
        finally:
            self.n_steps += 1

    def hold(self) -> None:
        """Only do the steps of ``allow`` from now on."""
        self._is_held = True

    def allow(self, n_steps: int) -> None:
        """Returns when they are done."""
        if n_steps == 0:
            return
        wanted = self.n_steps + n_steps
        self._allowed.release(n_steps)
        wait_until(lambda: self.n_steps >= wanted)

    def go_on(self) -> None:
        self._is_held = False
        self._allowed.release()


class Server:
    """
    Attributes:
        url: with the path /v1.
        http: a client of the address without it.
        loop_thread: runs ``engine_loop``.
    """

    def __init__(self, llm: Llama, driver: GatedDriver, url: str, max_queue: int) -> None:
        self.llm, self.driver, self.url = llm, driver, url
        self.engine_loop = EngineLoop(llm, driver, max_queue)
        self.loop_thread = threading.Thread(target=self._run)
        self.error: BaseException | None = None
        self.http = httpx.Client(base_url=url.removesuffix("/v1"), timeout=60)

    def _run(self) -> None:
        try:
            self.engine_loop.run()
        except RuntimeError as error:
            self.error = error

    @property
    def n_free(self) -> int:
        return self.llm.engine.slots.n_free

    @property
    def n_slots(self) -> int:
        return self.llm.model.params.max_batch_size

    def client(self, **options: Any) -> openai.OpenAI:
        given: dict[str, Any] = {"api_key": "unused", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(base_url=self.url, **{**given, **options})

    def wait_until_free(self) -> None:
        wait_until(lambda: self.n_free == self.n_slots)


@contextlib.contextmanager
def serving(llm: Llama, max_queue: int = 256, **options: Any) -> Iterator[Server]:
    """A server with an engine of its own, on the model of ``llm``."""
    llm = Llama(llm.model, llm.tokenizer)
    driver = GatedDriver(llm)
    with _bound_socket("127.0.0.1", 0) as listener, driver:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server = Server(llm, driver, url, max_queue)
        app = build_app(llm, server.engine_loop, model_name=NAME, **options)
        with server.http, _served(app, listener, uvicorn, server.engine_loop):
            server.loop_thread.start()
            try:
                yield server
            finally:
                driver.go_on()
                server.engine_loop.stop()
                server.loop_thread.join()


def wait_until(holds: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, "it hasn't happened"
        time.sleep(0.002)


class Program:
    """``python -m llama serve`` as a process."""

    def __init__(
        self, *options: str | Path, launcher: tuple[str, ...] = (), env: Mapping[str, str] = {}
    ) -> None:
        command = [*(launcher or (sys.executable,)), "-m", "llama", "serve", *map(str, options)]
        self.process = subprocess.Popen(
            [*command, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(env),
        )
        assert self.process.stdout is not None
        self.stdout = ""
        for line in self.process.stdout:
            self.stdout += line
            if line.startswith("Serving "):
                self.url = line.split()[-1]
                break
        else:
            raise AssertionError(self.wait())

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal and wait. Returns the exit status, stdout and stderr."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        try:
            stdout, stderr = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, self.stdout + stdout, stderr
