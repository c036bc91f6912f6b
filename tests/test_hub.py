"""Models by hub id, against a stand-in of the hub on this machine."""

import hashlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import PROGRAMS, ROOT, run, torchrun

from llama import Llama, __main__
from llama.checkpoint import hub

FOLDERS, BUILD, BUILD_ERROR = (
    PROGRAMS / f"{name}.py" for name in ("hub_folders", "build", "build_error")
)
TOKEN = "hf_secretsecret"
MODEL = "owner/model.1-B"


class Hub(ThreadingHTTPServer):
    """The part of the hub that downloads use.

    The owner "gated" wants a login and then refuses, "nobody" has no models, "broken" fails; the
    models of "moving" have a new commit at each request.

    Attributes:
        root: a folder OWNER/NAME for each repository.
        commit: digit of the latest commit.
        requests: method, path and token of each request.
        delay: seconds to wait before each file.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.delay, self.commit = root, 0.0, 5
        self.requests: list[tuple[str, str, str | None]] = []

    def env(self, home: Path, **changes: str) -> dict[str, str]:
        """A client's environment, with its cache in ``home``."""
        own = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "HF_TOKEN_PATH": str(home / "token"),
            "NO_PROXY": "127.0.0.1",
        }
        return own | changes

    def downloads(self) -> list[str]:
        """Files that were asked for, one entry per request."""
        paths = (path.partition("/resolve/")[2] for _, path, _ in self.requests)
        return [path.partition("/")[2] for path in paths if path]


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, token = self.path.partition("?")[0], self.headers.get("Authorization")
        self.server.requests.append((self.command, path, token))
        match = re.fullmatch(r"(?:/api/models)?/([^/]+)/([^/]+)/(revision|tree|resolve)/(.*)", path)
        assert match is not None, path
        owner, name, what, rest = match.groups()
        folder = self.server.root / owner / name
        if owner == "nobody":
            self.send(404 if token else 401, error="RepoNotFound")
        elif owner == "broken":
            self.send(500)
        elif what == "revision":
            sha = str(self.server.commit) * 40
            self.server.commit += owner == "moving"
            self.send(200, json.dumps({"id": f"{owner}/{name}", "sha": sha}).encode())
        elif what == "tree":
            files = [path for path in folder.rglob("*") if path.is_file()]
            entries = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size}
                for path in files
            ]
            self.send(200, json.dumps([{**entry, "oid": "1" * 40} for entry in entries]).encode())
        elif owner == "gated":
            self.send(403 if token else 401, error="GatedRepo")
        else:
            time.sleep(self.server.delay)
            commit, _, file = rest.partition("/")
            data = (folder / file).read_bytes()
            etag = hashlib.sha1(data).hexdigest()
            self.send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def send(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        error: str | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The hub's repositories: the tiny model, with files that aren't to be downloaded."""
    root = tmp_path_factory.mktemp("hub")
    model = root / MODEL
    __main__.convert_folder(str(folder), str(model), format="hf")
    write(model, "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model")
    write(model, "README.md", "pytorch_model.bin", "model.gguf", "onnx/model.safetensors")
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    write(root / "owner/old", "config.json", *shards, "pytorch_model.bin.index.json", "tf_model.h5")
    write(root / "owner/native", "config.json", "consolidated.00.pth", "original/params.json")
    write(root / "gated/model", "config.json", "model.safetensors")
    shutil.copytree(model, root / "moving/model")
    return root


@pytest.fixture
def server(root: Path) -> Iterator[Hub]:
    with Hub(root) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def folders(*model_ids: str, env: Mapping[str, str]) -> list[Any]:
    """For each model the names of the files in its local folder, or the error."""
    result = run(sys.executable, FOLDERS, *model_ids, env=env)
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


# --- What is downloaded -------------------------------------------------------------------------


def test_one_kind_of_weights_is_downloaded_and_then_comes_from_the_cache(
    server: Hub, tmp_path: Path
) -> None:
    ids = (MODEL, "owner/old", "owner/native")
    model, old, native = folders(*ids, env=server.env(tmp_path))
    config = ["config.json", "generation_config.json"]
    vocabulary = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert model == [*config, "model.safetensors", *vocabulary]
    shards = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert old == ["config.json", *shards, "pytorch_model.bin.index.json"]
    assert re.fullmatch(
        r"FileNotFoundError: the hub's 'owner/native' has neither \*.safetensors nor .*: "
        "hf download owner/native --local-dir native",
        native,
    )
    # "config.json" of the last one is needed to see that it has no weights
    assert set(server.downloads()) == {*model, *old}

    n_requests = len(server.requests)
    assert folders(*ids, env=server.env(tmp_path, HF_HUB_OFFLINE="1")) == [model, old, native]
    assert len(server.requests) == n_requests


@pytest.mark.slow
def test_build_online_and_offline(server: Hub, tmp_path: Path) -> None:
    for offline in ("0", "1"):
        env = server.env(tmp_path, HF_HUB_OFFLINE=offline)
        result = run(sys.executable, BUILD, MODEL, env=env)
        assert "after build" in result.stdout, result.stderr


@pytest.mark.slow
def test_the_command_line(server: Hub, tmp_path: Path) -> None:
    env = server.env(tmp_path)
    result = run(sys.executable, "-m", "llama", "info", MODEL, env=env)
    assert f"{MODEL} (Hugging Face layout)" in result.stdout, result.stderr
    result = run(sys.executable, "-m", "llama", "info", "nobody/x", env=env)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "error: there is no folder 'nobody/x', and the hub has no model"
    )
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_all_commands_and_examples(server: Hub, tmp_path: Path) -> None:
    env = server.env(tmp_path / "home")
    short = ("--max_gen_len", "2", "--device", "cpu")
    for words in (
        ("-m", "llama", "verify", MODEL),
        ("-m", "llama", "convert", MODEL, tmp_path / "native"),
        ("-m", "llama", "complete", MODEL, "Once", *short),
        ("-m", "llama", "chat", MODEL, "Hello", *short),
        (ROOT / "example_text_completion.py", MODEL, "--max_gen_len", "2"),
        (ROOT / "example_chat_completion.py", MODEL, "--max_gen_len", "2"),
    ):
        result = run(sys.executable, *words, env=env)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "native" / "consolidated.00.pth").is_file()


# --- Errors -------------------------------------------------------------------------------------


def test_gated_unknown_and_failing(server: Hub, tmp_path: Path) -> None:
    ids = ("gated/model", "nobody/x", "broken/x")
    page = f"http://127.0.0.1:{server.server_port}/gated/model"
    login, unknown, broken = folders(*ids, env=server.env(tmp_path))
    assert login == (
        f"PermissionError: {page} needs a valid login: accept the license on that page, then run "
        "hf auth login, or set HF_TOKEN"
    )
    assert "FileNotFoundError: there is no folder 'nobody/x', and the hub has no model" in unknown
    assert "hf auth login" in unknown
    assert broken.startswith("OSError: ")
    assert broken.endswith("broken/x couldn't be downloaded (HTTP status 500): try again later")

    access, private = folders(*ids[:2], env=server.env(tmp_path, HF_TOKEN=TOKEN))
    assert access.startswith(f"PermissionError: {page} is gated, and your account or token has no ")
    assert private == unknown
    assert server.requests[-1][2] == f"Bearer {TOKEN}"


def test_offline_and_unreachable(server: Hub, tmp_path: Path) -> None:
    offline = folders(MODEL, env=server.env(tmp_path, HF_HUB_OFFLINE="1"))[0]
    unreachable = folders(MODEL, env=server.env(tmp_path, HF_ENDPOINT="http://127.0.0.1:9"))[0]
    remedy = f'run HF_HUB_OFFLINE=0 hf download {MODEL} --exclude "original/*"'
    for message, why in ((offline, "HF_HUB_OFFLINE is set"), (unreachable, "unreachable")):
        assert message.startswith(f"FileNotFoundError: there is no folder {MODEL!r}, the cache ")
        assert why in message
        assert message.endswith(remedy)
    assert server.requests == []


@pytest.mark.slow
def test_a_token_that_no_header_can_hold_isnt_shown(server: Hub, tmp_path: Path) -> None:
    result = run(
        sys.executable, BUILD, MODEL, env=server.env(tmp_path, HF_TOKEN=f"{TOKEN}\v{TOKEN}")
    )
    assert "couldn't be downloaded (LocalProtocolError): check " in result.stderr
    assert TOKEN not in result.stdout + result.stderr


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"no folder 'owner/model', .*: pip install .*face_hub$"):
        Llama.build("owner/model", device="cpu")


# --- Which names are ids ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "/owner/name",
        "./name",
        "../name",
        "owner",
        "owner/",
        "owner/name/more",
        "owner/na me",
        "owner/na--me",
        "owner/a..b",
        "owner/-name",
        "owner/name.git",
        "~/name",
        "öwner/name",
        "owner/name\n",
        "",
    ],
)
def test_other_names_are_folders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert hub.local_folder(name) == name


def test_the_message_for_a_missing_folder_names_the_hub(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder at .* the id owner/name"):
        Llama.build(str(tmp_path / "x"), device="cpu")


def test_an_existing_folder_or_file_comes_before_an_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "owner/model")
    Llama.build("owner/model", device="cpu")
    write(tmp_path, "owner/file")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at 'owner/file'"):
        Llama.build("owner/file", device="cpu")


# --- Ranks --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_rank_downloads_and_the_others_wait(server: Hub, tmp_path: Path) -> None:
    server.delay = 3  # longer than the timeout of a rank that sends no heartbeat
    options = json.dumps({"rank_timeout": 2, "quiet_ranks": False})
    result = torchrun(2, BUILD, MODEL, options, env=server.env(tmp_path))
    assert result.stdout.count("after build") == 2, result.stderr
    names = server.downloads()
    assert len(names) == 2 * len(set(names)), "expected one HEAD and one GET for each file"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_id", "words"), [("gated/model", "login"), ("nobody/x", "no model")]
)
def test_all_ranks_get_the_error(server: Hub, tmp_path: Path, model_id: str, words: str) -> None:
    torchrun(2, BUILD_ERROR, model_id, tmp_path, env=server.env(tmp_path / "home"))
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert words in first
    assert re.fullmatch(rf"rank 0 failed \(\w+: {re.escape(first)}\)", second)


@pytest.mark.slow
def test_ranks_never_load_different_commits(server: Hub, tmp_path: Path) -> None:
    torchrun(2, BUILD_ERROR, "moving/model", tmp_path, env=server.env(tmp_path / "home"))
    words = f"Llama.build: the hub's commit is '{'5' * 40}' on rank 0 and '{'6' * 40}' on rank 1"
    for rank in "01":
        assert words in (tmp_path / rank).read_text()
