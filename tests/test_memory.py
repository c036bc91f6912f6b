"""The memory plan: formulas against measurements, and the error if a model doesn't fit."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, PROGRAMS, new_model, random_weights, run, write_checkpoint

from llama import Llama, ModelArgs, memory

SHAPE_8B: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
}
SHAPE_405B = SHAPE_8B | {
    "dim": 16384,
    "n_layers": 126,
    "n_heads": 128,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.2,
    "use_scaled_rope": True,
}
SHAPE_70B = SHAPE_8B | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def gib(n_bytes: int) -> float:
    return n_bytes / 2**30


def test_published_sizes() -> None:
    """8B: 8.03 billion parameters; 128 KiB of KV cache per position, 4 GiB for 4 x 8192."""
    args = ModelArgs(**SHAPE_8B, max_batch_size=4, max_seq_len=8192)
    plan = memory.plan(args, 1, torch.bfloat16)
    assert plan.weights == 2 * 8_030_261_248
    assert plan.cache == 4 * 8192 * 128 * 1024
    assert "weights 14.96 GiB + key/value cache 4.00 GiB" in str(plan)
    assert gib(memory.plan(args, 8, torch.bfloat16).cache) == 0.5
    # beyond 8 ranks the 8 KV heads are replicated: the cache per rank stops shrinking
    assert memory.plan(args, 16, torch.bfloat16).cache == memory.plan(args, 8, torch.bfloat16).cache


def test_the_largest_model_is_planned_without_instantiating_it() -> None:
    args = ModelArgs(**SHAPE_405B, max_batch_size=1, max_seq_len=131072)
    plan = memory.plan(args, 16, torch.bfloat16)
    # 405.85 billion parameters; norms and replicated KV heads are on every rank
    assert 405.85e9 / 8 <= plan.weights < 405.85e9 / 8 * 1.015
    with pytest.raises(
        MemoryError, match=r"it would fit with max_seq_len \d+ at max_batch_size 1;?"
    ) as e:
        memory.check(plan, 56 * 10**9)
    assert "the device has 52.15 GiB free" in str(e.value)


def test_the_plan_matches_the_models_weights_and_cache() -> None:
    params = PARAMS | {"n_kv_heads": 4}
    model = new_model(params, random_weights(params), max_batch_size=3, max_seq_len=40)
    model.forward(torch.tensor([[1, 2]]), 0)
    plan = memory.plan(model.params, 1, torch.float32)
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    assert plan.cache == sum(layer.k.nbytes + layer.v.nbytes for layer in model.cache)


def test_suggested_sizes_are_the_largest_that_fit() -> None:
    args = ModelArgs(**SHAPE_8B, max_batch_size=8, max_seq_len=8192)
    free = 22 * 2**30
    with pytest.raises(MemoryError) as error:
        memory.check(memory.plan(args, 1, torch.bfloat16), free)
    fits_pattern = (
        r"max_seq_len (\d+) at max_batch_size 8 or max_seq_len 8192 at max_batch_size (\d+)"
    )
    found = re.search(fits_pattern, str(error.value))
    assert found is not None
    for field, value in (("max_seq_len", int(found[1])), ("max_batch_size", int(found[2]))):
        for size, fits in ((value, True), (value + 1, False)):
            sizes: dict[str, Any] = {"max_batch_size": 8, "max_seq_len": 8192} | {field: size}
            plan = memory.plan(ModelArgs(**SHAPE_8B, **sizes), 1, torch.bfloat16)
            assert (plan.total <= free) == fits
            if fits:
                memory.check(plan, free)


def test_both_sizes_must_shrink() -> None:
    """If shrinking either one isn't enough, the longest sequence at batch size 1 is suggested."""
    args = ModelArgs(**SHAPE_8B, max_batch_size=32, max_seq_len=8192)
    plan = memory.plan(args, 1, torch.bfloat16)
    with pytest.raises(
        MemoryError, match=r"it would fit with max_seq_len \d+ at max_batch_size 1$"
    ):
        memory.check(plan, plan.weights + 60 * 2**20)


def test_more_ranks_are_suggested_if_the_weights_dont_fit() -> None:
    args = ModelArgs(**SHAPE_8B, max_batch_size=1, max_seq_len=64)
    plan = memory.plan(args, 1, torch.float32)
    with pytest.raises(MemoryError, match=r"use more ranks \(possible: 1, 2, 4, 8, 16, 32"):
        memory.check(plan, 2**30)


