"""download.sh against a local HTTP server, with curl and with wget.

Every run checks these invariants: the link's signature appears nowhere, and a file only has its
final name once it is complete and correct.
"""

import contextlib
import functools
import hashlib
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from urllib.parse import unquote

import pytest
from llama_models.sku_list import (
    llama3_1_family,
    llama3_2_family,
    llama3_3_family,
    llama_meta_net_info,
)
from llama_models.sku_types import CheckpointQuantizationFormat, is_multimodal

SCRIPT = Path(__file__).resolve().parent.parent / "download.sh"
TOOLS = ("awk", "bash", "cat", "head", "mkdir", "mv", "rm", "sleep", "tr", "wc")
SECRET = "SeCrEt"
# Characters that are special to curl, wget or a shell
QUERY = f"Policy=eyJ_a-b~c&Signature={SECRET}[1-3]{{a,b}}~'$(id)`id`;!*#0%2B&Key-Pair-Id=K1"
PAGE = b"<!DOCTYPE html>\n<html><body>Please log in</body></html>\n"
CUT_AT = 1200  # bytes of a body sent before the connection drops

# Published folder: path on the server, number of shards
MODELS = {
    "Meta-Llama-3-8B": ("8b_pre_trained", 1),
    "Meta-Llama-3-8B-Instruct": ("8b_instruction_tuned", 1),
    "Meta-Llama-3-70B": ("70b_pre_trained", 8),
    "Meta-Llama-3-70B-Instruct": ("70b_instruction_tuned", 8),
    "llama-2-7b": ("llama-2-7b", 1),
    "llama-2-13b": ("llama-2-13b", 2),
    "llama-2-70b": ("llama-2-70b", 8),
    "llama-2-7b-chat": ("llama-2-7b-chat", 1),
    "llama-2-13b-chat": ("llama-2-13b-chat", 2),
    "llama-2-70b-chat": ("llama-2-70b-chat", 8),
    "Llama-3.1-8B": ("Llama-3.1-8B", 1),
    "Llama-3.1-8B-Instruct": ("Llama-3.1-8B-Instruct", 1),
    "Llama-3.1-70B": ("Llama-3.1-70B", 8),
    "Llama-3.1-70B-Instruct": ("Llama-3.1-70B-Instruct", 8),
    "Llama-3.1-405B-MP8": ("Llama-3.1-405B-MP8", 8),
    "Llama-3.1-405B-MP16": ("Llama-3.1-405B-MP16", 16),
    "Llama-3.1-405B-Instruct-MP8": ("Llama-3.1-405B-Instruct-MP8", 8),
    "Llama-3.1-405B-Instruct-MP16": ("Llama-3.1-405B-Instruct-MP16", 16),
    "Llama-3.2-1B": ("Llama-3.2-1B", 1),
    "Llama-3.2-1B-Instruct": ("Llama-3.2-1B-Instruct", 1),
    "Llama-3.2-3B": ("Llama-3.2-3B", 1),
    "Llama-3.2-3B-Instruct": ("Llama-3.2-3B-Instruct", 1),
    "Llama-3.3-70B-Instruct": ("Llama-3.3-70B-Instruct", 8),
}
LLAMA_3 = [folder for folder in MODELS if folder.startswith("Meta")]
SHARD = "8b_pre_trained/consolidated.00.pth"
HUGE = "Llama-3.1-405B-MP8/consolidated.00.pth"
# The server's limit for the body of a response, which only the shards of the 405B exceed
LIMIT = 50 * 2**30


def content(path: str, size: int) -> bytes:
    """Bytes that differ from file to file, none of them a '<'."""
    return bytes(random.Random(path).choices(range(128, 256), k=size))


def checklist(files: dict[str, bytes], prefix: str = "") -> bytes:
    """The checklist for these files."""
    lines = (f"{hashlib.md5(data).hexdigest()}  {prefix}{name}\n" for name, data in files.items())
    return "".join(lines).encode()


def policies(folder: str) -> list[str]:
    """The license and the policy, as Meta's download scripts request them."""
    if folder.startswith(("Llama-3.2", "Llama-3.3")):  # there is no such script
        return []
    return ["LICENSE", "USE_POLICY" if folder in LLAMA_3 else "USE_POLICY.md"]


def publish() -> tuple[dict[str, bytes], dict[str, dict[str, str]]]:
    """All files on the server by path, and a map from local to server paths for each model."""
    tokenizer = {"tokenizer.model": content("tokenizer", 700)}
    remote = {"LICENSE": b"The licence\n", "USE_POLICY": b"Policy 3\n", "USE_POLICY.md": b"# 2\n"}
    remote |= {**tokenizer, "tokenizer_checklist.chk": checklist(tokenizer)}
    places: dict[str, dict[str, str]] = {}
    for folder, (path, shards) in MODELS.items():
        files = {"params.json": b'{"dim": 64}\n'}
        for number in range(shards):
            name = f"consolidated.{number:02d}.pth"
            files[name] = content(path + name, 3000 + number)
        if not folder.startswith("llama-2"):
            files["tokenizer.model"] = content(path, 700)
        prefix = "./" if folder.startswith("Llama-3.2") else ""
        unpublished = {"orig_params.json": b"{}"} if folder == "Llama-3.2-3B-Instruct" else {}
        files["checklist.chk"] = checklist(files | unpublished, prefix)
        remote |= {f"{path}/{name}": data for name, data in files.items()}
        places[folder] = {f"{folder}/{name}": f"{path}/{name}" for name in files}
        places[folder] |= {f"{folder}/{name}": name for name in policies(folder)}
        if folder.startswith("llama-2"):
            places[folder] |= {
                name: name for name in ("tokenizer.model", "tokenizer_checklist.chk")
            }
    return remote, places


REMOTE, PLACES = publish()
LOCAL = {
    folder: {place: REMOTE[path] for place, path in places.items()}
    for folder, places in PLACES.items()
}


class Server(ThreadingHTTPServer):
    """Serves ``files``; ``faults`` holds the faults for the next requests of each path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(REMOTE)
        self.query = QUERY
        self.faults: dict[str, Iterator[str]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.stalled = threading.Event()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        """The signed link."""
        return f"http://127.0.0.1:{self.server_port}/*?{self.query}"

    def paths(self) -> list[str]:
        """The requested paths, in order."""
        return [path for path, _ in self.requests]

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the requests for a path."""
        return [header for asked, header in self.requests if asked == path]


