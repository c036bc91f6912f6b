"""``python -m llama serve``: the server as a program."""

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama.commands.options import ModelOptions, runs_model
from llama.distributed.groups import is_first_process, n_processes
from llama.driver import Driver
from llama.extras import needs_extra
from llama.files import expanded
from llama.generation import Llama
from llama.serving.engine_loop import EngineLoop

# Seconds for clients to receive their answers when the server stops.
_GRACE = 5
# Seconds for which an idle connection stays open: longer than clients keep theirs (httpx 5,
# aiohttp 15), or one of them may send a call on a connection that is just being closed.
_KEEP_ALIVE = 75


def _packages() -> Any:
    """uvicorn, and the module of the application."""
    with needs_extra("the server needs fastapi and uvicorn", "serve"):
        import uvicorn

        from llama.serving import app
    return uvicorn, app


@runs_model(max_seq_len=None, max_batch_size=8)
def serve(
    model: ModelOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    model_name: str | None = None,
    cors: str | None = None,
    max_queue: int = 256,
) -> None:
    """Serve OpenAI's API, for any number of clients at once.

    Up to max_batch_size requests run together. Calls without a seed draw theirs from one generator.
    On Ctrl-C or SIGTERM, the requests that run are finished, and others are refused.

    Args:
        host: address to listen on; 0.0.0.0 for all of this machine's.
        port: to listen on; 0: any free one.
        api_key: key that clients must send; better as LLAMA_API_KEY in the environment, because
            other users of this machine can read command lines.
        model_name: name of the model for clients; default: the folder's, or the hub id.
        cors: origins whose web pages may call the server, separated by commas; * for all.
        max_queue: number of requests that may wait; further calls are refused with status 429.
    """
    if max_queue < 0:
        raise ValueError(f"--max_queue is {max_queue}, expected 0 or more")
    if not 0 <= port < 2**16:  # getaddrinfo would take the lower 16 bits
        raise ValueError(f"--port is {port}, expected 0 to 65535")
    if api_key == "":
        raise ValueError("--api_key is empty: leave it out for a server without a key")
    if not is_first_process():
        _follow(model.build())
        return
    packages = _packages()
    with _bound_socket(host, port) as listener:  # before the weights are read
        llm = model.build()
        folder = Path(expanded(model.ckpt_dir))
        options = {
            "model_name": model_name or (folder.resolve().name if folder.exists() else str(folder)),
            "api_key": api_key or os.environ.get("LLAMA_API_KEY") or None,
            "cors": [origin for origin in (cors or "").split(",") if origin],
            "seed": model.seed,
        }
        with Driver(llm) as driver:
            engine_loop = EngineLoop(llm, driver, max_queue)
            app = packages[1].build_app(llm, engine_loop, **options)
            with _signals(engine_loop), _served(app, listener, packages[0], engine_loop):
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                print(f"Serving {options['model_name']} on http://{shown}:{port}/v1", flush=True)
                if options["api_key"] is None and not ipaddress.ip_address(host).is_loopback:
                    print(f"Without a key, whoever reaches {shown} can use it: set LLAMA_API_KEY")
                engine_loop.run()


def _follow(llm: Llama) -> None:
    """On the other ranks. Signals are left to the first one, which may have requests to finish."""
    with Driver(llm) as driver, _handlers(signal.SIG_IGN):
        driver.follow()


def _bound_socket(host: str, port: int) -> socket.socket:
    """A socket that doesn't listen yet: clients that connect early are refused.

    Raises:
        OSError: the address can't be used.
    """
    try:
        [family, kind, protocol, _, address], *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":  # elsewhere it lets two servers use one port
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise _cant_listen((host, port), error) from None
    return listener


def _cant_listen(address: Sequence[Any], error: OSError) -> OSError:
    host, port = address[:2]
    return OSError(f"can't listen on {host}, port {port} ({error}): give another --host or --port")


@contextlib.contextmanager
def _served(
    app: Any, listener: socket.socket, uvicorn: Any, engine_loop: EngineLoop
) -> Iterator[None]:
    """Serve HTTP in another thread: the engine keeps the main one, whose torch settings and
    device it was built with. When HTTP ends, so does ``engine_loop``, and the other way round.

    Raises:
        OSError: the socket can't listen.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_GRACE,
        timeout_keep_alive=_KEEP_ALIVE,
    )
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(_WithoutMessages())
    server = uvicorn.Server(config)
    failures: list[Exception] = []

    def run() -> None:
        try:
            server.run(sockets=[listener])
        except OSError as error:  # another server has begun to listen since
            failures.append(_cant_listen(listener.getsockname(), error))
        except Exception as error:
            failures.append(error)
        finally:
            engine_loop.stop()

    thread = threading.Thread(target=run, name="llama http")
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.005)
        if not failures:
            yield
    finally:
        server.should_exit = True
        thread.join()
    if failures:
        raise failures[0]


def _signals(engine_loop: EngineLoop) -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM and Ctrl-C stop the loop; a second Ctrl-C ends the program. torchrun sends the
    signals that it gets to all ranks, so that there a second one isn't the user's."""

    def handle(number: int, frame: object) -> None:
        if engine_loop.is_stopping and number == signal.SIGINT and n_processes() == 1:
            raise KeyboardInterrupt
        engine_loop.stop()

    return _handlers(handle)


@contextlib.contextmanager
def _handlers(handler: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """Handle SIGTERM and SIGINT. The watchdog leaves SIGTERM to such a handler."""
    previous = {n: signal.signal(n, handler) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


class _WithoutMessages(logging.Filter):
    """Logs where an exception was raised, without its message, which may quote a prompt; and
    nothing of clients that have gone away."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.format_tb(record.exc_info[2])
            record.exc_text = "".join([*frames, record.exc_info[0].__name__])
        record.msg = str(record.msg).partition("\n")[0]  # in further lines, asyncio has the message
        return record.msg != "socket.send() raised exception."