# GiB free on a card that only this process uses: the total that torch reports, less 0.45 for the
# context of CUDA.
CARDS = {
    "T4": 14.1,
    "A10": 21.6,
    "4090": 23.1,
    "A100 40": 39.0,
    "A100 80": 78.7,
    "H100": 78.6,
    "H200": 139.2,
}
MORE_RANKS = (
    r"use more ranks \(possible: 1, 2, 4, 8, 16, 32(, 64)?\), a smaller dtype, or quantize$"
)
# The model, max_batch_size x max_seq_len, and the first of CARDS that can hold it; the larger ones
# can too. The weights take 14.96 GiB (8B) and 16.43 (70B over 8 ranks), a position 128 and 40 KiB.
# Then what the cards before it are told: weights alone exceed a T4.
PLANNED: list[tuple[str, int, int, str | None, dict[str, str]]] = [
    ("8B", 1, 512, "A10", {"T4": MORE_RANKS}),
    ("8B", 4, 512, "A10", {"T4": MORE_RANKS}),
    ("8B", 4, 8192, "A10", {"T4": MORE_RANKS}),
    (
        "8B",
        8,
        8192,
        "A100 40",
        {
            "A10": r"max_seq_len 59\d\d at .* 8 or max_seq_len 8192 at max_batch_size 5$",
            "4090": r"max_seq_len 74\d\d at .* 8 or max_seq_len 8192 at max_batch_size 7$",
        },
    ),
    ("8B", 1, 131072, "A100 40", {"4090": r"max_seq_len 58\d\d\d at max_batch_size 1$"}),
    ("8B", 32, 8192, "A100 80", {"A100 40": "max_seq_len 8192 at max_batch_size 23$"}),
    ("8B", 128, 8192, None, {"H200": "max_seq_len 8192 at max_batch_size 122$"}),
    ("70B", 4, 512, "A10", {"T4": MORE_RANKS}),
    ("70B", 4, 8192, "A10", {"T4": MORE_RANKS}),
    ("70B", 32, 8192, "A100 40", {"4090": "max_seq_len 8192 at max_batch_size 14$"}),
    ("70B", 1, 131072, "A100 40", {"4090": r"max_seq_len 109\d\d\d at max_batch_size 1$"}),
    ("70B", 128, 8192, "A100 80", {"A100 40": "max_seq_len 8192 at max_batch_size 64$"}),
]


@pytest.mark.parametrize(("model", "batch", "length", "smallest", "told"), PLANNED)
def test_cards_are_refused_or_admitted(
    model: str, batch: int, length: int, smallest: str | None, told: dict[str, str]
) -> None:
    shape, n_ranks = {"8B": (SHAPE_8B, 1), "70B": (SHAPE_70B, 8)}[model]
    sizes: dict[str, Any] = {"max_batch_size": batch, "max_seq_len": length}
    plan = memory.plan(ModelArgs(**shape, **sizes), n_ranks, torch.bfloat16, CUDA)
    names = list(CARDS)
    n_refused = len(names) if smallest is None else names.index(smallest)
    for name in names[n_refused:]:
        memory.check(plan, int(CARDS[name] * 2**30))
    for name in names[:n_refused]:
        with pytest.raises(MemoryError, match=told.get(name, "it would fit with|use more ranks")):
            memory.check(plan, int(CARDS[name] * 2**30))


def test_one_pass_over_four_long_prompts_is_refused_on_22_gib() -> None:
    """8B at 4 x 8192 in one prefill pass; in passes of the default 2048 tokens it fits."""
    args = ModelArgs(**SHAPE_8B, max_batch_size=4, max_seq_len=8192)
    free = 22 * 2**30
    whole = memory.plan(args, 1, torch.bfloat16, CUDA, max_prefill_tokens=4 * 8192)
    with pytest.raises(
        MemoryError, match=r"CUDA's own 0\.4.*max_seq_len 8192 at max_batch_size 3$"
    ):
        memory.check(whole, free)
    memory.check(memory.plan(args, 1, torch.bfloat16, CUDA), free)


def test_cuda_counts_graphs_and_nccl() -> None:
    def runtime(batch: int, length: int, n_ranks: int, dtype: torch.dtype) -> int:
        args = ModelArgs(**SHAPE_8B, max_batch_size=batch, max_seq_len=length)
        return memory.plan(args, n_ranks, dtype, CUDA).runtime

    args = ModelArgs(**SHAPE_8B)
    assert [memory.plan(args, 8, torch.float32, d).runtime for d in (None, CPU)] == [0, 0]
    # graphs for 1, 2, 4 and 5 rows: 22 MiB each, and the logits of 12 rows together
    alone = runtime(5, 512, 1, torch.bfloat16)
    assert alone == (300 + 64 + 4 * 22) * 2**20 + 12 * 128256 * (2 + 2 + 4)
    assert runtime(5, 8192, 1, torch.bfloat16) == alone  # lengths are read on the device
    assert runtime(5, 512, 2, torch.bfloat16) - alone == 1088 * 2**20
    # float32 steps have graphs for the lengths 256, 512 and 600
    graphs = 3 * (4 * 22 * 2**20 + 12 * 128256 * (4 + 4 + 4))
    assert runtime(5, 600, 1, torch.float32) == 364 * 2**20 + graphs


