"""The benchmark runs and its cost formulas are right; speed itself isn't tested."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, PROGRAMS, ROOT, run
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost, report
from benchmarks.shapes import SHAPES, checkpoint_of, largest_shape, random_weights
from llama import Llama, ModelArgs, Transformer
from llama.cache import Prefill


@pytest.mark.parametrize("params", [PARAMS, SHAPES["1B"].params], ids=["small", "1B"])
def test_bytes_and_operations_match_the_model(params: dict[str, Any]) -> None:
    args = ModelArgs(**params)
    with torch.device("meta"):
        model = Transformer(args)
    norms = (2 * args.n_layers + 1) * args.dim
    embedding = model.tok_embeddings.weight.numel()
    read = sum(p.numel() for p in model.parameters()) - norms - embedding
    assert cost.weight_bytes(args, 1, 2) == 2 * read
    assert cost.weight_bytes(args, 8, 2) == 2 * read / 8
    kv = 2 * args.n_layers * args.kv_heads * args.head_dim * 2
    assert cost.cache_bytes(args, 1, 2) == kv
    assert cost.step_bytes(args, 1, 2, 3, 100) == 2 * read + 300 * kv
    scores = 2 * args.n_layers * args.n_heads * args.head_dim * 100
    assert cost.step_flops(args, 1, 3, 100) == 6 * (read + scores)
    # prefill: matmuls as torch counts them, and attention
    length, device = 50, torch.device("meta")
    with FlopCounterMode(display=False) as counter:
        batch = Prefill([0], [0], [length], device, logits_for=[0])
        tokens = torch.zeros(length, dtype=torch.int64, device=device)
        model(tokens, batch)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    scores = 2 * args.dim * ((args.n_layers - 1) * length**2 + 2 * length)
    assert cost.prefill_flops(args, 1, length) == products + scores
    assert cost.sent_bytes(args, 1, 2, 9) == 0


def test_the_documented_table_of_expected_speeds_is_computed() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "\n".join(cost.table()) in text


def test_a_random_checkpoint_loads_and_is_reused(tmp_path: Path) -> None:
    folder = checkpoint_of("tiny", tmp_path)
    llm = Llama.build(str(folder), device="cpu")
    assert len(llm.generate([[1, 2, 3]], 4, temperature=0)[0][0]) <= 4
    before = (folder / "consolidated.00.pth").stat().st_mtime_ns
    assert checkpoint_of("tiny", tmp_path) == folder
    assert (folder / "consolidated.00.pth").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="expected one of tiny, 1B"):
        checkpoint_of("2B", tmp_path)


def test_a_rank_of_eight_has_an_eighth_of_the_matrices() -> None:
    shape = SHAPES["70B-rank-of-8"]
    small = shape.params | {"dim": 1024, "n_layers": 1}
    weights = random_weights(type(shape)(small, 8))
    assert weights["output.weight"].shape == (128256 // 8, 1024)
    assert weights["layers.0.attention.wo.weight"].shape == (1024, 128)
    assert weights["norm.weight"].shape == (1024,)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """A few figures of the smallest shape, and a peer; every line is JSON."""
    command: list[str | Path] = [sys.executable, "benchmarks/run.py", "--shape", "tiny"]
    command += ["--device", "cpu", "--repeats", "1", "--models", tmp_path, "--results", tmp_path]
    command += ["--vs", "reference", "--figures", "load,ragged,overhead"]
    expected = {"load", "load: peak RSS", "ragged", "overhead, 16 layers"}
    expected |= {f"{case}: times faster than reference" for case in ("ragged", "prefill 512")}
    result = run(*command, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (lines,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records[0]["figure"] == "configuration"
    assert any("flash" in name for name in records[0]["paths"]["prefill"])
    assert expected <= {record["figure"] for record in records}
    assert all(record["low"] <= record["median"] <= record["high"] for record in records[1:])


@pytest.mark.slow
def test_the_server_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="needs the extra [serve]")
    path = tmp_path / "results.jsonl"
    sizes = ["--clients", "6", "--max_batch_size", "4", "--repeats", "1"]
    result = run(sys.executable, "benchmarks/serve.py", *sizes, "--results", path, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert path.read_text() == result.stdout
    configuration, figure = map(json.loads, result.stdout.splitlines())
    assert configuration["figure"] == "configuration"
    [pair] = figure["pairs"]
    assert pair["equal_answers"] == 6
    assert figure["median"] == pair["one_by_one_s"] / pair["at_once_s"]


def test_misspelt_choices_are_named() -> None:
    result = run(sys.executable, "benchmarks/run.py", "--vs", "lama", cwd=ROOT)
    assert result.returncode != 0
    assert "--vs has lama" in result.stderr


def report_of(device: str, shape: str, figures: list[report.Record]) -> str:
    configuration = {"figure": "configuration", "shape": shape, "dtype": "bfloat16"}
    return report.markdown([configuration | {"device": device, "bandwidth_gb_s": 2987.6}, *figures])


def figure(name: str, median: float, of_limit: float, **where: int) -> report.Record:
    values = {"unit": "tokens/s", "median": median, "low": median, "high": median}
    return {"figure": name, **where, **values, "limit": 200.0, "of_limit": of_limit}


def test_the_report_compares_with_the_aims() -> None:
    figures = [
        figure("decode", 171.5, 0.79, batch=1, context=128),
        figure("decode", 14000, 0.6, batch=128, context=128),
        figure("prefill, 2 ranks", 60000, 0.9, length=8192),
        {"figure": "decode", "note": "failed: RuntimeError: ours: out | of memory\nmore"},
        figure("weights", 40, 0.81),
    ]
    text = report_of("NVIDIA H100 80GB HBM3", "8B", figures)
    assert text.startswith("# 8B in bfloat16 on NVIDIA H100 80GB HBM3\n")
    for row in (
        "| decoding one row, of the read bandwidth | 80 % | 79 % | no |",
        "| decoding one row | 170 tokens/s | 171.5 tokens/s | yes |",
        "| decoding 128 rows | 15000 tokens/s | 1.4e+04 tokens/s | no |",
        "| prompt of 8192 tokens | 35000 tokens/s | not measured |  |",
        "| loading weights, of the pinned copy rate | 70 % | 81 % | yes |",
        "| decode | failed: RuntimeError: ours: out / of memory | | | |",
        "- bandwidth_gb_s: 2988",
    ):
        assert row in text.splitlines()
    elsewhere = report_of("NVIDIA GeForce RTX 4090", "3B", figures)
    assert "| decoding one row, of the read bandwidth | 80 % | 79 % | no |" in elsewhere
    assert "| 170 tokens/s | 171.5 tokens/s | for 8B on an H100 |" in elsewhere
    assert "| aim |" not in report_of("cpu", "1B", figures)


@pytest.mark.parametrize(
    ("gib", "name"), [(80, "8B"), (40, "8B"), (30, "3B"), (24, "3B"), (15, "1B"), (8, "1B")]
)
def test_the_largest_shape_that_fits_with_a_peer(gib: int, name: str) -> None:
    """An H100, an A100, a 4090, a T4. Planned for the CPU, which needs a little more."""
    chosen, why = largest_shape(torch.device("meta"), torch.bfloat16, gib * 2**30)
    assert (chosen, f"{name} for {gib} GiB") == (name, why.split(" of memory")[0])
    assert ("8B needs" in why) == (name != "8B")


CUDA_SH = ROOT / "benchmarks" / "cuda.sh"


def cuda_sh(where: Path, *arguments: str, **env: str) -> tuple[Any, list[str], Path]:
    """cuda.sh with tests/programs/standin/python: its result, the calls of python, its folder."""
    path = f"{PROGRAMS / 'standin'}:{os.environ['PATH']}"
    calls = where / "calls"
    env |= {"PATH": path, "CALLS": str(calls), "RESULTS": str(where / "results")}
    result = run("bash", CUDA_SH, *arguments, env=env)
    (folder,) = (where / "results").iterdir()
    return result, sorted(calls.read_text().splitlines()), folder


def test_one_command_runs_tests_and_benchmark(tmp_path: Path) -> None:
    result, calls, folder = cuda_sh(tmp_path, "--repeats", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    measured, prepared, tested = calls
    assert tested == "pytest -q -m gpu"
    common = "benchmarks/run.py --device cuda --vs hf,reference"
    assert prepared == f"{common} --prepare --shape auto --repeats 1"
    assert measured.startswith(f"{common} --figures decode,prefill,weights,load,sampling,ranks")
    assert measured.endswith(
        f"--tests {folder}/tests.txt --results {folder} --shape auto --repeats 1"
    )
    assert (folder / "tests.txt").read_text() == "7 passed, 1 skipped in 2.00s\n"
    first, last = (folder / "log.txt").read_text().splitlines()
    assert first == "measured one figure"
    assert last.endswith(f" s; see {folder}")
    assert first in result.stdout
    assert last in result.stdout


def test_failed_tests_dont_stop_the_benchmark(tmp_path: Path) -> None:
    result, calls, folder = cuda_sh(tmp_path, "8B", PYTEST_STATUS="1")
    assert result.returncode == 1
    log = (folder / "log.txt").read_text()
    assert "the gpu tests failed" in log
    assert "measured one figure" in log
    assert calls[0].endswith("--shape 8B")


@pytest.mark.slow
def test_the_time_is_limited(tmp_path: Path) -> None:
    start = time.monotonic()
    result, _, folder = cuda_sh(tmp_path, BUDGET="4", BENCHMARK_SECONDS="60")
    assert time.monotonic() - start < 30
    assert result.returncode == 1
    measured, failed, _ = (folder / "log.txt").read_text().splitlines()
    assert (measured, failed) == ("measured one figure", "cuda.sh: not everything was measured")


@pytest.mark.slow
def test_a_figure_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """The error is recorded, and the rest goes on: loading takes over half a second."""
    command: list[str | Path] = [sys.executable, "benchmarks/run.py", "--shape", "tiny"]
    command += ["--device", "cpu", "--models", tmp_path, "--results", tmp_path]
    result = run(*command, "--figures", "overhead", "--limit", "0.5", cwd=ROOT)
    assert result.returncode == 1
    assert "failed: paths, overhead" in result.stderr
    (lines,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records[0]["paths"] == {"failed": "TimeoutError: given up after 0.5 s"}
    assert records[-1]["note"] == "failed: TimeoutError: given up after 0.5 s"
    assert records[-1]["note"] in lines.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_command_for_gpus_runs_on_the_cpu(tmp_path: Path) -> None:
    """With a stand-in for pytest; two ranks under torchrun included."""
    arguments = ["tiny", "--device", "cpu", "--models", str(tmp_path / "m")]
    arguments += ["--repeats", "1", "--vs", "hf", "--figures", "weights,ranks"]
    result, calls, folder = cuda_sh(tmp_path, *arguments, REAL_PYTHON=sys.executable)
    assert result.returncode == 0, result.stdout + result.stderr
    assert calls == ["pytest -q -m gpu"]
    (lines,) = folder.glob("*.jsonl")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    expected = {"weights", "decode, 2 ranks", "prefill, 2 ranks"}
    expected |= {"load: hf"} | {
        f"{case}: times faster than hf" for case in ("ragged", "prefill 512")
    }
    assert expected <= {record["figure"] for record in records}
    assert records[0]["tests"] == "7 passed, 1 skipped in 2.00s"
    assert lines.with_suffix(".md").read_text() in (folder / "log.txt").read_text()