class Handler(BaseHTTPRequestHandler):
    """Answers one GET, with or without Range, or injects the next fault."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one write per response
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def answer(self, status: int, body: bytes, kind: str, total: str = "", sent: int = -1) -> None:
        """Send the headers for all of ``body``, but only its first ``sent`` bytes."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        if total:
            self.send_header("Content-Range", f"bytes {total}")
        self.end_headers()
        self.wfile.write(body if sent < 0 else body[:sent])

    def do_GET(self) -> None:
        """Behave like a file server with signed links."""
        path, _, query = self.path.removeprefix("/").partition("?")
        wanted = self.headers.get("Range")
        self.server.requests.append((path, wanted))
        fault = next(self.server.faults.get(path, iter(())), "")
        # Clients don't send the fragment after a '#'
        if unquote(query) != unquote(self.server.query.partition("#")[0]):
            fault = "403"
        data, kind = self.server.files.get(path), "binary/octet-stream"
        if data is None:
            fault = "404"
            data = b""
        if fault.startswith("to "):
            self.send_response(int(fault.split()[1]))
            self.send_header("Location", f"{fault.split()[2]}/{path}?{query}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if fault.startswith("HTTP/"):
            with contextlib.suppress(OSError):
                self.wfile.write(fault.encode() + b"\r\n\r\n")
                while "103" in fault and not self.server.released.wait(0.01):
                    self.wfile.write(fault.encode() + b"\r\n\r\n")
                    self.wfile.flush()
            self.close_connection = True
            return None
        if fault in ("endless", "drip", "renamed"):
            return self.harm(fault, data)
        if fault.isdigit():
            return self.answer(int(fault), b"<html>error</html>", "text/html")
        if fault == "page":
            return self.answer(200, PAGE, kind)
        if fault == "text/html":
            return self.answer(200, b"Please log in", "text/html; charset=utf-8")
        if fault == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, status, total = 0, 200, ""
        first, _, last = (wanted or "").removeprefix("bytes=").partition("-")
        is_huge = "-405B-" in path and path.endswith(".pth")
        if is_huge and (not last or int(last) - int(first) >= LIMIT):
            return self.answer(400, b"<html>too large</html>", "text/html")
        if first and fault != "no range":
            start = int(first)
            if start >= len(data):
                return self.answer(416, b"<html>no</html>", "text/html", f"*/{len(data)}")
            total = f"{start}-{min(int(last or len(data)), len(data) - 1)}/{len(data)}"
            data = data[: int(last) + 1] if last else data
            status = 206
        sent = CUT_AT if fault in ("cut", "stall") else -1
        if fault == "cut short":
            sent = 3
        self.answer(status, data[start:], kind, total, sent)
        if fault == "stall":
            self.wfile.flush()
            self.server.stalled.set()
            self.server.released.wait(30)
        return None

    def harm(self, fault: str, data: bytes) -> None:
        """Send an endless body, one that drips byte by byte, or one with another filename."""
        self.send_response(200)
        self.send_header("Content-Type", "binary/octet-stream")
        if fault == "renamed":
            self.send_header("Content-Disposition", 'attachment; filename="../../evil"')
            self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        if fault == "renamed":
            self.wfile.write(data)
            return
        with contextlib.suppress(OSError):  # until the client hangs up
            while not self.server.released.wait(0.2 if fault == "drip" else 0):
                self.wfile.write(b"x" if fault == "drip" else bytes(2**20))
                self.wfile.flush()


class Box:
    """A server, a folder to download to, and a PATH with either curl or wget."""

    def __init__(self, folder: Path, server: Server, fetcher: str) -> None:
        self.server = server
        self.top, self.script = folder, SCRIPT
        self.bin, self.home, self.target = folder / "bin", folder / "home", folder / "target"
        for made in (self.bin, self.home, self.target):
            made.mkdir()
        self.link(*TOOLS, fetcher, "md5sum" if shutil.which("md5sum") else "md5")
        self.env = {"PATH": str(self.bin), "HOME": str(self.home), "LLAMA_DOWNLOAD_PAUSE": "0"}

    def link(self, *names: str) -> None:
        """Put tools on the PATH of the runs."""
        for name in names:
            found = shutil.which(name)
            assert found, f"these tests need {name}"
            (self.bin / name).symlink_to(found)

    def fake(self, name: str, text: str) -> None:
        """Put a fake tool on the PATH of the runs."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{self.bin / 'bash'}\n{text}")
        path.chmod(0o755)

    def run(
        self, *args: str, stdin: str = "", before: str = ""
    ) -> "subprocess.CompletedProcess[str]":
        """Run download.sh in the target folder, ``before`` being shell commands to run first."""
        command = ["bash", str(self.script), *args]
        if before:
            command = ["bash", "-c", f'{before}\nexec "$@"', "-", *command]
        result = subprocess.run(
            command,
            cwd=self.target,
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        self.check(result.stdout + result.stderr)
        return result

    def get(self, models: str, *args: str, before: str = "") -> "subprocess.CompletedProcess[str]":
        """Download without prompts."""
        return self.run("--url", self.server.url, "--models", models, *args, before=before)

    def check(self, output: str) -> None:
        """Check the invariants of every run."""
        assert SECRET not in output
        origin = {place: path for places in PLACES.values() for place, path in places.items()}
        for path in self.top.rglob("*"):
            if path.is_symlink() or not path.is_file():
                continue
            data = path.read_bytes()
            assert SECRET.encode() not in data, path
            place = "/".join(path.parts[-2:])
            if place in origin:
                assert data == self.server.files[origin[place]], f"{path} is not the server's"

    def files(self, folder: Path | None = None) -> dict[str, bytes]:
        """All files below a folder (default: the target)."""
        top = folder or self.target
        return {
            str(path.relative_to(top)): path.read_bytes()
            for path in top.rglob("*")
            if path.is_file()
        }

    def put(self, place: str, data: bytes) -> Path:
        """Write a file below the target."""
        path = self.target / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on a free port that stops with the test."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@functools.cache
def usable(fetcher: str) -> bool:
    """Whether the tool is installed, and in the case of wget whether it is GNU Wget."""
    if not shutil.which(fetcher):
        return False
    version = subprocess.run([fetcher, "--version"], capture_output=True, text=True)
    return fetcher == "curl" or "GNU Wget" in version.stdout


@pytest.fixture(params=["curl", "wget"])
def box(request: pytest.FixtureRequest, tmp_path: Path, server: Server) -> Box:
    """Runs download.sh with each of the two tools."""
    if not usable(request.param):
        pytest.skip(f"{request.param} is not installed")
    return Box(tmp_path, server, request.param)


@pytest.fixture
def any_box(tmp_path: Path, server: Server) -> Box:
    """Runs download.sh with one tool, if it doesn't matter which."""
    for fetcher in ("curl", "wget"):
        if usable(fetcher):
            return Box(tmp_path, server, fetcher)
    pytest.skip("neither curl nor wget is installed")


def failed(result: "subprocess.CompletedProcess[str]", *words: str, code: int = 1) -> None:
    """Check that the run failed, with all of these words on stderr."""
    assert result.returncode == code, result
    for word in words:
        assert word in result.stderr


def succeeded(result: "subprocess.CompletedProcess[str]") -> None:
    """Check that the run succeeded."""
    assert result.returncode == 0, result


# Whole downloads


def test_llama_3_model(box: Box) -> None:
    """All files of a model are in its folder, each requested once."""
    result = box.get("8B-instruct")
    succeeded(result)
    assert box.files() == LOCAL["Meta-Llama-3-8B-Instruct"]
    assert len(set(box.server.paths())) == len(box.server.paths()) == 6
    assert all(header is None for _, header in box.server.requests)
    assert (
        "torchrun --nproc_per_node 1 example_chat_completion.py"
        " --ckpt_dir Meta-Llama-3-8B-Instruct\n" in result.stdout
    )
    assert "pip install" not in result.stdout
    assert result.stderr == ""


def test_llama_2_model(box: Box) -> None:
    """Llama 2's tokenizer is in the parent of the model folder."""
    result = box.get("13B-chat")
    succeeded(result)
    assert box.files() == LOCAL["llama-2-13b-chat"]
    assert {"tokenizer.model", "tokenizer_checklist.chk"} <= set(box.files())
    summary = result.stdout.split("To run:\n")[1]
    install, command, *_ = summary.splitlines()
    assert install.startswith('  pip install -e ".[llama2]"')
    assert command == (
        "  torchrun --nproc_per_node 2 example_chat_completion.py --ckpt_dir llama-2-13b-chat"
    )
    assert "Other numbers that divide the model work" in summary


@pytest.mark.parametrize("folder", MODELS)
def test_every_model(any_box: Box, folder: str) -> None:
    """Every published name gets the files of that model, and requests nothing else."""
    result = any_box.get(folder)
    succeeded(result)
    assert result.stderr == ""
    assert any_box.files() == LOCAL[folder]
    assert sorted(any_box.server.paths()) == sorted(PLACES[folder].values())
    kind = "chat" if folder.lower().endswith("chat") or "-Instruct" in folder else "text"
    assert (
        f"torchrun --nproc_per_node {MODELS[folder][1]} example_{kind}_completion.py"
        f" --ckpt_dir {folder}\n" in result.stdout
    )


def test_the_models_are_those_of_metas_tool() -> None:
    """From Llama 3.1 on; of Llama 2 and 3 it has other paths than Meta's scripts."""
    published = {}
    for model in [*llama3_1_family(), *llama3_2_family(), *llama3_3_family()]:
        info = llama_meta_net_info(model)
        is_plain = model.quantization_format is CheckpointQuantizationFormat.bf16
        if is_plain and not is_multimodal(model.core_model_id):
            published[info.folder] = {f"{info.folder}/{name}" for name in info.files}
    assert published == {
        folder: set(PLACES[folder].values()) - {"LICENSE", "USE_POLICY.md"}
        for folder in MODELS
        if folder.startswith("Llama-3.")
    }


@pytest.mark.parametrize(
    "name",
    [
        "405B",
        "Llama-3.1-405B",  # FP8
        "Llama-3.1-405B-FP8",
        "Llama-3.2-1B-Instruct-QLORA_INT4_EO8",
        "Llama-3.2-3B-Instruct-SpinQuant_INT4_EO8",
        "Llama-3.2-11B-Vision",
        "Llama-Guard-3-8B",
        "Llama-3.3-70B",
        "llama-2-8B",
        "meta-",
        "llama-3-",
        "Llama-3x1-8B",
    ],
)
def test_other_models(any_box: Box, name: str) -> None:
    """Quantized, vision and guard models aren't offered, and names aren't guessed."""
    failed(any_box.get(f"8B {name}"), f"unknown model: {name}", code=2)
    assert any_box.server.requests == []


def test_questions_and_enter(box: Box) -> None:
    """Prompts for the link and the models; Enter selects the four Llama 3 models."""
    result = box.run(stdin=f"  {box.server.url} \n\n")
    succeeded(result)
    expected: dict[str, bytes] = {}
    for folder in LLAMA_3:
        expected |= LOCAL[folder]
    assert box.files() == expected
    assert "Meta-Llama-3-70B/consolidated.07.pth" in expected
    for name in ("8B", "8B-instruct", "70B", "70B-instruct", "llama-2-70B", "7B", "13B-chat"):
        assert re.search(rf"[ ,]{name}[,\n]", result.stderr), name
    assert "torchrun --nproc_per_node 8 example_text_completion.py" in result.stdout


def test_question_answered(any_box: Box) -> None:
    """The answer to the second prompt selects the models."""
    succeeded(any_box.run(stdin=f"{any_box.server.url}\n8b\n"))
    assert any_box.files() == LOCAL["Meta-Llama-3-8B"]


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        ("70B", ["Meta-Llama-3-70B"]),
        ("meta-llama-3-70b-INSTRUCT llama-3-8b", ["Meta-Llama-3-70B-Instruct", LLAMA_3[0]]),
        ("LLAMA-2-70B,70b-Chat", ["llama-2-70b", "llama-2-70b-chat"]),
        (" 7b ,, 13B\n7B-chat ", ["llama-2-7b", "llama-2-13b", "llama-2-7b-chat"]),
        ("llama-2-7b-chat,llama-2-13b-chat", ["llama-2-7b-chat", "llama-2-13b-chat"]),
        ("8B,8b Meta-Llama-3-8B", ["Meta-Llama-3-8B"]),
        ("Llama3.2-1B llama-3.2-1b", ["Llama-3.2-1B"]),  # by name of Meta's tool
        ("Meta-Llama-3.1-8B-Instruct", ["Llama-3.1-8B-Instruct"]),  # its name at first
    ],
)
def test_names(any_box: Box, names: str, folders: list[str]) -> None:
    """Model names are case-insensitive; duplicates count once."""
    result = any_box.get(names)
    succeeded(result)
    summary = result.stdout.split("To run:\n")[1]
    assert re.findall(r"--ckpt_dir (.*)", summary) == folders
    assert summary.count("pip install") == any(name.startswith("llama-2") for name in folders)
    chats = re.findall(r"example_chat_completion.py --ckpt_dir (.*)", summary)
    assert chats == [name for name in folders if name.lower().endswith(("instruct", "chat"))]
    expected: dict[str, bytes] = {}
    for folder in folders:
        expected |= LOCAL[folder]
    assert any_box.files() == expected
    lists = [path.removesuffix("/checklist.chk") for path in any_box.server.paths()]
    assert [path for path in lists if path in dict(MODELS.values())] == [
        MODELS[folder][0] for folder in folders
    ]


