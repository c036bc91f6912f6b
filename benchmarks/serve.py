"""Measure the server: the calls of many clients at once, against the same calls one by one.

python benchmarks/serve.py --folder demo/model
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import fire

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.probes import processor_and_versions  # noqa: E402


def main(
    folder: str = str(ROOT / "demo" / "model"),
    clients: int = 64,
    max_batch_size: int = 64,
    max_tokens: int = 64,
    dtype: str = "float32",
    repeats: int = 3,
    results: str | None = None,
) -> None:
    """Print the configuration and the figure, each as a JSON line.

    Args:
        folder: checkpoint folder of a model for dialogs.
        clients: calls, each with its own question, greedy.
        max_batch_size: slots of the server.
        max_tokens: of each answer.
        dtype: of the server. Only in float32 do answers not depend on their neighbours.
        repeats: pairs of one by one and at once, in turn, after a warm-up.
        results: file to which the lines are appended.
    """
    process = subprocess.Popen(  # noqa: S603 - our own program
        [
            *(sys.executable, "-m", "llama", "serve", folder, "--port", "0", "--dtype", dtype),
            *("--max_batch_size", str(max_batch_size), "--max_queue", str(clients)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        pairs = asyncio.run(_measure(_url(process), clients, max_tokens, repeats))
    finally:
        process.terminate()
        process.wait()
    configuration = {
        "figure": "configuration",
        "folder": Path(folder).name,
        "clients": clients,
        "max_batch_size": max_batch_size,
        "max_tokens": max_tokens,
        "dtype": dtype,
        "repeats": repeats,
        **processor_and_versions(),
    }
    ratios = [pair["one_by_one_s"] / pair["at_once_s"] for pair in pairs]
    figure = {
        "figure": f"{clients} clients at once: times faster than one by one",
        "unit": "x",
        "median": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "pairs": pairs,
    }
    lines = "".join(json.dumps(record) + "\n" for record in (configuration, figure))
    print(lines, end="")
    if results is not None:
        with Path(results).open("a") as file:
            file.write(lines)


def _url(process: "subprocess.Popen[str]") -> str:
    """The address that the server prints when it listens."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving "):
            return line.split()[-1]
    raise SystemExit("the server has ended")


class _Client:
    """A connection that stays open. (With httpx, the clients took as much time as the server.)"""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self._url, text = urllib.parse.urlsplit(url), json.dumps(body)
        head = f"POST {self._url.path}/chat/completions HTTP/1.1\r\nHost: {self._url.netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        self._call = (head + text).encode()

    async def connect(self) -> None:
        host, port = self._url.hostname, self._url.port
        self._reader, self._writer = await asyncio.open_connection(host, port)

    async def ask(self) -> dict[str, Any]:
        self._writer.write(self._call)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].split()[0])
        answer: dict[str, Any] = json.loads(await self._reader.readexactly(length))
        if " 200 " not in head.splitlines()[0]:
            raise SystemExit(f"the server refuses a call: {answer}")
        return answer


async def _measure(url: str, n_clients: int, max_tokens: int, repeats: int) -> list[dict[str, Any]]:
    clients = []
    for i in range(n_clients):
        question = f"What is {i % 97} + {i * 7 % 89}?"
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
        clients.append(_Client(url, body | {"max_tokens": max_tokens}))
        await clients[-1].connect()
    pairs = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        alone = [await client.ask() for client in clients]
        middle = time.perf_counter()
        together = await asyncio.gather(*(client.ask() for client in clients))
        end = time.perf_counter()
        equal = [a["choices"] == b["choices"] for a, b in zip(alone, together, strict=True)]
        pairs.append(
            {
                "one_by_one_s": middle - start,
                "at_once_s": end - middle,
                "tokens": sum(answer["usage"]["completion_tokens"] for answer in together),
                "equal_answers": sum(equal),
            }
        )
    return pairs[1:]


if __name__ == "__main__":
    fire.Fire(main)