@pytest.mark.parametrize(("capability", "n_lengths"), [((7, 5), 6), ((8, 0), 1)])
def test_older_cards_capture_a_graph_per_length(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], n_lengths: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(
        torch.backends.cuda, "is_flash_attention_available", lambda: True, raising=False
    )
    args = ModelArgs(**SHAPE_8B, max_batch_size=1, max_seq_len=8192)
    graph = 22 * 2**20 + 128256 * 8
    assert memory.plan(args, 1, torch.float16, CUDA).runtime == 364 * 2**20 + n_lengths * graph


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_ranks_of_a_machine_share_its_memory() -> None:
    alone, four = memory.free_bytes(CPU, 1), memory.free_bytes(CPU, 4)
    assert alone is not None
    assert four is not None
    assert alone / 4 == pytest.approx(four, rel=0.1)
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < alone <= total


V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2 = "memory.max", "memory.current", "inactive_file"
# The line in /proc/self/cgroup, the root and type of the cgroup mount, limits by folder (MiB), and
# the expected free memory (MiB). Each group uses 100 MiB, 30 of them reclaimable file pages.
GROUPS: dict[str, tuple[str, str, str, dict[str, int], int]] = {
    "container, v2": ("0::/", "/", "cgroup2", {"": 500}, 430),
    "slice, v2": (
        "0::/user.slice/a",
        "/",
        "cgroup2",
        {"user.slice/a": 900, "user.slice": 600},
        530,
    ),
    "job, v2": ("0::/slurm/job_1/step", "/", "cgroup2", {"slurm/job_1": 300}, 230),
    "group, v1": ("4:cpu,memory:/slurm/job_1", "/", "cgroup", {"slurm/job_1": 700}, 630),
    "container, v1": ("4:memory:/docker/ab", "/docker/ab", "cgroup", {"": 400}, 330),
    "container in a group, v1": ("4:memory:/docker/ab/c", "/docker/ab", "cgroup", {"c": 350}, 280),
    "outside of the mount": ("0::/../a", "/b", "cgroup2", {"": 200}, 130),
    "no limit": ("0::/a", "/", "cgroup2", {}, 1000),
    "another group's limit": ("0::/a", "/", "cgroup2", {"b": 200}, 1000),
}


@pytest.mark.parametrize("where", GROUPS)
def test_cgroup_limits_are_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    line, root, kind, limits, expected = GROUPS[where]
    proc, mount = tmp_path / "proc/self", tmp_path / "sys/fs/cgroup/memory"
    proc.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {1000 * 1024} kB\n")
    (proc / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
    (proc / "mountinfo").write_text(
        "23 1 0:2 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"35 31 0:32 {root} /sys/fs/cgroup/memory rw - {kind} {kind} rw,memory\n"
    )
    limit_name, used_name, stat_name = V2 if kind == "cgroup2" else V1
    for folder, limit in limits.items():
        (mount / folder).mkdir(parents=True, exist_ok=True)
        (mount / folder / limit_name).write_text(f"{limit * 2**20}\n")
        (mount / folder / used_name).write_text(f"{100 * 2**20}\n")
        (mount / folder / "memory.stat").write_text(f"anon 7\n{stat_name} {30 * 2**20}\n")
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory.free_bytes(CPU, 1) == expected * 2**20


def test_nothing_is_read_if_it_does_not_fit(tmp_path: Path) -> None:
    """The shards aren't even checkpoints: the memory check comes before they are read."""
    folder = write_checkpoint(tmp_path / "big", PARAMS | {"dim": 2**15, "n_layers": 400}, {})
    (folder / "consolidated.00.pth").write_bytes(b"not read")
    with pytest.raises(MemoryError, match=r"this needs weights \d+\.\d\d GiB"):
        Llama.build(str(folder), device="cpu", dtype="float32")
    result = run(sys.executable, "-m", "llama", "chat", folder, "hello", "--device", "cpu")
    assert result.returncode == 1
    assert result.stderr.startswith("error: this needs weights")
    assert "Traceback" not in result.stderr


def test_an_out_of_memory_error_shows_the_plan(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(llm.model, "hidden", no_memory)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"(?s)CUDA out of memory.*The plan was weights"
    ):
        llm.generate([[1, 2]], 4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("prompts", ["plain", "scored"])
@pytest.mark.parametrize("freed", ["kept", "given back"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_generation_stays_within_the_planned_memory(dtype: str, freed: str, prompts: str) -> None:
    """The prompts together are twice as long as max_prefill_tokens."""
    # "given back": no allocator fragmentation, only the tensors; "kept": with it, as after build
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"} if freed == "given back" else {}
    arguments = ["1024", freed, str(DEMO / "tokenizer.model"), prompts]
    result = run(sys.executable, PROGRAMS / "workspace.py", dtype, *arguments, env=environment)
    assert result.returncode == 0, result.stderr
    ratio = float(result.stdout)
    print(f"{dtype}: cache and workspace measured / planned {ratio:.2f}")
    assert 0.3 < ratio <= 1