@pytest.mark.parametrize("name", ["my models #1 [a] {b,c} $HOME 'x' *", "-target"])
def test_folder_names(box: Box, name: str) -> None:
    """The target folder may have any name, and is created if needed."""
    result = box.get("8B", "--dir", name)
    succeeded(result)
    assert box.files(box.target / name) == LOCAL["Meta-Llama-3-8B"]
    assert set(os.listdir(box.target)) == {name}
    hint = result.stdout.split("--ckpt_dir ")[1].strip()
    shown = subprocess.run(["bash", "-c", f"printf %s {hint}"], capture_output=True, text=True)
    assert shown.stdout.removeprefix("./") == f"{name}/Meta-Llama-3-8B"
    succeeded(box.run("--verify", f"{name}/Meta-Llama-3-8B"))


def test_the_projects_licenses_are_kept(any_box: Box) -> None:
    """A checkout's own license files aren't overwritten by those of the weights."""
    own = dict.fromkeys(("LICENSE", "USE_POLICY", "USE_POLICY.md"), b"our own\n")
    for name, data in own.items():
        any_box.put(name, data)
    succeeded(any_box.get("8B 7B"))
    assert any_box.files() == own | LOCAL["Meta-Llama-3-8B"] | LOCAL["llama-2-7b"]


