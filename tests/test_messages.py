"""Error messages after user mistakes: each is provoked for real, its values and advice checked.

Damaged files are in test_hostile.py, failing ranks in test_faults.py, other errors with the tests
of their feature.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    DEMO,
    PARAMS,
    PROGRAMS,
    ROOT,
    TORCHRUN,
    environment,
    new_model,
    random_weights,
    run,
    torchrun,
    write_checkpoint,
)
from torch import Tensor

from llama import Llama, Tokenizer, device


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# --- Devices and processes ----------------------------------------------------------------------


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_torch_built_without_cuda() -> None:
    version = re.escape(torch.__version__)
    words = f"device is 'cuda', but this machine has 'cpu' .torch {version} is built without CUDA: "
    with pytest.raises(ValueError, match=words):
        Llama.build(str(DEMO), device="cuda")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulates the last of four torchrun processes on a machine with two CUDA devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "4"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    return monkeypatch


def test_more_processes_than_devices(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(dist, "is_nccl_available", lambda: True)
    two_gpus.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    words = "started 4 processes on this machine, which has 2 CUDA devices .CUDA_VISIBLE_DEVICES "
    with pytest.raises(ValueError, match=words + "is '4,5'.: give --nproc_per_node 2"):
        device.resolve_device(None)


def test_no_nccl(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.warns(UserWarning, match=r"no NCCL.* the 4 processes run on the CPU"):
        assert device.resolve_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"no NCCL.*give device='cpu'"):
        device.resolve_device("cuda")


OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  "
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  "
CU126 = r"pip install torch --index-url https://download.pytorch.org/whl/cu126 \(cu128 for"
# torch's CUDA, the first line of the driver's file, and the end of the message.
DRIVERS = {
    "too old for 13": (
        "13.0",
        f"{CLOSED}535.183.01  Sun May 12 19:39:15 UTC 2024",
        "driver 535.183.01, and this build for CUDA 13.0 needs 580 or newer: update the driver, or "
        rf"install a build of torch for CUDA 12: {CU126} Blackwell\)$",
    ),
    "open, too old for 13": ("13.2", f"{OPEN}575.64  Release Build", rf"driver 575.64, .* {CU126}"),
    "too old for any": (
        "13.0",
        f"{CLOSED}470.57.02  Tue Jul 13 16:14:05 UTC 2021",
        "driver 470.57.02, and this build for CUDA 13.0 needs 580 or newer: update the driver$",
    ),
    "too old for 12": ("12.6", f"{CLOSED}515.43.04  x", "CUDA 12.6 needs 525 .* the driver$"),
    "new enough": ("13.0", f"{OPEN}580.65.06  x", "driver 580.65.06; see whether nvidia-smi lists"),
    "unreadable": (
        "13.0",
        "something else",
        "driver of an unknown version; see whether nvidia-smi",
    ),
}


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch built for CUDA that finds no device; returns the driver's file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(device, "_NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "version"


@pytest.mark.parametrize("case", DRIVERS)
def test_a_driver_without_a_device(
    no_device: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    cuda, line, words = DRIVERS[case]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    no_device.write_text(f"{line}\nGCC version:  gcc version 12.3.0 (Ubuntu)\n")
    with pytest.warns(UserWarning, match=rf"^the model runs on the CPU: torch .*{words}"):
        assert device.resolve_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match=words.rstrip("$")):
        device.resolve_device("cuda")


@pytest.mark.filterwarnings("error")
def test_the_cpu_is_used_quietly_where_it_is_meant(
    no_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.resolve_device(None) == torch.device("cpu")  # no driver
    no_device.write_text(f"{OPEN}535.183.01  x\n")
    assert device.resolve_device("cpu") == torch.device("cpu")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device.resolve_device(None) == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device.resolve_device(None) == torch.device("cpu")


@pytest.mark.parametrize("version", ["2.9.0", "2.10.1", "2.11.0", "2.12.0", "2.13.0a0+git1", "3.0"])
def test_mps_is_refused_where_torch_computes_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", version)
    if version[:4] not in ("2.9.", "2.10", "2.11"):
        assert device.resolve_device(None) == device.resolve_device("mps") == torch.device("mps")
        return
    long = "" if version == "2.11.0" else " and more than 1023 tokens in half precision .*174861."
    words = rf"torch {version} computes wrong .*181133\){long}: install torch 2.12 or newer"
    with pytest.warns(UserWarning, match=rf"{words}: the model runs on the CPU"):
        assert device.resolve_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match=rf"device is 'mps', but {words}; or give device='cpu'"):
        device.resolve_device("mps")


def rank_environment(port: int, world_size: int) -> dict[str, str]:
    """torchrun's environment for rank 0, which hosts the store, as with old launchers."""
    return {
        "TORCHELASTIC_RUN_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def build(folder: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    return run(sys.executable, PROGRAMS / "build.py", folder, env=env)


@pytest.mark.slow
def test_a_port_in_use(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = build(folder, **rank_environment(port, 1))
    assert result.returncode == 1
    assert f"RuntimeError: the 1 processes can't connect to 127.0.0.1:{port}" in result.stderr
    assert "another --master_port, or --standalone" in result.stderr


@pytest.mark.slow
def test_rank_missing_from_the_environment(folder: Path) -> None:
    env = rank_environment(1, 2)
    del env["RANK"]
    result = build(folder, **env)
    assert "RuntimeError: the 2 processes can't connect" in result.stderr
    assert "RANK expected, but not set" in result.stderr


def test_a_process_group_of_another_size(folder: Path, one_process_group: None) -> None:
    with pytest.raises(ValueError, match="model_parallel_size is 2, but 1 process") as error:
        Llama.build(str(folder), model_parallel_size=2, device="cpu")
    assert "torchrun --nproc_per_node 2 " in str(error.value)


def test_a_destroyed_process_group(folder: Path, one_process_group: None) -> None:
    """The next model runs in one process again, and an older one still generates."""
    older = Llama.build(str(folder), device="cpu", dtype="float32")
    expected = older.generate([[1, 2]], 5, temperature=0)
    dist.destroy_process_group()
    newer = Llama.build(str(folder), device="cpu", dtype="float32")
    assert newer.generate([[1, 2]], 5, temperature=0) == expected
    assert older.generate([[1, 2]], 5, temperature=0) == expected


@pytest.mark.slow
def test_an_impossible_number_of_ranks(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=4)
    path = PROGRAMS / "build.py"
    result = torchrun(3, path, folder)
    assert result.returncode == 1
    assert "(4 shards) can't be split over 3 ranks (possible: 1, 2, 4, 8, 16)" in result.stderr
    assert f"torchrun --nproc_per_node 4 {path}" in result.stderr


@pytest.mark.parametrize("timeout", [0, -1, 0.4, float("nan")])
def test_a_rank_timeout_that_would_end_healthy_ranks(folder: Path, timeout: float) -> None:
    with pytest.raises(ValueError, match=r"rank_timeout is .*, expected at least 2 seconds"):
        Llama.build(str(folder), device="cpu", rank_timeout=timeout)


# --- Folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        ([], "but nothing: expected a folder"),
        (["config.json", "tf_model.h5"], "another format: download the safe"),
        (["config.json"], r"download the weights too \(model"),
        (["model.safetensors"], r"download Hugging Face's config\.json too"),
        (["llama.Q4.gguf"], "GGUF is not supported"),
        (["original/params.json", "config.json"], "Meta's files are in '.*original'"),
        (["8B/params.json", "70B/params.json"], "give one of the folders in it, '70B', '8B'"),
        ([f"{i:02d}.txt" for i in range(12)], r"00\.txt', .*, '09\.txt', and 2 more: "),
        (["epoch_0/config.json", "x/y.txt"], "give one of the folders in it, 'epoch_0'"),
        (["refs/main", "blobs/x", "snapshots/5f0b0/config.json"], "cache: .*here/snapshots/5f0b0'"),
        (["models--a--b/snapshots/5f/config.json"], "cache: .*here/models--a--b/snapshots/5f'"),
        ([".metadata", "__0_0.distcp"], "FSDP.* run: accelerate merge-weights '.*here' OUTPUT,"),
        (
            ["config.json", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp"],
            "FSDP.*merge-weights '.*here/pytorch_model_fsdp_0' OUTPUT,",
        ),
        (
            ["config.json", "meta_model_0.pt", "meta_model_1.pt", "params.json"],
            r"torchtune .*rename 'meta_model_0\.pt' or 'meta_model_1\.pt' to consolidated\.00\.pth",
        ),
        (["ft-model-00001-of-00001.bin", "params.json"], r"rename 'ft-model-.*' to consolidated\."),
        (["config.json", "hf_model_0001_0.pt"], r"torchtune .* to pytorch_model-NUMBER\.bin"),
    ],
)
def test_a_folder_without_a_checkpoint(tmp_path: Path, names: list[str], advice: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    with pytest.raises(FileNotFoundError, match=rf"'{folder}' holds no consolidated.*{advice}"):
        Llama.build(str(folder))


@pytest.mark.slow
def test_shards_of_two_models(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "one", PARAMS, weights, n_shards=2)
    other = write_checkpoint(tmp_path / "two", PARAMS, random_weights(PARAMS, seed=1), n_shards=2)
    shutil.copy(other / "consolidated.01.pth", folder)
    words = r"consolidated\.00\.pth and consolidated\.01\.pth .* are shards of two models \(norm"
    with pytest.raises(ValueError, match=words):
        Llama.build(str(folder), device="cpu")
    result = run(sys.executable, "-m", "llama", "verify", folder)
    assert result.returncode == 1
    assert "are shards of two models" in result.stdout
    # here each rank opens only one shard
    assert "are shards of two models" in torchrun(2, PROGRAMS / "build.py", folder).stderr


def test_every_wrong_tensor_is_named(copy: Path, weights: dict[str, Tensor]) -> None:
    """At most ten are listed, then a count."""
    wrong = {key: torch.ones(3) for key in weights if key.startswith("layers.0.")}
    torch.save(weights | wrong, copy / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"wq\.weight .* \(3,\), expected \(128, 128\)") as error:
        Llama.build(str(copy), device="cpu")
    for key in wrong:
        assert key in str(error.value)
    params = PARAMS | {"n_layers": 4}
    (copy / "params.json").write_text(json.dumps(params))
    torch.save(weights, copy / "consolidated.00.pth")
    with pytest.raises(ValueError, match="lacks 'layers") as error:
        Llama.build(str(copy), device="cpu")
    assert str(error.value).count("layers.") == 10
    assert "and 8 more" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verify_finds_non_finite_values(
    copy: Path, weights: dict[str, Tensor], value: float
) -> None:
    wrong = weights["layers.1.feed_forward.w2.weight"].clone()
    wrong[5, 7:9] = value
    contents = weights | {"layers.1.feed_forward.w2.weight": wrong}
    torch.save(contents, copy / "consolidated.00.pth")
    result = run(sys.executable, "-m", "llama", "verify", copy)
    assert result.returncode == 1
    assert "layers.1.feed_forward.w2.weight in " in result.stdout
    assert "has 2 values that aren't finite" in result.stdout


# --- Generation ---------------------------------------------------------------------------------


def test_non_finite_logits(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names token and prompt, also after the first batch; finished rows are ignored."""
    weights = random_weights(PARAMS)
    llm = Llama(new_model(PARAMS, weights, max_seq_len=64, max_batch_size=2), tokenizer)
    monkeypatch.setattr(tokenizer, "stop_tokens", set())
    embedding = llm.model.tok_embeddings.weight
    (token,) = llm.generate([[5]], 1, temperature=0)[0][0]
    (second,) = llm.generate([[5, token]], 1, temperature=0)[0][0]
    embedding[second] = float("nan")
    words = "the logits of token 2 of prompt 3 aren't finite .computed in torch.float32.*verify"
    for temperature in (0.0, 1e-9):
        with pytest.raises(FloatingPointError, match=words):
            llm.generate([[9], [9], [9], [5]], 4, temperature=temperature)
    assert llm.generate([[5]], 2, temperature=0)[0] == [[token, second]]
    with pytest.raises(FloatingPointError, match="the logits of prompt 0 aren't finite"):
        llm.generate([[5, second]], 0, echo=True, logprobs=True)


def test_truncation_must_be_requested(llm: Llama) -> None:
    bos, length = llm.tokenizer.bos_id, llm.model.params.max_seq_len
    prompt = [bos, *range(100)]
    with pytest.raises(
        ValueError,
        match=rf"prompt 1 has 101 tokens, but max_seq_len is {length}.*"
        "truncate=True",
    ):
        llm.generate([[1], prompt], 4)
    (row,) = llm.generate([prompt], 4, temperature=0, echo=True, truncate=True)[0]
    kept = [bos, *prompt[-(length - 5) :]]
    assert row[: len(kept)] == kept
    assert len(row) <= length
    assert llm.generate([kept], 4, temperature=0)[0] == [row[len(kept) :]]
    # at most half of max_seq_len is kept free, and shorter prompts aren't truncated
    (row,) = llm.generate([prompt[1:]], 1000, temperature=0, echo=True, truncate=True)[0]
    assert row[: length // 2] == prompt[-(length // 2) :]
    (row,) = llm.generate([prompt[:length]], 0, echo=True, truncate=True)[0]
    assert row == prompt[:length]
    text = "Once upon a time " * 50
    assert llm.text_completion([text], max_gen_len=4, truncate=True)[0].keys() == {"generation"}


# --- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["example_text_completion.py"],
        pytest.param(["example_chat_completion.py"], marks=pytest.mark.slow),
        pytest.param(["-m", "llama", "complete", "demo/model", "Once"], marks=pytest.mark.slow),
        pytest.param(
            [*TORCHRUN[1:], "2", "example_text_completion.py", "--max_gen_len", "400"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_interrupt_is_one_line(command: list[str]) -> None:
    """Ctrl-C while decoding."""
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment({"PYTHONPATH": f"{PROGRAMS / 'slow_decode'}:{ROOT}"}),
    ) as process:
        assert process.stdout is not None
        while "computing" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (output + errors).count("interrupted") == 1
    if "torch.distributed.run" not in command:
        assert process.returncode == 130
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((9, 0), ["sm_80", "sm_90", "compute_90"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((10, 0), ["sm_90", "compute_90"], True),
        ((7, 0), ["sm_75", "sm_80", "compute_90"], False),
        ((8, 0), ["sm_86"], False),
        ((9, 4), ["gfx942"], True),
    ],
)
def test_a_build_without_kernels_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    architectures: list[str],
    fits: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    fault = device._architecture_fault(torch.device("cuda"))
    assert (fault is None) is fits
    if fault:
        major, minor = capability
        assert f"has no kernels for its compute capability {major}.{minor} (but sm_" in fault
