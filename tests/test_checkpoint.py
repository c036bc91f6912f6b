"""Native checkpoints: loading, error messages, and peak memory."""

import hashlib
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, PROGRAMS, run, write_checkpoint
from torch import Tensor

from llama import Llama
from llama.checkpoint import reader


def build(folder: Path, **arguments: Any) -> Llama:
    defaults: dict[str, Any] = {"max_seq_len": 32, "dtype": "float32", "device": "cpu"}
    return Llama.build(str(folder), **(defaults | arguments))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, for tests that damage it."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# --- Loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16, "float16"])
def test_dtypes_are_converted_while_loading(
    tmp_path: Path, weights: dict[str, Tensor], stored: torch.dtype, dtype: str | torch.dtype
) -> None:
    stored_weights = {key: weight.to(stored) for key, weight in weights.items()}
    folder = write_checkpoint(tmp_path, PARAMS, stored_weights)
    model = build(folder, dtype=dtype, accelerate=False).model  # which may widen the norms
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, stored_weights[key].to(wanted))


def test_conversion_in_chunks(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    whole = build(folder, dtype="bfloat16").model.state_dict()
    monkeypatch.setattr(reader, "_CHUNK_BYTES", 5000)
    for key, tensor in build(folder, dtype="bfloat16").model.state_dict().items():
        assert torch.equal(tensor, whole[key])


def test_views_and_shared_storages_are_read_correctly(
    copy: Path, weights: dict[str, Tensor]
) -> None:
    """A transposed tensor, and two tensors with one storage, as in files with tied embeddings."""
    tricky = dict(weights)
    tricky["output.weight"] = tricky["tok_embeddings.weight"]
    key = "layers.0.attention.wo.weight"
    tricky[key] = weights[key].T.contiguous().T
    torch.save(tricky, copy / "consolidated.00.pth")
    for dtype in ("float32", "bfloat16"):
        state = build(copy, dtype=dtype, accelerate=False).model.state_dict()
        for name, weight in tricky.items():
            assert torch.equal(state[name], weight.to(state[name].dtype)), name


def test_big_endian_files_are_refused(copy: Path) -> None:
    """torch byte-swaps such a file in mapped pages, and those are released while loading."""
    path = copy / "consolidated.00.pth"
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, data in records.items():
            target.writestr(name, b"big" if name.endswith("byteorder") else data)
    with pytest.raises(ValueError, match="is 'big'-endian and this machine 'little'"):
        build(copy)


def test_llama2s_rope_freqs_are_ignored(copy: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights | {"rope.freqs": torch.ones(4)}, copy / "consolidated.00.pth")
    build(copy)
    torch.save(weights | {"rope.frequencies": torch.ones(4)}, copy / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"unknown key\(s\) 'rope\.frequencies"):
        build(copy)


def test_params_without_rope_theta_or_vocab_size(copy: Path) -> None:
    """As in Llama 2: rope_theta defaults to 10000, vocab_size to the tokenizer's."""
    params = PARAMS | {"vocab_size": -1}
    del params["rope_theta"]
    (copy / "params.json").write_text(json.dumps(params))
    args = build(copy).model.params
    assert (args.rope_theta, args.vocab_size) == (10000.0, 1024)


def test_params_that_change_nothing_are_accepted(copy: Path) -> None:
    neutral = {
        "max_seq_len": 2048,
        "max_batch_size": 6,
        "lora_args": None,
        "quantization_args": None,
        "vision_chunk_size": -1,
        "vision_max_num_chunks": 4,
        "vision_num_cross_attention_layers": -1,
        "use_scaled_rope": None,
        "ffn_dim_multiplier": None,
    }
    (copy / "params.json").write_text(json.dumps(PARAMS | neutral))
    found = vars(build(copy).model.params)
    (copy / "params.json").write_text(json.dumps(PARAMS))
    assert found == vars(build(copy).model.params)


def test_two_builds_print_one_line_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = build(folder), build(folder, dtype="bfloat16")
    assert [two.model.output.weight.dtype, one.model.output.weight.dtype] == [
        torch.bfloat16,
        torch.float32,
    ]
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("Loaded in ")
        assert line.endswith(" seconds")
        float(line.split()[2])
    assert captured.err == ""


def test_build_leaves_global_torch_state_alone(folder: Path) -> None:
    """Fault 6: the published build changes the default dtype and device and the global seed."""
    before = torch.get_rng_state()
    build(folder)
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_device() == torch.device("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.distributed.is_initialized()


def test_a_foreign_world_size_does_not_start_a_group(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It only warns, as several processes may have been intended; with or without RANK."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("RANK", "LOCAL_RANK"):
        with pytest.warns(UserWarning, match="WORLD_SIZE is 4, but torchrun did not start"):
            build(folder).generate([[1]], 2)
        assert not torch.distributed.is_initialized()
        monkeypatch.setenv(name, "2")


# --- Errors (fault 6) ---------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_code_in_a_checkpoint_is_not_run(
    copy: Path, weights: dict[str, Tensor], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    path = copy / "consolidated.00.pth"
    if how == "pickle":
        path.write_bytes(pickle.dumps(weights | {"x": Evil()}))
    else:
        torch.save(weights | {"x": Evil()}, path)
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth"):
        build(copy)
    assert not (copy / "evil-was-here").exists()


def test_damaged_files(copy: Path) -> None:
    path = copy / "consolidated.00.pth"
    data = path.read_bytes()
    shorter = [data[:n] for n in (1, 100, 5000, 65536, len(data) // 2, len(data) - 100)]
    for damaged in (b"", b"<html>", bytes(100_000), *shorter):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"(?s)consolidated\.00\.pth.*download it again"):
            build(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"lacks 'norm\.weight"),
        ({"layers.9.ffn_norm.weight": torch.ones(128)}, r"unknown key\(s\) 'layers\.9\.ffn_norm"),
        ({"norm.weight": torch.ones(64)}, r"norm\.weight .* \(64,\), expected \(128,\)"),
        ({"norm.weight": torch.ones(128, dtype=torch.int8)}, "int8, .* quantized"),
        (
            {"norm.weight": torch.ones(128).to(torch.float8_e4m3fn)},
            "float8_e4m3fn, .* quantized weights are read only with",
        ),
        (
            {"norm.weight": torch.ones(128).to_sparse()},
            "_rebuild_sparse_tensor; expected",
        ),
        ({"norm.weight": [1.0] * 128}, "isn't a dense tensor: list"),
        (
            {"norm.weight": torch.ones(128, device="meta")},
            "_rebuild_meta_tensor.*; expected",
        ),
    ],
)
def test_wrong_contents(
    copy: Path, weights: dict[str, Tensor], changes: dict[str, Any], message: str
) -> None:
    contents = {k: w for k, w in (weights | changes).items() if w is not None}
    torch.save(contents, copy / "consolidated.00.pth")
    with pytest.raises(ValueError, match=message):
        build(copy)


def test_a_checkpoint_that_isnt_a_dict(copy: Path, weights: dict[str, Tensor]) -> None:
    torch.save(list(weights.values()), copy / "consolidated.00.pth")
    with pytest.raises(ValueError, match="holds a list, expected a dict"):
        build(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object"),
        (json.dumps(PARAMS | {"n_experts": 8}), r"unknown parameter\(s\) 'n_experts"),
        (
            json.dumps(PARAMS | {"quantization_args": {"group_size": 32}}),
            "quantized weights .*bfloat16 version",
        ),
        (json.dumps(PARAMS | {"lora_args": {"rank": 16}}), "quantized weights .*bfloat16 version"),
        (
            json.dumps(PARAMS | {"vision_chunk_size": 448}),
            r"unknown parameter\(s\) 'vision_chunk_size",
        ),
        (json.dumps(PARAMS | {"n_heads": 7}), "n_heads"),
        (json.dumps(PARAMS | {"dim": "128"}), "dim is '128'"),
        (json.dumps(PARAMS | {"vocab_size": 128256}), "128256 tokens, but the tokenizer has 1024"),
        (json.dumps(PARAMS | {"n_layers": 3}), r"lacks 'layers\.2\.attention\.wk"),
        (json.dumps(PARAMS | {"n_layers": 1}), r"unknown key\(s\) 'layers\.1\."),
    ],
)
def test_wrong_params(copy: Path, text: str, message: str) -> None:
    (copy / "params.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        build(copy)


def test_missing_files(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at"):
        build(tmp_path / "nowhere")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"but 'model\.safetensors': download .*config"):
        build(tmp_path / "hf")
    (copy / "consolidated.02.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"but not 'consolidated\.01\.pth"):
        build(copy)
    (copy / "consolidated.02.pth").unlink()
    (copy / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match="give tokenizer_path"):
        build(copy)
    build(copy, tokenizer_path=str(DEMO / "tokenizer.model"))
    (copy / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"params\.json' is missing"):
        build(copy, tokenizer_path=str(DEMO / "tokenizer.model"))


def test_impossible_model_parallel_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["my chat.py", "--ckpt_dir", "two"])
    with pytest.raises(ValueError, match="is 2, but 1 process") as error:
        build(folder, model_parallel_size=2)
    assert "torchrun --nproc_per_node 2 'my chat.py' --ckpt_dir two" in str(error.value)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ipython"])
    with pytest.raises(ValueError, match=r"--nproc_per_node 2 your_script\.py"):
        build(folder, model_parallel_size=2)
    monkeypatch.setattr(sys, "argv", ["/site/llama/__main__.py", "chat", "two"])
    with pytest.raises(ValueError, match=r"--nproc_per_node 2 -m llama chat two"):
        build(folder, model_parallel_size=2)
    with pytest.raises(ValueError, match="model_parallel_size is 0"):
        build(folder, model_parallel_size=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "xpu"}, "device is 'xpu', but this machine has 'cpu'"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of bfloat16, float16, float32"),
        ({"dtype": torch.float64}, "dtype is torch.float64"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_batch_size": -1}, "max_batch_size is -1"),
        ({"max_seq_len": 8193}, "max_seq_len is 8193, .* at most 8192"),
    ],
)
def test_impossible_arguments(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(folder, **arguments)


@pytest.mark.parametrize(
    ("params", "context"),
    [({"rope_theta": 10000.0}, 4096), ({"use_scaled_rope": True}, 131072), ({}, 8192)],
)
def test_max_seq_len_is_limited_to_the_familys_context(
    copy: Path, params: dict[str, Any], context: int
) -> None:
    """Fault 8: max_seq_len beyond the model's training context."""
    (copy / "params.json").write_text(json.dumps(PARAMS | params))
    with pytest.raises(ValueError, match=f"at most {context}"):
        build(copy, max_seq_len=context + 1)
    assert build(copy, max_seq_len=context, max_batch_size=1).model.params.max_seq_len == context


# --- Memory -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_build_takes_little_more_memory_than_the_weights(
    big: Path, folder: Path, dtype: str
) -> None:
    result = run(sys.executable, PROGRAMS / "build_memory.py", big, folder, dtype)
    assert result.returncode == 0, result.stderr
    ratio, n_bytes, touched = (float(x) for x in result.stdout.splitlines()[-1].split())
    print(f"{dtype}: peak RSS {ratio:.3f} x {n_bytes / 1e9:.2f} GB of weights")
    assert n_bytes > 1e9
    assert ratio <= (0.2 if dtype == "bfloat16" else 1.15)  # the stored dtype: mapped, not read
    assert touched <= 1.15


# --- The demo's own folder ----------------------------------------------------------------------


def test_the_demo_matches_its_checklist() -> None:
    lines = (DEMO / "checklist.chk").read_text().splitlines()
    assert len(lines) == 3
    for line in lines:
        md5, name = line.split()
        assert hashlib.md5((DEMO / name).read_bytes()).hexdigest() == md5


def test_max_seq_len_none_is_2048_or_the_shorter_context(folder: Path, stories: Path) -> None:
    assert build(folder, max_seq_len=None).model.params.max_seq_len == 2048
    assert build(stories / "hf", max_seq_len=None).model.params.max_seq_len == 512
