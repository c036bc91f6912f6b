"""Fixtures and helpers: tiny checkpoints made from a seed, a clean process for every test.

Reading order of the tests:

1. reference.py (the float64 oracle: one forward pass, straight down), test_model, test_parity
   (against the oracle, the published code and Hugging Face), test_sampling
2. test_generation, test_engine, test_options, test_patches: the public calls and the engine
3. test_tokenizer, test_llama2, test_families: text, chat formats, every family
4. test_checkpoint, test_huggingface, test_hub, test_reshard, test_convert, test_lora,
   test_quantized_folders, test_memory, test_device_copy: files and memory
5. test_distributed, test_faults, test_state, test_hostile: ranks, failures, threads, attacks
6. test_fast, test_kernels, test_step, test_steps, test_gpu, test_gpu_loading, test_mps,
   test_benchmarks*: accelerated forms, their kernels and synchronizations, and their measurement
7. test_chat_session, test_interactive, test_batch, test_tools, test_structured, test_serving*,
   test_safety, test_command_line, test_messages, test_examples, test_demo, test_download,
   test_package, test_windows: programs, pages and platforms

Tests marked ``slow`` are left out by default; ``pytest -m ""`` runs everything.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fairscale.nn.model_parallel.initialize as groups
import llama_models.llama3
import pytest
import torch
import torch.distributed as dist
from launcher import launch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from llama import Llama, ModelArgs, Tokenizer, Transformer, accel
from llama.accel import features, kernels

# Small models are 3 to 14 times faster on one thread; programs that tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo" / "model"
PROGRAMS = ROOT / "tests" / "programs"  # started by tests
SHARED = ROOT.parent / "shared" / "models"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")

# The forms of linear layers by kind of CPU: with the kernels of an instruction set, with AMX, or
# with neither. AMX's form runs on any CPU.
PROCESSORS: dict[str, set[str]] = {
    **kernels.INSTRUCTION_SETS,
    "AMX": {"amx_bf16"},
    "other": set(),
}

# Llama 3's architecture, small; heads and widths divide by 8 ranks.
PARAMS: dict[str, Any] = {
    "dim": 128,
    "n_layers": 2,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 1024,
    "multiple_of": 64,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
# The axis on which a native tensor is split over ranks; norms are replicated.
SHARD_AXIS = {
    "tok_embeddings": 0,
    "output": 0,
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
}


@pytest.fixture(scope="session", autouse=True)
def own_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch.compile's cache in /tmp doesn't record the processor it was made for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


# where there is no compiler, every build would warn
accel._warned.add(str(kernels.why_not()))


@pytest.fixture
def use_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes accel choose for one of ``PROCESSORS``; skips if this one can't run its kernels."""
    found, reason = features.cpu_features(), kernels.why_not()
    monkeypatch.setattr(accel, "warn_missing_kernels", lambda _: None)

    def use(name: str) -> None:
        if name in kernels.INSTRUCTION_SETS and (reason or not found >= PROCESSORS[name]):
            pytest.skip(f"{name}: {reason or 'not on this processor'}")
        monkeypatch.setattr(features, "cpu_features", lambda: PROCESSORS[name])
        kernels._choose.cache_clear()

    yield use
    kernels._choose.cache_clear()


@pytest.fixture(autouse=True)
def clean_process() -> Iterator[None]:
    """No process group before a test, torch's defaults as they were after it."""
    torch.manual_seed(0)
    stdout = sys.stdout
    yield
    default_dtype, default_device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    groups.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    assert sys.stdout is stdout, "the test left stdout replaced"
    assert default_dtype == torch.float32, "the test left another default dtype"
    assert default_device == torch.device("cpu"), "the test left another default device"


@pytest.fixture
def one_process_group() -> None:
    """The published code needs a process group even for one process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    groups.initialize_model_parallel(1)


def random_weights(params: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights by native names that give logits of about the size of a trained model's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = Transformer(ModelArgs(**params)).state_dict()
    weights = {}
    for key, meta in shapes.items():
        noise = torch.randn(meta.shape, generator=generator)
        if meta.dim() == 1:
            weights[key] = 1 + 0.1 * noise
        elif key.startswith("tok_embeddings"):
            weights[key] = noise
        else:
            weights[key] = noise * (3 if key.startswith("output") else 1.5) / meta.shape[1] ** 0.5
    return weights


def new_model(
    params: Mapping[str, Any], weights: Mapping[str, Tensor], **sizes: Any
) -> Transformer:
    """A Transformer in this process with these weights, in their dtype."""
    with torch.device("meta"):
        model = Transformer(ModelArgs(**params, **sizes))
    model.load_state_dict(weights, assign=True)
    return model


def shard(key: str, tensor: Tensor, n_shards: int) -> list[Tensor]:
    axis = SHARD_AXIS.get(key.split(".")[-2])
    if axis is None:
        return [tensor] * n_shards
    return [part.clone() for part in tensor.chunk(n_shards, dim=axis)]


def write_checkpoint(
    folder: Path,
    params: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    n_shards: int = 1,
) -> Path:
    """A native folder with the demo's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(n_shards):
        part = {key: shard(key, tensor, n_shards)[rank] for key, tensor in weights.items()}
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(DEMO / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def weights() -> dict[str, Tensor]:
    return random_weights(PARAMS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    """A tiny random checkpoint of one shard, float32."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), PARAMS, weights)


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.1 GB of bfloat16, with Llama 3's vocabulary: the two largest tensors are half of it."""
    params = PARAMS | {"dim": 1024, "n_layers": 24, "vocab_size": 128256}
    with torch.device("meta"):
        shapes = Transformer(ModelArgs(**params)).state_dict()
    weights = {key: torch.full(meta.shape, 0.01).bfloat16() for key, meta in shapes.items()}
    path = write_checkpoint(tmp_path_factory.mktemp("big"), params, weights)
    shutil.copy(Path(llama_models.llama3.__file__).parent / "tokenizer.model", path)
    return path


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.6 GB of bfloat16 in one shard, with the demo's vocabulary."""
    params = PARAMS | {"dim": 2048, "n_layers": 6, "vocab_size": 1024}
    with torch.device("meta"):
        shapes = Transformer(ModelArgs(**params)).state_dict()
    weights = {key: torch.full(meta.shape, 0.01).bfloat16() for key, meta in shapes.items()}
    return write_checkpoint(tmp_path_factory.mktemp("wide"), params, weights)


@pytest.fixture(scope="session")
def llm(folder: Path) -> Llama:
    return Llama.build(str(folder), max_seq_len=64, max_batch_size=4, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def demo() -> Llama:
    return Llama.build(str(DEMO), max_seq_len=256, max_batch_size=8, dtype="bfloat16", device="cpu")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(str(DEMO / "tokenizer.model"))


@pytest.fixture(scope="session")
def stories() -> Path:
    path = SHARED / "stories260K"
    if not path.is_dir():
        pytest.skip(f"needs the real model in {path}")
    return path


def environment(changes: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment of a program of the checkout, on the CPU."""
    return os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | dict(changes)


def run(
    *command: str | Path, timeout: float = 240, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Args:
        env: changes to its environment.
    """
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(kwargs.pop("env", {})),
        check=False,
        **kwargs,
    )


def torchrun(
    n_ranks: int, *command: str | Path, timeout: float = 240, env: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """``TORCHRUN`` without its start-up time, see launcher.py."""
    arguments = [*TORCHRUN[3:], str(n_ranks), *map(str, command)]
    return launch(arguments, environment(env), timeout)
