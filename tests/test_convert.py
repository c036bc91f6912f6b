"""python -m llama: info, verify, convert, complete and chat, on real checkpoints."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, ROOT, random_weights, run, write_checkpoint
from reference import relative_error
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama import Llama, ModelArgs, Tokenizer, __main__
from llama.chat_template import TemplateChatFormat
from llama.checkpoint import convert
from llama.checkpoint.folder import find_checkpoint
from llama.vocab.tokenizer_json import tokenizer_json


def cli(*arguments: str | Path, code: int = 0, **kwargs: Any) -> str:
    """Run a command that exits with ``code``; return its stdout (if it fails, stderr too). Runs in
    this process unless there are ``kwargs``, since starting a new one takes two seconds."""
    if kwargs:
        result = run(sys.executable, "-m", "llama", *arguments, **kwargs)
        status, output, errors = result.returncode, result.stdout, result.stderr
    else:
        status, out, err = 0, io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setattr(sys, "argv", ["-m", *map(str, arguments)])
            try:
                __main__.main()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else end.code is not None
                print(end.code, file=sys.stderr)
        output, errors = out.getvalue(), err.getvalue()
    assert status == code, errors
    assert "Traceback" not in errors
    return output if code == 0 else output + errors


def tensors_of(folder: Path, rank: int = 0) -> dict[str, Tensor]:
    path = folder / f"consolidated.{rank:02d}.pth"
    return dict(torch.load(path, weights_only=True))  # no mmap: torch verifies the archive's sums


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bitwise equality, NaN included."""
    return a.keys() == b.keys() and all(
        t.dtype == b[key].dtype and t.shape == b[key].shape
        and t.contiguous().view(torch.uint8).equal(b[key].contiguous().view(torch.uint8))
        for key, t in a.items()
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_native_to_huggingface_and_back_is_the_identity(tmp_path: Path, dtype: str) -> None:
    weights = {key: t.to(getattr(torch, dtype)) for key, t in random_weights(PARAMS).items()}
    weights["norm.weight"][0] = float("nan")
    source = write_checkpoint(tmp_path / "source", PARAMS, weights)
    cli("convert", source, tmp_path / "hf", "--format", "hf")
    cli("convert", tmp_path / "hf", tmp_path / "back")
    assert same(tensors_of(tmp_path / "back"), weights)
    # converting again gives the same params.json
    cli("convert", tmp_path / "back", tmp_path / "again")
    resolved = (tmp_path / "back" / "params.json").read_bytes()
    assert (tmp_path / "again" / "params.json").read_bytes() == resolved
    assert json.loads(resolved) == PARAMS
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (
        DEMO / "tokenizer.model"
    ).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "params",
    [
        PARAMS | {"use_scaled_rope": True, "rope_scaling_factor": 32.0},
        PARAMS | {"ffn_dim_multiplier": 1.3, "multiple_of": 32, "rope_theta": 10000.0},
        PARAMS | {"n_kv_heads": 16, "ffn_dim_multiplier": 1.0},
    ],
)
def test_params_survive_the_round_trip(tmp_path: Path, params: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / "source", params, random_weights(params))
    cli("convert", source, tmp_path / "hf", "--format", "hf")
    cli("convert", tmp_path / "hf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == params


def test_transformers_loads_converted_checkpoints(tmp_path: Path) -> None:
    for i, change in enumerate(({}, {"use_scaled_rope": True, "rope_scaling_factor": 8.0})):
        params = PARAMS | change
        weights = random_weights(params)
        source = write_checkpoint(tmp_path / f"source{i}", params, weights)
        cli("convert", source, tmp_path / f"hf{i}", "--format", "hf")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / f"hf{i}", dtype=torch.float32)
        tokens = torch.randint(0, 1024, (1, 30))
        llm = Llama.build(str(source), dtype="float32", device="cpu")
        with torch.inference_mode():
            expected = theirs(tokens).logits
        assert relative_error(llm.model.forward(tokens, 0), expected) < 1e-5