def test_the_link_isnt_an_argument(box: Box) -> None:
    """The tool doesn't get the link on its command line, where "ps" would show it."""
    log = box.top / "arguments"
    for name in ("curl", "wget"):
        if (box.bin / name).exists():
            real = (box.bin / name).resolve()
            box.fake(name, f"printf '%s\\n' \"$@\" >>'{log}'\nexec '{real}' \"$@\"\n")
    succeeded(box.get("8B"))
    assert "consolidated.00.pth" in log.read_text()
    assert SECRET not in log.read_text()


def test_macos_md5(any_box: Box) -> None:
    """md5 is used if md5sum is missing."""
    real = shutil.which("md5sum")
    if real is None:
        pytest.skip("md5sum, which replaces md5 here, isn't installed")
    (any_box.bin / "md5sum").unlink()
    any_box.fake("md5", f'[ "$1" = -q ] || exit 9\nset -- $(\'{real}\' "$2")\necho "$1"\n')
    succeeded(any_box.get("8B"))
    assert any_box.files() == LOCAL["Meta-Llama-3-8B"]
    any_box.server.faults[SHARD] = repeat("corrupt")
    any_box.put("Meta-Llama-3-8B/consolidated.00.pth", b"x")
    failed(any_box.get("8B"), "wrong checksum")


# Interruptions and retries


def test_resume(box: Box) -> None:
    """A partial file is resumed, not downloaded again."""
    box.put("Meta-Llama-3-8B/consolidated.00.pth.part", REMOTE[SHARD][:1000])
    succeeded(box.get("8B"))
    assert box.server.ranges(SHARD) == ["bytes=1000-"]
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


def test_partial_file_of_another_tool(box: Box) -> None:
    """A partial file with its final name is detected by its checksum and resumed."""
    box.put("Meta-Llama-3-8B/consolidated.00.pth", REMOTE[SHARD][:1000])
    succeeded(box.get("8B"))
    assert box.server.ranges(SHARD) == ["bytes=1000-"]
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


def test_complete_files_are_left_alone(box: Box) -> None:
    """A second run requests nothing; after one file is deleted, it requests only that."""
    succeeded(box.get("8B 7B"))
    box.server.requests.clear()
    succeeded(box.get("8B 7B"))
    assert box.server.requests == []
    (box.target / "llama-2-7b/params.json").unlink()
    succeeded(box.get("8B 7B"))
    assert box.server.paths() == ["llama-2-7b/params.json"]


def test_dropped_connection(box: Box) -> None:
    """A dropped connection is resumed at the same offset."""
    box.server.faults[SHARD] = iter(["cut", "500", "cut"])
    result = box.get("8B")
    succeeded(result)
    second, fourth = f"bytes={CUT_AT}-", f"bytes={2 * CUT_AT}-"
    assert box.server.ranges(SHARD) == [None, second, second, fourth]
    assert box.files() == LOCAL["Meta-Llama-3-8B"]
    assert "trying again" in result.stderr


def test_truncated_file_without_checksum(box: Box) -> None:
    """A file without a checksum isn't resumed, but downloaded again from the start."""
    box.server.faults["LICENSE"] = iter(["cut short"])
    box.put("Meta-Llama-3-8B/LICENSE.part", b"an old half")
    succeeded(box.get("8B"))
    assert box.server.ranges("LICENSE") == [None, None]
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


def test_server_error_then_success(box: Box) -> None:
    """A 5xx response is retried, for any file."""
    for path in ("LICENSE", "8b_pre_trained/checklist.chk", SHARD):
        box.server.faults[path] = iter(["500", "503"])
    succeeded(box.get("8B"))
    assert len(box.server.ranges(SHARD)) == 3
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


@pytest.mark.parametrize("fault", ["500", "cut short"])
def test_gives_up(box: Box, fault: str) -> None:
    """Retries are limited, and the partial file is kept for the next run."""
    box.server.faults[SHARD] = repeat(fault)
    failed(box.get("8B"), f"gave up on {SHARD}", "run this again")
    assert len(box.server.ranges(SHARD)) == 5
    part = box.target / "Meta-Llama-3-8B/consolidated.00.pth.part"
    assert part.exists() == (fault != "500")
    del box.server.faults[SHARD]
    succeeded(box.get("8B"))
    assert box.server.ranges(SHARD)[5] == (None if fault == "500" else "bytes=15-")


def test_server_gone(box: Box) -> None:
    """A refused connection is reported."""
    link = box.server.url
    box.server.server_close()
    failed(box.run("--url", link, "--models", "8B"), "gave up on LICENSE", "check the network")


def test_pauses_grow(any_box: Box) -> None:
    """The pause grows with each retry."""
    any_box.fake("sleep", 'printf "%s " "$1" >>pauses\n')
    any_box.env["LLAMA_DOWNLOAD_PAUSE"] = "3"
    any_box.server.faults["LICENSE"] = repeat("503")
    failed(any_box.get("8B"), "gave up")
    assert (any_box.target / "pauses").read_text() == "3 6 9 12 "
    any_box.env["LLAMA_DOWNLOAD_PAUSE"] = "soon"
    failed(any_box.get("8B"), "LLAMA_DOWNLOAD_PAUSE")


def test_range_ignored(box: Box) -> None:
    """The server may answer a Range request with the whole file."""
    box.put("Meta-Llama-3-8B/consolidated.00.pth.part", REMOTE[SHARD][:1000])
    box.server.faults[SHARD] = repeat("no range")
    succeeded(box.get("8B"))
    assert box.server.ranges(SHARD)[0] == "bytes=1000-"
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


def test_partial_file_already_complete(box: Box) -> None:
    """A partial file that is already complete (416) is used as it is."""
    box.put("Meta-Llama-3-8B/consolidated.00.pth.part", REMOTE[SHARD])
    succeeded(box.get("8B"))
    assert box.server.ranges(SHARD) == ["bytes=3000-"]
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