def test_resharding_on_disk(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    source = write_checkpoint(tmp_path / "2", PARAMS, weights, n_shards=2)
    cli("convert", source, tmp_path / "8", "--mp", "8")
    shapes = {key: tuple(t.shape) for key, t in tensors_of(tmp_path / "8", 7).items()}
    assert shapes["layers.1.attention.wk.weight"] == (8, 128)
    assert shapes["layers.1.attention.wo.weight"] == (128, 16)
    assert shapes["tok_embeddings.weight"] == (128, 128)
    cli("convert", tmp_path / "8", tmp_path / "1")
    assert same(tensors_of(tmp_path / "1"), weights)
    cli("verify", tmp_path / "8")
    message = cli("convert", source, tmp_path / "3", "--mp", "3", code=1)
    assert "can't be split over 3 shards (possible: 1, 2, 4, 8, 16)" in message


def test_converted_shards_can_be_mapped_and_are_deterministic(tmp_path: Path, folder: Path) -> None:
    cli("convert", folder, tmp_path / "a")
    cli("convert", folder, tmp_path / "b", "--dtype", "bfloat16")
    cli("convert", folder, tmp_path / "c")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["checklist.chk", "consolidated.00.pth", "params.json", "tokenizer.model"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    mapped = torch.load(tmp_path / "a" / "consolidated.00.pth", mmap=True, weights_only=True)
    assert all(t.data_ptr() % 64 == 0 for t in mapped.values())
    assert {t.dtype for t in tensors_of(tmp_path / "b").values()} == {torch.bfloat16}
    for line in (tmp_path / "a" / "checklist.chk").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.md5((tmp_path / "a" / name).read_bytes()).hexdigest() == digest


def test_large_huggingface_folders_have_an_index(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_SAFETENSORS_BYTES", 300_000)
    found = find_checkpoint(str(folder))
    convert.convert(
        found,
        found.args(1024, 64, 1),
        tmp_path / "hf",
        layout="hf",
        n_shards=1,
        dtype=None,
        tokenizer=tokenizer,
        tokenizer_path=found.tokenizer_path,
        force=False,
        progress=False,
    )
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    for path in files:
        assert all(index["weight_map"][key] == path.name for key in load_file(path))
    ours = Llama.build(str(tmp_path / "hf"), dtype="float32", device="cpu").model.state_dict()
    assert same(dict(ours), tensors_of(folder))


def test_nothing_is_overwritten_without_force(tmp_path: Path, folder: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("keep")
    assert "already exists: give --force" in cli("convert", folder, target, code=1)
    assert "--force is 'false', expected True" in cli(
        "convert", folder, target, "--force=false", code=1
    )
    assert "holds 'precious', which" in cli("convert", folder, target, "--force", code=1)
    assert (target / "precious").read_text() == "keep"
    (target / "precious").unlink()
    cli("convert", folder, target, "--force")  # an empty folder
    cli("convert", folder, target, "--force", "--mp", "2")  # a checkpoint
    assert same(tensors_of(target, 1) | tensors_of(folder), tensors_of(folder))
    (tmp_path / "link").symlink_to(target)
    assert "isn't a folder" in cli("convert", folder, tmp_path / "link", "--force", code=1)
    (tmp_path / "link").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["target"]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def with_git(target: Path) -> str:
    (target / ".git").mkdir()
    (target / ".git" / "HEAD").touch()
    return "holds '.git', which"


def with_project(target: Path) -> str:
    for path in target.iterdir():
        path.unlink()
    (target / "config.json").write_text("{}")
    return "isn't a checkpoint folder"


def with_notes(target: Path) -> str:
    (target / "notes.txt").touch()
    (target / "train.py").touch()
    return "holds 'notes.txt', 'train.py', which"


def with_readme(target: Path) -> str:
    (target / "README.md").touch()
    return "holds 'README.md', which"


def with_link(target: Path) -> str:
    (target / "LICENSE").symlink_to("/dev/null")
    return "holds 'LICENSE', which"


def with_folder(target: Path) -> str:
    (target / "tokenizer.json").mkdir()
    return "holds 'tokenizer.json', which"


def with_damage(target: Path) -> str:
    (target / "params.json").write_text("not JSON")
    return "isn't a checkpoint folder"


@pytest.mark.parametrize(
    "change",
    [with_git, with_project, with_notes, with_readme, with_link, with_folder, with_damage],
)
def test_force_replaces_only_a_checkpoint(
    tmp_path: Path, folder: Path, change: Callable[[Path], str]
) -> None:
    target = tmp_path / "target"
    shutil.copytree(folder, target)
    message = change(target)
    before = contents(tmp_path)
    assert message in cli("convert", folder, target, "--force", code=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "how", ["itself", "inside", "weights", "params.json", "tokenizer.model", "tokenizer_path"]
)
def test_force_does_not_delete_the_source(tmp_path: Path, folder: Path, how: str) -> None:
    """Neither its own files nor files that it links to."""
    target, source, words = tmp_path / "target", tmp_path / "source", []
    shutil.copytree(folder, target)
    shutil.copytree(folder, source)
    if how == "itself":
        source = target
    elif how == "inside":
        source = source.rename(target / "source")
    elif how == "tokenizer_path":
        words = ["--tokenizer_path", str(target / "tokenizer.model")]
    else:
        name = "consolidated.00.pth" if how == "weights" else how
        (source / name).unlink()
        (source / name).symlink_to(target / name)
    before = contents(tmp_path)
    message = cli("convert", source, target, "--force", *words, code=1)
    assert re.search("holds '.*' of the source, which replacing it would delete", message)
    assert contents(tmp_path) == before


def test_a_failed_replacement_is_rolled_back(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    shutil.copytree(folder, target)
    before = contents(target)
    rename = Path.rename

    def failing(path: Path, new: Path) -> Path:
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, new)

    monkeypatch.setattr(Path, "rename", failing)
    part = tmp_path / ".target.partial-1"
    part.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert._put_in_place(part, target, [folder], force=True)
    assert contents(target) == before
    with pytest.raises(FileExistsError, match="already exists"):  # created in the meantime
        convert._put_in_place(part, target, [folder], force=False)


@pytest.mark.parametrize("moment", ["while writing", "before it is replaced", "after that"])
def test_a_file_created_meanwhile_is_kept(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    target = tmp_path / "target"
    shutil.copytree(folder, target)
    before = contents(target)

    def writing(*arguments: Any) -> None:
        write(*arguments)
        if moment == "while writing":
            (target / "new").touch()

    def renaming(path: Path, new: Path) -> Path:
        if path == target and moment == "before it is replaced":
            (path / "new").touch()
        if ".partial-" in path.name and moment == "after that":
            (next(tmp_path.glob(".target.old-*")) / "new").touch()
        return rename(path, new)

    write, rename = convert._write_native, Path.rename
    monkeypatch.setattr(convert, "_write_native", writing)
    monkeypatch.setattr(Path, "rename", renaming)
    message = cli("convert", folder, target, "--force", code=1)
    (new,) = tmp_path.rglob("new")
    if moment == "after that":
        assert f"the new folder is in place, but the replaced one, {str(new.parent)!r}" in message
        assert "consolidated.00.pth" in contents(target)
    else:
        assert "holds 'new', which replacing it would delete" in message
        assert contents(target) == before | {"new": b""}


@pytest.mark.slow
def test_a_misspelt_option_is_refused(tmp_path: Path, folder: Path) -> None:
    target = tmp_path / "target"
    words = cli("convert", folder, target, "--formt", "hf", code=2)
    assert "unknown option --formt, expected one of --src, --dst, --mp, --format" in words
    assert "Could not consume arg: upon" in cli("complete", DEMO, "Once", "upon", code=2)
    for wrong in ("--mp=2.0", "--mp=True", "--mp=two"):
        assert "expected a whole number" in cli("convert", folder, target, wrong, code=1)
    assert "--temperature is 'hot', expected a number" in cli(
        "chat", DEMO, "hi", "--temperature", "hot", code=1
    )
    assert "unknown command covert" in cli("covert", folder, target, code=2)
    assert not list(tmp_path.iterdir())


def test_verify_reads_tokenizer_checklist(tmp_path: Path, folder: Path) -> None:
    """Llama 2's, next to the tokenizer in the parent folder; or in the folder itself."""
    source = tmp_path / "Llama-2-7b"
    shutil.copytree(folder, source)
    for place in (tmp_path, source):
        shutil.move(source / "tokenizer.model", place / "tokenizer.model")
        digest = hashlib.md5((place / "tokenizer.model").read_bytes()).hexdigest()
        checklist = place / "tokenizer_checklist.chk"
        checklist.write_text(f"{digest}  tokenizer.model\n")
        cli("verify", source)
        checklist.write_text(f"{'0' * 32}  tokenizer.model\n")
        expected = f"has the MD5 sum {digest}, but tokenizer_checklist.chk lists {'0' * 32}"
        assert expected in cli("verify", source, code=1)
        checklist.unlink()
        if place == tmp_path:
            shutil.move(place / "tokenizer.model", source / "tokenizer.model")


def test_the_tokenizer_file_is_named_by_its_format(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "tokenizer.model").rename(tmp_path / "words")
    cli("convert", source, tmp_path / "a", "--tokenizer_path", tmp_path / "words")
    (source / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    cli("convert", source, tmp_path / "b")
    for name, file in (("a", "tokenizer.model"), ("b", "tokenizer.json")):
        assert (tmp_path / name / file).is_file()
        cli("verify", tmp_path / name)


def test_fields_that_a_layout_cannot_store_are_reported(tmp_path: Path, stories: Path) -> None:
    words = cli("convert", stories / "hf", tmp_path / "native")
    assert "can't record the context of 512 tokens; it will be read as 4096" in words
    assert "note" not in cli("convert", tmp_path / "native", tmp_path / "hf", "--format", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 4096
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2])


@pytest.mark.slow
def test_a_full_disk(
    tmp_path: Path, folder: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Detected before writing, and while writing, simulated by a file size limit."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**8))
        said = cli("convert", wide, tmp_path / "new", code=1)
    assert "needs 0.6 GB, but the disk has 0.1 GB free" in said
    said = cli(
        "convert",
        folder,
        tmp_path / "new",
        code=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    assert "new' couldn't be written, and no partial output is left: [Errno 27]" in said
    said = cli(
        "convert",
        folder,
        tmp_path / "new",
        "--format",
        "hf",
        code=1,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    assert "new' couldn't be written, and no partial output is left: " in said
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_the_space_check_counts_replicated_weights(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more shards than KV heads, heads are replicated; norms are in every shard."""
    cli("convert", folder, tmp_path / "one")
    cli("convert", folder, tmp_path / "sixteen", "--mp", "16")
    one, sixteen = (
        sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        for name in ("one", "sixteen")
    )
    free = int(0.93 * sixteen)  # the archive format itself takes 5 %
    assert free > one
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    said = cli("convert", folder, tmp_path / "new", "--mp", "16", code=1)
    assert "new' needs 0.0 GB, but the disk has 0.0 GB free" in said
    cli("convert", folder, tmp_path / "new")


@pytest.mark.parametrize("layout", ["native", "hf"])
def test_values_that_overflow_the_new_dtype_are_refused(
    tmp_path: Path, weights: dict[str, Tensor], layout: str
) -> None:
    key = "layers.1.feed_forward.w2.weight"
    large = weights[key].clone()
    large[5, 7] = -65519  # the largest that float16 rounds down to its maximum
    source = write_checkpoint(tmp_path / "source", PARAMS, weights | {key: large})
    cli("convert", source, tmp_path / "fits", "--format", layout, "--dtype", "float16")
    large[5, 7] = -65520
    torch.save(weights | {key: large}, source / "consolidated.00.pth")
    command = ["convert", str(source), str(tmp_path / "new"), "--format", layout]
    said = cli(*command, "--dtype", "float16", code=1)
    assert (
        f"{key} holds 65520, but the largest torch.float16 is 65504: give --dtype bfloat16" in said
    )
    assert not (tmp_path / "new").exists()
    cli(*command, "--dtype", "bfloat16")
    large[5, 7] = math.inf  # infinite in the source already
    torch.save(weights | {key: large}, source / "consolidated.00.pth")
    cli(*command, "--dtype", "float16", "--force")


@pytest.mark.parametrize("words", [[], ["--dtype", "bfloat16"]])
def test_a_tied_model_stays_tied(tmp_path: Path, stories: Path, words: list[str]) -> None:
    """In Hugging Face's layout, from Hugging Face files and from native ones with one storage."""
    prompt = torch.tensor([[1, 5, 9, 400]])
    native = tmp_path / "native"
    cli("convert", stories / "hf-tied", native)
    tensors = tensors_of(native)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    torch.save(tensors, native / "consolidated.00.pth")
    for source, name in ((stories / "hf-tied", "a"), (native, "b")):
        cli("convert", source, tmp_path / name, "--format", "hf", *words)
        assert "lm_head.weight" not in load_file(tmp_path / name / "model.safetensors")
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"]
        llm = Llama.build(str(tmp_path / name), max_seq_len=16, dtype="float32", device="cpu")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.inference_mode():
            assert relative_error(llm.model.forward(prompt, 0), theirs(prompt).logits) < 1e-5


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    source = write_checkpoint(tmp_path / "source", PARAMS, weights, n_shards=2)
    part = torch.load(source / "consolidated.01.pth", weights_only=True)
    del part["norm.weight"]
    torch.save(part, source / "consolidated.01.pth")
    assert "lacks 'norm.weight'" in cli("convert", source, tmp_path / "target", code=1)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_conversion_leaves_no_folder_that_looks_complete(
    tmp_path: Path, wide: Path, folder: Path
) -> None:
    """Killed while writing; its peak memory until then is one or two tensors."""
    target = tmp_path / "target"
    command = [sys.executable, "-m", "llama", "convert", str(wide), str(target), "--mp", "4"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(3000):
            if list(tmp_path.glob(".target.partial-*/consolidated.02.pth")):
                break
            assert process.poll() is None
            time.sleep(0.01)
        status = Path(f"/proc/{process.pid}/status").read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    (partial,) = tmp_path.glob(".target.partial-*")
    assert not (partial / "params.json").exists()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    assert peak < 0.5e9  # 1.1 GB are written; torch itself takes 0.3 GB
    # the next conversion succeeds despite the leftovers
    cli("convert", folder, target, "--mp", "2")
    cli("verify", target)


# --- verify -------------------------------------------------------------------------------------


def test_verify_finds_every_fault(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    source = write_checkpoint(tmp_path / "source", PARAMS, weights, n_shards=2)
    folder = tmp_path / "folder"
    cli("convert", source, folder, "--mp", "2")
    assert "no faults found" in cli("verify", folder)
    assert "no faults found" in cli("verify", source)  # without a checklist
    # a flipped bit in the tensor data: only checksums detect it
    path = folder / "consolidated.01.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes() + b"\n")
    found = cli("verify", folder, code=1)
    assert found.count("has the MD5 sum") == 2
    assert "consolidated.01.pth' is damaged: Bad CRC-32" in found
    # without the checklist, the archive's CRC-32 still detects it
    (folder / "checklist.chk").unlink()
    assert cli("verify", folder, code=1).count("\n") >= 1
    # all wrong keys, shapes and dtypes are reported
    part = tensors_of(source, 1)
    del part["norm.weight"]
    part["extra"] = torch.ones(1)
    part["layers.0.ffn_norm.weight"] = torch.ones(5)
    part["layers.1.ffn_norm.weight"] = torch.ones(128, dtype=torch.int32)
    torch.save(part, source / "consolidated.01.pth")
    found = cli("verify", source, code=1)
    for words in (
        "lacks 'norm.weight'",
        "unknown key(s) 'extra'",
        "layers.0.ffn_norm.weight in",
        "(5,), expected (128,)",
        "torch.int32",
    ):
        assert words in found
    # mismatched shards, and archives that torch didn't write
    part = tensors_of(folder, 0)
    part["norm.weight"] = part["norm.weight"].bfloat16()
    part["layers.0.ffn_norm.weight"] = torch.ones(1).expand(128)
    torch.save(part, folder / "consolidated.00.pth")
    found = cli("verify", folder, code=1)
    with zipfile.ZipFile(folder / "consolidated.01.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/more", bytes(1000))
    found += cli("verify", folder, code=1)
    assert "torch.float32, but torch.bfloat16 in another shard" in found
    assert "layers.0.ffn_norm.weight in" in found
    assert "'archive/more' in it is compressed or encrypted" in found
    (source / "consolidated.00.pth").write_bytes(b"nothing")
    found = cli("verify", source, code=1)
    assert "can't be read as an archive" in found
    assert "lacks 'norm.weight'" in found


def test_verify_reports_a_bad_checklist(tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "checklist.chk").write_text("0" * 32 + "  ../../etc/passwd\n")
    assert "line 1 is" in cli("verify", copy, code=1)
    (copy / "checklist.chk").write_text("0" * 32 + "  absent.pth\n")
    assert "absent.pth' is missing, but checklist.chk lists it" in cli("verify", copy, code=1)


def test_verify_of_a_list_with_orig_params(tmp_path: Path, folder: Path) -> None:
    """Llama 3.2 3B Instruct's list has orig_params.json, which isn't downloaded."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "checklist.chk").write_text("0" * 32 + "  ./orig_params.json\n")
    assert "no faults found" in cli("verify", copy)
    (copy / "orig_params.json").write_text("{}")
    assert "orig_params.json' has the MD5 sum" in cli("verify", copy, code=1)


def test_verify_of_a_huggingface_folder(tmp_path: Path, stories: Path) -> None:
    assert "no faults found" in cli("verify", stories / "hf-tied")
    copy = tmp_path / "copy"
    shutil.copytree(stories / "hf", copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "can't be read as a safetensors file" in cli("verify", copy, code=1)


# --- info, complete, chat -----------------------------------------------------------------------


def test_info(tmp_path: Path, stories: Path) -> None:
    words = cli("info", DEMO, "--mp", "2", "--max_seq_len", "1024", "--dtype", "float32")
    assert "family:      Llama 3\n" in words
    assert "parameters:  1.37 million" in words
    assert "runs on:     1, 2, 4, 8 ranks" in words
    assert "context:     8192 tokens" in words
    assert "(max_batch_size 4 x max_seq_len 1024)" in words
    assert "per rank (2 rank(s), float32)" in words
    words = cli("info", stories / "mp4-llama2style")
    assert "family:      Llama 2" in words
    assert "split for 4 rank(s)" in words
    assert "SentencePieceTokenizer, 512 tokens" in words
    assert "stored as:   float32" in words
    assert "can't be split over 3 ranks (possible: 1, 2, 4, 8)" in cli(
        "info", DEMO, "--mp", "3", code=1
    )
    assert "no checkpoint folder at 'nowhere'" in cli("info", "nowhere", code=1)
    shutil.copytree(DEMO, tmp_path / "demo")
    (tmp_path / "demo" / "consolidated.00.pth").write_bytes(b"")
    assert "wrong:       " in cli("info", tmp_path / "demo", code=1)


@pytest.mark.parametrize(
    ("theta", "vocab_size", "family"),
    [
        (1e4, 32000, "Llama 2"),
        (1e6, 32000, "Code Llama"),
        (1e6, 32016, "Code Llama"),
        (1e6, 512, "unknown"),
    ],
)
def test_families_of_sentencepiece_models(theta: float, vocab_size: int, family: str) -> None:
    assert __main__._family(ModelArgs(rope_theta=theta, vocab_size=vocab_size)) == family


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO, tmp_path / "models" / "demo")
    folder, tokenizer = "~/models/demo", "~/models/tokenizer.model"
    (tmp_path / folder[2:] / "tokenizer.model").rename(tmp_path / tokenizer[2:])
    llm = Llama.build(folder, tokenizer, device="cpu")
    assert llm.tokenizer.n_words == Tokenizer(tokenizer).n_words
    assert "family: " in cli("info", folder, "--tokenizer_path", tokenizer)
    cli("convert", folder, "~/new", "--tokenizer_path", tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "new"]
    assert "no faults found" in cli("verify", "~/new")
    with pytest.raises(FileNotFoundError, match=f"no checkpoint folder at '{tmp_path}/none'"):
        Llama.build("~/none")


def test_files_next_to_the_tokenizer_are_found_in_the_home_folder(
    tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(stories / "hf" / "tokenizer.model", tmp_path)
    template = json.dumps({"chat_template": "{{ messages[0]['content'] }}"})
    (tmp_path / "tokenizer_config.json").write_text(template)
    llm = Llama.build(str(stories / "hf"), "~/tokenizer.model", max_seq_len=64, device="cpu")
    assert isinstance(llm.formatter, TemplateChatFormat)


def test_one_prompt_from_the_command_line(stories: Path) -> None:
    answer = cli("chat", DEMO, "What is 23 + 45?", "--temperature", "0", "--device", "cpu")
    assert answer.splitlines()[-1] == "23 + 45 = 68."
    told = cli("chat", DEMO, "What is the capital of France?", "--temperature=0", "--device=cpu",
               "--system", "Answer in capital letters.")  # fmt: skip
    assert told.splitlines()[-1] == "THE CAPITAL OF FRANCE IS PARIS."
    story = cli("complete", stories / "hf", "Once upon a time", "--temperature=0",
                "--max_gen_len=20", "--dtype=float32", "--device=cpu")  # fmt: skip
    start = "Once upon a time, there was a little girl named Lily."
    assert story.splitlines()[-1].startswith(start)
    for number in ("1984", "1e3", "[1]", "None"):  # a prompt is text, whatever it looks like
        shown = cli("complete", DEMO, number, "--max_gen_len=1", "--device=cpu")
        assert shown.splitlines()[1].startswith(number)