@pytest.mark.parametrize("size", [1000, 3000, 4000])
@pytest.mark.parametrize("fault", ["", "no range"])
def test_partial_file_of_another_version(box: Box, size: int, fault: str) -> None:
    """A mismatched partial file (416 or a wrong checksum) is downloaded again, once."""
    box.put("Meta-Llama-3-8B/consolidated.00.pth.part", content("old version", size))
    box.server.faults[SHARD] = repeat(fault)
    succeeded(box.get("8B"))
    assert box.server.ranges(SHARD) == [f"bytes={size}-", None]
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


def test_interrupt(box: Box) -> None:
    """Ctrl-C ends the run with a message, and the next run resumes."""
    box.server.faults[SHARD] = iter(["stall"])
    # A test run in the background may ignore the signal, and so would its children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "--url", box.server.url, "--models", "8B"],
        cwd=box.target,
        env=box.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, before)
    try:
        assert box.server.stalled.wait(30)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped" in err
    box.check(out + err)
    box.server.released.set()
    succeeded(box.get("8B"))
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


@pytest.fixture
def pieces(box: Box) -> Box:
    """Requests shards of the 405B in pieces of 1000 bytes."""
    box.script = box.top / "download.sh"
    text, n_changed = re.subn(r"(?m)^PIECE=\S+( \S+)*\)\)", "PIECE=1000", SCRIPT.read_text())
    assert n_changed == 1
    box.script.write_text(text)
    return box


def piece(start: int) -> str:
    """The Range header for a piece."""
    return f"bytes={start}-{start + 999}"


def test_pieces(pieces: Box) -> None:
    """A shard that exceeds the server's limit is requested in pieces, other files aren't."""
    succeeded(pieces.get("Llama-3.1-405B-MP8"))
    assert pieces.files() == LOCAL["Llama-3.1-405B-MP8"]
    for number in range(8):  # the first has 3000 bytes, the second 3001 ...
        path = HUGE.replace(".00.", f".{number:02d}.")
        assert pieces.server.ranges(path) == [piece(start) for start in (0, 1000, 2000, 3000)]
    assert pieces.server.ranges("Llama-3.1-405B-MP8/tokenizer.model") == [None]


def test_resuming_a_piece(pieces: Box) -> None:
    """An interrupted piece is resumed; each piece has all its attempts."""
    pieces.put(f"{HUGE}.part", REMOTE[HUGE][:500])
    cut = ["cut short"] * 4
    pieces.server.faults[HUGE] = iter([*cut, "", *cut, "403"])
    failed(pieces.get("Llama-3.1-405B-MP8"), "expired", HUGE)
    assert (pieces.target / f"{HUGE}.part").read_bytes() == REMOTE[HUGE][:1524]
    first = [piece(start) for start in (500, 503, 506, 509, 512, 1512, 1515, 1518, 1521, 1524)]
    assert pieces.server.ranges(HUGE) == first
    succeeded(pieces.get("Llama-3.1-405B-MP8"))
    assert pieces.server.ranges(HUGE)[len(first) :] == [piece(1524), piece(2524)]
    assert pieces.files() == LOCAL["Llama-3.1-405B-MP8"]


def test_pieces_without_a_checksum(pieces: Box) -> None:
    """Whole pieces are joined, but an interrupted one starts over."""
    folder = "Llama-3.1-405B-MP8"
    files = {"params.json": REMOTE[f"{folder}/params.json"]}
    pieces.server.files[f"{folder}/checklist.chk"] = checklist(files)
    pieces.server.faults[HUGE] = iter(["", "cut short"])
    succeeded(pieces.get("Llama-3.1-405B-MP8"))
    starts = (0, 1000, 0, 1000, 2000, 3000)
    assert pieces.server.ranges(HUGE) == [piece(start) for start in starts]
    assert pieces.files()[HUGE] == REMOTE[HUGE]


@pytest.mark.parametrize("size", [1000, 3000])
def test_pieces_if_ranges_are_ignored(pieces: Box, size: int) -> None:
    """The whole file is taken, even if it is as long as a piece."""
    names = ("params.json", "tokenizer.model", "consolidated.00.pth")
    files = {name: REMOTE[f"Llama-3.1-405B-MP8/{name}"][:size] for name in names}
    pieces.server.files |= {f"Llama-3.1-405B-MP8/{name}": data for name, data in files.items()}
    pieces.server.files["Llama-3.1-405B-MP8/checklist.chk"] = checklist(files)
    pieces.server.faults[HUGE] = repeat("no range")
    succeeded(pieces.get("Llama-3.1-405B-MP8"))
    assert pieces.server.ranges(HUGE) == [piece(0)]
    assert pieces.files()[HUGE] == files["consolidated.00.pth"]


# Failures


@pytest.mark.parametrize("path", ["LICENSE", SHARD])
@pytest.mark.parametrize(
    ("status", "words"),
    [("403", "expired"), ("404", "another model"), ("416", "HTTP 416"), ("400", "HTTP 400")],
)
def test_refused(box: Box, path: str, status: str, words: str) -> None:
    """A 4xx response is reported with the file and the cause, and isn't retried."""
    box.server.faults[path] = repeat(status)
    failed(box.get("8B"), path, words)
    assert box.server.paths()[-1] == path
    assert len(box.server.ranges(path)) == 1
    assert not list(box.target.rglob("*.part"))


def test_expired_link_keeps_the_partial_file(box: Box) -> None:
    """A partial file survives an expired link."""
    part = box.put("Meta-Llama-3-8B/consolidated.00.pth.part", REMOTE[SHARD][:1000])
    box.server.faults[SHARD] = iter(["403"])
    failed(box.get("8B"), "expired", SHARD)
    assert part.read_bytes() == REMOTE[SHARD][:1000]
    succeeded(box.get("8B"))
    assert box.server.ranges(SHARD) == ["bytes=1000-"] * 2


@pytest.mark.parametrize("path", ["LICENSE", "8b_pre_trained/checklist.chk", SHARD])
@pytest.mark.parametrize("fault", ["page", "text/html"])
def test_web_page(box: Box, path: str, fault: str) -> None:
    """A web page with status 200 is detected by its text or type, and not saved."""
    box.server.faults[path] = repeat(fault)
    failed(box.get("8B"), "web page", path)
    assert not list(box.target.rglob("*.part"))
    assert len(box.server.ranges(path)) == 1


def test_web_page_on_resume(box: Box) -> None:
    """A web page in response to a resume doesn't discard the partial file."""
    part = box.put("Meta-Llama-3-8B/consolidated.00.pth.part", REMOTE[SHARD][:1000])
    box.server.faults[SHARD] = iter(["text/html"])
    failed(box.get("8B"), "web page", SHARD)
    assert part.read_bytes() == REMOTE[SHARD][:1000]


def test_corrupt_shard(box: Box) -> None:
    """A wrong checksum is reported, and the next run downloads the file from the start."""
    path = "llama-2-13b/consolidated.01.pth"
    box.server.faults[path] = iter(["corrupt"])
    failed(box.get("13B"), "wrong checksum", path)
    assert not list(box.target.rglob("*.part"))
    succeeded(box.get("13B"))
    assert box.server.ranges(path) == [None, None]
    assert box.files() == LOCAL["llama-2-13b"]


def test_disk_full(box: Box) -> None:
    """A failed write is reported; a file size limit simulates a full disk."""
    result = box.get("8B", before="trap '' XFSZ; ulimit -f 2")
    failed(result, "disk is full", "consolidated.00.pth")
    assert len(box.server.ranges(SHARD)) == 1
    succeeded(box.get("8B"))
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


def test_folder_cannot_be_created(any_box: Box) -> None:
    """A file at the folder's path is reported."""
    any_box.put("file", b"")
    failed(any_box.get("8B", "--dir", "file"), "cannot create the folder", "--dir")


def test_folder_cannot_be_written(box: Box) -> None:
    """A read-only folder is reported before anything is requested."""
    folder = box.target / "Meta-Llama-3-8B"
    folder.mkdir()
    folder.chmod(0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    failed(box.get("8B"), "write to it", "--dir")
    assert box.server.requests == []


BAD_LISTS = {
    "up": b"0" * 32 + b"  ../params.json\n",
    "dots": b"0" * 32 + b"  a..b\n",
    "slash": b"0" * 32 + b"  sub/params.json\n",
    "absolute": b"0" * 32 + b"  /params.json\n",
    "option": b"0" * 32 + b"  -rf\n",
    "space": b"0" * 32 + b"  a b\n",
    "short sum": b"0" * 31 + b"  params.json\n",
    "no hex": b"x" * 32 + b"  params.json\n",
    "no name": b"0" * 32 + b"\n",
    "only a star": b"0" * 32 + b" *\n",
    "text": b"Service unavailable\n",
    "blank": b"\n",
    "empty": b"",
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_bad_checklist(any_box: Box, kind: str) -> None:
    """A checklist with anything but checksums and plain file names is refused entirely."""
    path = "8b_pre_trained/checklist.chk"
    any_box.server.files[path] = REMOTE[path] + BAD_LISTS[kind]
    if kind in ("blank", "empty"):
        any_box.server.files[path] = BAD_LISTS[kind]
    failed(any_box.get("8B"), path, "checklist")
    assert any_box.server.paths()[-1] == path
    assert not list(any_box.target.rglob("*checklist*"))


def test_checklist_dialects(any_box: Box) -> None:
    """CRLF, blank lines, uppercase digests and the asterisk of binary mode are accepted."""
    path = "8b_pre_trained/checklist.chk"
    lines = [line.split() for line in REMOTE[path].decode().splitlines()]
    text = "".join(f"{sum_.upper()} *{name}\r\n\r\n" for sum_, name in lines)
    any_box.server.files[path] = text.encode()
    any_box.server.faults[SHARD] = iter(["cut"])
    succeeded(any_box.get("8B"))
    assert any_box.server.ranges(SHARD) == [None, f"bytes={CUT_AT}-"]
    result = any_box.run("--verify", "Meta-Llama-3-8B")
    succeeded(result)
    assert "All 3 files are OK" in result.stdout


def test_shard_without_a_checksum(any_box: Box) -> None:
    """A shard that isn't in the checklist is downloaded without resuming, with a warning."""
    files = {"params.json": REMOTE["8b_pre_trained/params.json"]}
    any_box.server.files["8b_pre_trained/checklist.chk"] = checklist(files)
    any_box.server.faults[SHARD] = iter(["cut"])
    result = any_box.get("8B")
    succeeded(result)
    assert "no checksum for consolidated.00.pth" in result.stderr
    assert any_box.server.ranges(SHARD) == [None, None]
    assert any_box.files()["Meta-Llama-3-8B/consolidated.00.pth"] == REMOTE[SHARD]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--url", "LINK", "--models", "8B 9B"], "unknown model: 9B"),
        (["--url", "LINK", "--models", "LINK"], "link broken"),
        (["--url", "https://host/file?Signature=SeCrEt*"], "no * in its path"),
        (["--url", "https://host/*?Signature=\nSeCrEt"], "line break"),
        (["--url", "https://host/*?Signature= SeCrEt"], "space"),
        (["--url", 'https://host/*?Signature="SeCrEt'], "quote"),
        (["--url", "https://host/*?Signature=\\SeCrEt"], "backslash"),
        (["--url", "host/*?Signature=SeCrEt"], "https://"),
        (["--url"], "--url needs a value"),
        (["--dir", ""], "--dir needs a value"),
        (["--url=SeCrEt"], "unknown option: --url"),
        (["--force"], "unknown option: --force"),
        (["https://host/*?Signature=SeCrEt"], "unexpected argument"),
        ([], "no link given"),
        (["--url", "LINK"], "no models given"),
    ],
)
def test_bad_arguments(any_box: Box, args: list[str], words: str) -> None:
    """Invalid arguments and answers are reported, and nothing is downloaded."""
    args = [any_box.server.url if arg == "LINK" else arg for arg in args]
    failed(any_box.run(*args), words, "Usage:", code=2)
    assert any_box.server.requests == []
    assert any_box.files() == {}


def test_unknown_model_lists_the_known_names(any_box: Box) -> None:
    """The error lists the known names, each once."""
    result = any_box.get("405B")
    failed(result, "unknown model: 405B", code=2)
    table = result.stderr.partition('"70B" alone')[0]
    rows = re.findall(r"(?m)^  (?:Llama [\d.]+:|  )(.*)$", table)
    listed = re.findall(r"[\w.-]+", " ".join(rows))
    assert len(listed) == len(set(listed)) == len(MODELS)
    assert {"8B-instruct", "13B-chat", "Llama-3.1-405B-MP16", "Llama-3.2-3B"} <= set(listed)


def test_help(any_box: Box) -> None:
    """--help prints all options to stdout."""
    result = any_box.run("--help")
    succeeded(result)
    for option in ("--url", "--models", "--dir", "--verify", "--help", "LLAMA_DOWNLOAD_PAUSE"):
        assert option in result.stdout
    assert "history" in result.stdout


def test_missing_tools(any_box: Box) -> None:
    """Without a download or checksum tool, nothing is started."""
    for name in ("curl", "wget"):
        (any_box.bin / name).unlink(missing_ok=True)
    failed(any_box.get("8B"), "neither curl nor GNU wget")
    any_box.fake("wget", "echo 'wget: unrecognized option: version' >&2\nexit 1\n")
    failed(any_box.get("8B"), "neither curl nor GNU wget")
    for name in ("md5sum", "md5"):
        (any_box.bin / name).unlink(missing_ok=True)
    failed(any_box.get("8B"), "neither md5sum nor md5")
    assert any_box.files() == {}


# Checking only


@pytest.fixture
def checked(any_box: Box) -> Box:
    """A downloaded model, and no network."""
    succeeded(any_box.get("13B"))
    any_box.server.requests.clear()
    for name in ("curl", "wget"):
        (any_box.bin / name).unlink(missing_ok=True)
    return any_box


def test_verify(checked: Box) -> None:
    """A correct model folder passes, and so does the tokenizer's."""
    before = checked.files()
    result = checked.run("--verify", "llama-2-13b/")
    succeeded(result)
    assert "consolidated.01.pth: OK" in result.stdout
    assert "All 3 files are OK" in result.stdout
    assert checked.run("--verify", ".").stdout.startswith("tokenizer.model: OK\n")
    assert checked.files() == before
    assert checked.server.requests == []


def test_verify_finds_all_faults(checked: Box) -> None:
    """Every missing or wrong file is listed."""
    folder = checked.target / "llama-2-13b"
    folder = folder.rename(checked.target / "copy")
    (folder / "params.json").unlink()
    (folder / "consolidated.01.pth").write_bytes(b"half")
    result = checked.run("--verify", "copy")
    failed(result, "params.json: missing", "consolidated.01.pth: wrong", "2 of 3 files")
    assert "consolidated.00.pth: OK" in result.stdout


def test_verify_tokenizer_checklist(checked: Box) -> None:
    """A tokenizer_checklist.chk in the folder is checked too."""
    for name in ("tokenizer.model", "tokenizer_checklist.chk"):
        checked.put(f"llama-2-13b/{name}", REMOTE[name])
    assert "All 4 files" in checked.run("--verify", "llama-2-13b").stdout
    (checked.target / "llama-2-13b/tokenizer.model").write_bytes(b"wrong")
    failed(checked.run("--verify", "llama-2-13b"), "tokenizer.model: wrong checksum")


def test_verify_of_a_list_with_orig_params(any_box: Box) -> None:
    """Llama 3.2 3B Instruct's list has orig_params.json, which isn't downloaded."""
    succeeded(any_box.get("Llama-3.2-3B-Instruct"))
    assert "All 3 files" in any_box.run("--verify", "Llama-3.2-3B-Instruct").stdout
    (any_box.target / "Llama-3.2-3B-Instruct/orig_params.json").write_text("wrong")
    result = any_box.run("--verify", "Llama-3.2-3B-Instruct")
    failed(result, "orig_params.json: wrong checksum", "1 of 4 files")


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_verify_bad_checklist(any_box: Box, kind: str) -> None:
    """A malformed checklist, or one with paths outside the folder, is refused."""
    any_box.put("params.json", b"outside")
    any_box.put("model/checklist.chk", BAD_LISTS[kind])
    failed(any_box.run("--verify", "model"), "model/checklist.chk is not a list")


def test_verify_without_checklist(any_box: Box) -> None:
    """A folder without a checklist, or a missing folder, is reported."""
    failed(any_box.run("--verify", "."), "no checklist.chk")
    failed(any_box.run("--verify", "nowhere"), "no such folder")


# On a terminal


def on_terminal(box: Box, *args: str, typed: str = "") -> tuple[int, bytes]:
    """Run download.sh on a pseudo-terminal; return its exit status and output.

    ``typed`` is sent after the first prompt: before that, the terminal is in canonical mode.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", str(SCRIPT), *args],
        cwd=box.target,
        env={**box.env, "TERM": "dumb"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = bytearray()
    asked = threading.Event()

    def listen() -> None:
        with contextlib.suppress(OSError):  # Linux raises EIO for a closed terminal
            while data := os.read(ours, 4096):
                shown.extend(data)
                if b"): " in shown:
                    asked.set()

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        if typed:
            assert asked.wait(30)
            os.write(ours, typed.encode())
        status = process.wait(timeout=60)
    finally:
        process.kill()
        listener.join(10)
        os.close(ours)
    return status, bytes(shown)


def test_progress(box: Box) -> None:
    """A terminal shows progress, without the link."""
    status, shown = on_terminal(box, "--url", box.server.url, "--models", "8B")
    assert status == 0
    assert box.files() == LOCAL["Meta-Llama-3-8B"]
    assert shown.count(b"100") >= 6
    box.check(shown.decode(errors="replace"))


def test_long_link_on_a_terminal(any_box: Box) -> None:
    """A link longer than a line in the terminal's canonical mode can be pasted."""
    any_box.server.query = f"Signature={'x' * 6000}"
    status, shown = on_terminal(any_box, "--models", "8B", typed=any_box.server.url + "\n")
    assert status == 0, shown[-500:]
    assert any_box.files() == LOCAL["Meta-Llama-3-8B"]


# The script itself


def test_executable() -> None:
    """The script is executable."""
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_shellcheck() -> None:
    """There are no shellcheck warnings, and none are disabled."""
    beside_python = str(Path(sys.executable).parent)
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=beside_python)
    if tool is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([tool, "-x", str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "shellcheck disable" not in SCRIPT.read_text()


def test_nothing_newer_than_bash_3_2() -> None:
    """macOS ships bash 3.2, which lacks all of these."""
    newer = (
        r"\b(declare|local|typeset) -[a-zA-Z]*[Anlu]|\b(mapfile|readarray|coproc)\b"
        r"|\$\{[A-Za-z_0-9]+(\[[^]]*\])?(,|\^|@[QEPAaKkUuL]\})|&>>|\|&|;;&|;&|\bwait -n\b"
        r"|\[-1\]|printf -v \w+\[|%\(|\$EPOCH|\bBASHPID\b|\[\[ -v |\bshopt -s globstar"
    )
    found = re.findall(rf".*(?:{newer}).*", SCRIPT.read_text())
    assert not found, found


# --- Malicious servers --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["other", "file"])
def test_redirections_are_not_followed(box: Box, status: int, target: str) -> None:
    """Otherwise another host would get the signed query string."""
    with Server() as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        to = f"http://127.0.0.1:{other.server_port}" if target == "other" else "file:///etc/passwd"
        box.server.faults["8b_pre_trained/params.json"] = repeat(f"to {status} {to}")
        failed(box.get("8B"), "another address for 8b_pre_trained/params.json", str(status))
        assert other.requests == []
        other.shutdown()
        thread.join()
    assert box.server.paths().count("8b_pre_trained/params.json") == 1
    assert "Meta-Llama-3-8B/params.json" not in box.files()


def test_curl_and_wget_settings_are_ignored(box: Box) -> None:
    """They could follow redirections, send the link to another server, and write other files."""
    log = box.top / "log"
    curl = f'location\nreferer = ";auto"\ntrace = "{log}"\n'
    wget = f"max_redirect = 9\nwarc_file = {log}\nreferer = http://127.0.0.1/\n"
    for name, text in ((".curlrc", curl), (".wgetrc", wget)):
        (box.home / name).write_text(text)
    box.env |= {"CURL_HOME": str(box.home), "XDG_CONFIG_HOME": str(box.home)}
    box.env |= dict.fromkeys(("WGETRC", "SYSTEM_WGETRC"), str(box.home / ".wgetrc"))
    before = box.files(box.home)
    with Server() as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        box.server.faults[SHARD] = repeat(f"to 302 http://127.0.0.1:{other.server_port}")
        failed(box.get("8B"), "another address for 8b_pre_trained/consolidated.00.pth")
        other.shutdown()
        thread.join()
    assert other.requests == []
    assert not list(box.top.glob("log*"))
    assert box.files(box.home) == before


def test_the_link_isnt_in_any_environment(box: Box) -> None:
    """Not even if the caller has exported the script's variable names, or set allexport."""
    words = set(re.findall(r"[A-Za-z_]\w*", SCRIPT.read_text()))
    kept = {"PATH", "HOME", "IFS", "BASH_ENV", "SHELLOPTS", "LLAMA_DOWNLOAD_STALL"}
    box.env = dict.fromkeys(words - kept, "8") | box.env | {"SHELLOPTS": "allexport"}
    log = box.top / "environment"
    for name in ("curl", "wget", "awk", "rm", "head"):
        if (box.bin / name).exists():
            real = (box.bin / name).resolve()
            box.fake(name, f"export -p >>'{log}'\nexec '{real}' \"$@\"\n")
    succeeded(box.get("8B"))
    assert "HOME=" in log.read_text()
    assert SECRET not in log.read_text()


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "example.org", "127.0.0.1.example.org", "localhost:x@example.org"]
)
def test_an_http_link_is_refused(any_box: Box, host: str) -> None:
    link = f"http://{host}/*?{QUERY}"
    result = any_box.run("--url", link, "--models", "8B")
    failed(result, "the link must start with https://", code=2)
    assert any_box.files() == {}


@pytest.mark.slow
def test_endless_early_hints(box: Box) -> None:
    """A small file has a time limit: ten times LLAMA_DOWNLOAD_STALL."""
    if shutil.which("timeout"):
        box.link("timeout")
    elif (box.bin / "wget").exists():
        pytest.skip("wget has no limit without timeout")
    box.env["LLAMA_DOWNLOAD_STALL"] = "1"
    box.server.faults["LICENSE"] = iter(["HTTP/1.1 103 Early Hints"])
    result = box.get("8B")
    succeeded(result)
    assert "LICENSE: interrupted" in result.stderr


@pytest.mark.parametrize("status", ["404 \x1b[2Jx", "\x1b[2J", "4\x1b[2J04 no"])
def test_the_servers_text_doesnt_reach_the_terminal(box: Box, status: str) -> None:
    box.server.faults["LICENSE"] = repeat(f"HTTP/1.1 {status}")
    result = box.get("8B")
    assert result.returncode == 1
    assert "\x1b" not in result.stdout + result.stderr
    code, shown = on_terminal(box, "--url", box.server.url, "--models", "8B")
    assert code == 1
    assert b"\x1b[2J" not in shown


# --- Signals and concurrent runs ----------------------------------------------------------------


def start(box: Box, *models: str) -> "subprocess.Popen[str]":
    """Start a run and wait until it is in the middle of a shard."""
    box.server.faults[SHARD] = iter(["stall"])
    process = subprocess.Popen(
        ["bash", str(SCRIPT), "--url", box.server.url, "--models", "8B"],
        cwd=box.target,
        env=box.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert box.server.stalled.wait(30)
    return process


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_signal_ends_the_tool_too(box: Box, name: str, code: int) -> None:
    """Although only the script receives it."""
    pids = box.top / "pids"
    for tool in ("curl", "wget"):
        if (box.bin / tool).exists():
            real = (box.bin / tool).resolve()
            box.fake(tool, f"echo $$ >>'{pids}'\nexec '{real}' \"$@\"\n")
    process = start(box)
    process.send_signal(signal.Signals[f"SIG{name}"])
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert "stopped; run this again" in errors
    assert not is_running(int(pids.read_text().split()[-1]))
    part = box.target / "Meta-Llama-3-8B/consolidated.00.pth.part"
    assert not part.exists() or REMOTE[SHARD].startswith(part.read_bytes())
    box.server.released.set()
    succeeded(box.get("8B"))
    assert box.files() == LOCAL["Meta-Llama-3-8B"]


def test_two_runs_do_not_write_to_one_file(any_box: Box) -> None:
    box = any_box
    with start(box) as process:
        failed(
            box.get("8B"),
            f"another download.sh (process {process.pid}) is writing to Meta-Llama-3-8B/",
            "consolidated.00.pth.part: wait until it has ended",
        )
        succeeded(box.get("8B-instruct"))  # another folder
        box.server.released.set()
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    assert box.files() == LOCAL["Meta-Llama-3-8B"] | LOCAL["Meta-Llama-3-8B-Instruct"]


def test_the_lock_of_a_killed_run_is_removed(any_box: Box) -> None:
    box = any_box
    with start(box) as process:
        process.kill()
    lock = box.target / "Meta-Llama-3-8B/consolidated.00.pth.part.lock"
    assert (lock / "owner").read_text().split()[0] == str(process.pid)
    box.server.released.set()
    succeeded(box.get("8B"))
    assert box.files() == LOCAL["Meta-Llama-3-8B"]
    # another machine's lock, or one without an owner yet, is kept
    for owner in ("1 another-machine\n", ""):
        (box.target / "Meta-Llama-3-8B/consolidated.00.pth").unlink()
        lock.mkdir()
        (lock / "owner").write_text(owner)
        failed(box.get("8B"), "If there is none, remove the folder Meta-Llama-3-8B/consolidated")
        shutil.rmtree(lock)
        succeeded(box.get("8B"))


def test_an_endless_body(box: Box) -> None:
    box.server.faults["8b_pre_trained/params.json"] = repeat("endless")
    failed(box.get("8B"), "sends more for 8b_pre_trained/params.json than any such file has")
    assert not [name for name in box.files() if "params.json" in name]


@pytest.mark.slow
def test_a_body_that_is_too_slow(tmp_path: Path, server: Server) -> None:
    """Five bytes a second never count as a stall, but are still too slow."""
    if not usable("curl"):
        pytest.skip("wget only notices silence")
    box = Box(tmp_path, server, "curl")
    box.env["LLAMA_DOWNLOAD_STALL"] = "1"
    server.faults["LICENSE"] = repeat("drip")
    failed(box.get("8B"), "gave up on LICENSE after 5 attempts")


def test_the_servers_filename_is_ignored(box: Box) -> None:
    box.server.faults[SHARD] = repeat("renamed")
    assert box.get("8B").returncode == 0
    assert box.files() == LOCAL["Meta-Llama-3-8B"]
    assert not list(box.top.rglob("*evil*"))


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "99999"])
def test_an_invalid_stall_time(any_box: Box, value: str) -> None:
    any_box.env["LLAMA_DOWNLOAD_STALL"] = value
    failed(any_box.get("8B"), "LLAMA_DOWNLOAD_STALL must be 1 to 9999 seconds")
