"""Measure this library against the machine's limits and its peers: see benchmarks/README.md.

python benchmarks/run.py --shape 1B --vs reference,hf
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fire
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cost, llamacpp, report  # noqa: E402
from benchmarks.engines import ENGINES, Options, Process  # noqa: E402
from benchmarks.probes import Machine, processor_and_versions  # noqa: E402
from benchmarks.shapes import SHAPES, checkpoint_of, largest_shape  # noqa: E402
from llama import ModelArgs, memory, sampling  # noqa: E402
from llama.checkpoint.folder import find_checkpoint  # noqa: E402
from llama.checkpoint.reader import load  # noqa: E402
from llama.device import default_dtype, resolve_device  # noqa: E402
from llama.quantize import parse_quantize  # noqa: E402

FIGURES = ("load", "prefill", "decode", "ragged", "sampling", "overhead")
MORE_FIGURES = ("weights", "ranks")  # for GPUs
PREFILL_LENGTHS = (128, 512, 2048, 8192)
DECODE_BATCHES = (1, 8, 32)
DECODE_CONTEXTS = (128, 2048, 4096, 8192)
RAGGED_LENGTHS, RAGGED_NEW = (16, 64, 256, 512), 16
# llama.cpp's type of the same size, by ``quantize`` and else by dtype
GGUF_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "float32": "F32", "bfloat16": "BF16"}
NEW = 32  # steps of a decoding sample; its figure is their median


def main(
    shape: str = "1B",
    vs: str | tuple[str, ...] = (),
    figures: str | tuple[str, ...] = FIGURES,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: bool = False,
    repeats: int = 3,
    plot: bool = False,
    models: str = str(ROOT / "benchmarks" / "models"),
    results: str = str(ROOT / "benchmarks" / "results"),
    limit: float = 0,
    tests: str | None = None,
    prepare: bool = False,
) -> None:
    """Measure, and write a JSON line per figure and a table.

    Args:
        shape: tiny, 1B, 3B, 8B or 70B-rank-of-8, or auto: the largest of 8B, 3B and 1B that fits
            with a peer. Random weights are written once.
        vs: peers to interleave with this library: reference, hf, llamacpp.
        figures: load, prefill, decode, ragged, sampling, overhead; weights: loading without the
            rest of build; ranks: two ranks under torchrun.
        device: default cuda if available, else cpu.
        dtype: of the weights, by default that of ``Llama.build`` for the device.
        quantize: build with int8 or int4; llama.cpp then has Q8_0 or Q4_0, the other peers don't
            quantize.
        compile: build with compile=True.
        repeats: samples of each figure, and pairs of each comparison.
        plot: write the decoding rates as PNG files (needs matplotlib, the extra [bench]).
        models: folder of the random checkpoints.
        results: folder of the JSON lines, the table and the plots.
        limit: seconds after which a figure or a peer is given up; 0: none.
        tests: output of pytest; its last line is added to the configuration.
        prepare: only write the random weights, for the peers too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the engines
    parse_quantize(quantize)
    if (vs or quantize) and shape in SHAPES and SHAPES[shape].n_ranks > 1:
        raise SystemExit(f"--vs and --quantize need a whole model, not {shape}")
    peers = _listed("vs", vs, tuple(name for name in ENGINES if name != "ours"))
    chosen = _listed("figures", figures, FIGURES + MORE_FIGURES)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "llamacpp" in peers and device != "cpu":
        raise SystemExit(f"--vs llamacpp is for --device cpu, not {device}")
    torch_device = resolve_device(device)
    dtype = dtype or str(default_dtype(torch_device)).removeprefix("torch.")
    choice = None
    if shape == "auto":
        shape, choice = largest_shape(
            torch_device, getattr(torch, dtype), _total_memory(torch_device)
        )
        print(f"shape: {choice}", flush=True)
    if prepare:
        folder = checkpoint_of(shape, Path(models), device)
        for peer in peers:
            _files_for(peer, folder, GGUF_TYPES.get(quantize or dtype))
        return
    bench = Benchmark(
        shape,
        device,
        dtype,
        quantize,
        compile,
        repeats,
        Path(models),
        Path(results),
        limit=limit,
        tests=tests,
        choice=choice,
    )
    for name in chosen:
        bench.attempt(name, getattr(bench, name))
    for peer in peers:
        bench.attempt(f"compare with {peer}", functools.partial(bench.compare, peer))
    print(f"\n{report.markdown(bench.records)}")
    if plot:
        bench.plot()
    if bench.failed:
        raise SystemExit(f"failed: {', '.join(bench.failed)}")


def _listed(name: str, given: str | tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """``--name a,b`` as a tuple (fire makes a tuple of it, or a string of a single one)."""
    names = tuple(given.split(",")) if isinstance(given, str) else tuple(given)
    if unknown := set(names) - set(known):
        raise SystemExit(f"--{name} has {', '.join(map(str, unknown))}, expected {known}")
    return names


class Benchmark:
    def __init__(
        self,
        shape: str,
        device: str,
        dtype: str,
        quantize: str | None,
        compile: bool,
        repeats: int,
        models: Path,
        results: Path,
        *,
        limit: float,
        tests: str | None,
        choice: str | None,
    ) -> None:
        self.shape, self.device, self.dtype, self.quantize = shape, device, dtype, quantize
        self.compile, self.repeats, self.models = compile, repeats, models
        self.limit, self.tests, self.choice = limit, tests, choice
        self.folder = checkpoint_of(shape, models, device)
        self.args = ModelArgs(**SHAPES[shape].params)
        self.n_ranks, self.size = SHAPES[shape].n_ranks, getattr(torch, dtype).itemsize
        self.machine = Machine(torch.device(device), getattr(torch, dtype))
        self.random = random.Random(1)
        self.records: list[report.Record] = []
        self.failed: list[str] = []
        results.mkdir(parents=True, exist_ok=True)
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
        self.path = results / f"{shape}-{device}-{quantize or dtype}-{now}"
        self._record("configuration", **self._configuration())

    def attempt(self, name: str, measure: Callable[[], None]) -> None:
        """Measure; an error or the limit of time ends only this figure. What it has recorded
        stays."""
        try:
            with _at_most(self.limit):
                measure()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            self._record(name, note=f"failed: {type(error).__name__}: {error}")

    # --- The figures ----------------------------------------------------------------------------

    def load(self) -> None:
        """Seconds until ``build`` returns, and growth of the peak resident memory."""
        embedding = self.size * self.args.vocab_size * self.args.dim / self.n_ranks
        weights = embedding + cost.weight_bytes(self.args, self.n_ranks, self.size, self.quantize)
        cases: dict[str, dict[str, Any]] = {"load": {}}
        if self.quantize:
            options = ("--format", "hf", "--quantize", self.quantize)
            folder = _converted(self.folder, self.quantize, *options)
            cases["load, quantized folder"] = {"folder": folder, "quantize": None}
        for name, changes in cases.items():
            seconds, rises = [], []
            for _ in range(self.repeats):
                with self._engine("ours", 512, 1, **changes) as engine:
                    seconds.append(engine.load_s)
                    rises.append(engine.rss_rise / weights)
            self._record(name, unit="s", **_summary(seconds))
            self._record(f"{name}: peak RSS", unit="x the weights", **_summary(rises))

    def prefill(self) -> None:
        """Tokens of one prompt per second, to the first new token."""
        with self._engine("ours", max(PREFILL_LENGTHS) + 64, 1) as engine:
            for length in PREFILL_LENGTHS:
                self._prefill(engine, length)

    def decode(self) -> None:
        """Tokens per second while decoding: over batches, then over contexts."""
        batches = DECODE_BATCHES + ((128,) if self.device == "cuda" else ())
        with self._engine("ours", 256, max(batches)) as engine:
            for batch in batches:
                self._decode(engine, batch, 128)
        with self._engine("ours", max(DECODE_CONTEXTS) + 64, 1) as engine:
            for context in DECODE_CONTEXTS[1:]:
                self._decode(engine, 1, context)

    def ragged(self) -> None:
        """Seconds for a batch of prompts of unequal length."""
        with self._engine("ours", 1024, 8) as engine:
            samples = [self._ragged_sample(engine) for _ in range(self.repeats + 1)][1:]
        self._record(
            "ragged", lengths=RAGGED_LENGTHS, n_new=RAGGED_NEW, unit="s", **_summary(samples)
        )

    def sampling(self) -> None:
        """Milliseconds to draw a token per row with temperature and top_p, and for a full sort."""
        generator = torch.Generator(self.device).manual_seed(1)
        for batch in (1, 8):
            logits = 3 * torch.randn(batch, 128256, device=self.device, generator=generator)
            probs = torch.softmax(logits / 0.6, dim=-1)
            for name, run in {
                "sampling, top_p 0.9": lambda logits=logits: sampling.sample(
                    logits, 0.6, 0.9, generator
                ),
                "sorting all tokens": lambda probs=probs: torch.sort(
                    probs, dim=-1, descending=True, stable=True
                ),
            }.items():
                times = [1000 * _seconds(run, self.device) for _ in range(20)][5:]
                self._record(name, batch=batch, unit="ms", **_summary(times))

    def overhead(self) -> None:
        """Milliseconds per token of a model so small that only overhead takes time."""
        folder = checkpoint_of("tiny", self.models)
        with self._engine("ours", 512, 1, folder=folder) as engine:
            times = []
            for _ in range(self.repeats + 1):
                steps = engine.generate([self._prompt(128, 256)], NEW + 1)["step_s"]
                times.append(1000 * statistics.median(steps))
        self._record("overhead, 16 layers", unit="ms per token", **_summary(times[1:]))

    def weights(self) -> None:
        """Bytes of weights per second from the file, which is cached, to the device."""
        ckpt, device = find_checkpoint(str(self.folder)), torch.device(self.device)
        rates, limits = [], []
        for _ in range(self.repeats + 1):
            before, start = self.machine.host_to_device(), time.perf_counter()
            tensors = load(
                ckpt, self.args, 1, 0, dtype=self.machine.dtype, device=device, progress=False
            )
            _synchronize(self.device)
            seconds = time.perf_counter() - start
            rates.append(sum(tensor.nbytes for tensor in tensors.values()) / seconds / 1e9)
            del tensors
            if self.device == "cuda":
                torch.cuda.empty_cache()  # for the other processes
            limits.append((before + self.machine.host_to_device()) / 2e9)
        against = {}
        if self.device != "cpu":  # where weights stay mapped
            shares = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
            against["limit"] = statistics.median(limits[1:])
            against["of_limit"] = statistics.median(shares[1:])
        self._record("weights", unit="GB/s", **_summary(rates[1:]), **against)

    def ranks(self) -> None:
        """One row and a long prompt on two ranks under torchrun."""
        if self.device == "cuda" and torch.cuda.device_count() < 2:
            self._record("ranks", note="skipped: one GPU")
            return
        with self._engine("ours", 2048 + 64, 1, n_processes=2) as engine:
            self._decode(engine, 1, 128)
            self._prefill(engine, 2048)

    # --- With peers -----------------------------------------------------------------------------

    def compare(self, peer: str) -> None:
        """Ours and a peer, interleaved: the ratio of every pair."""
        folder = _files_for(peer, self.folder, GGUF_TYPES.get(self.quantize or self.dtype))
        with (
            self._engine("ours", 1024, 8) as ours,
            self._engine(peer, 1024, 8, folder=folder) as theirs,
        ):
            self._record(f"load: {peer}", unit="s", **_summary([theirs.load_s]))
            cases: dict[str, Callable[[Process], float]] = {
                "decode, batch 1": lambda e: self._decode_sample(e, 1, 128),
                "decode, batch 8": lambda e: self._decode_sample(e, 8, 128),
                "prefill 512": lambda e: self._prefill_sample(e, 512),
                "ragged": self._ragged_sample,
            }
            for name, sample in cases.items():
                slow = name == "ragged" and peer == "reference"
                for engine in (ours, theirs)[: 1 if slow else 2]:
                    sample(engine)  # warm-up
                pairs = []
                for _ in range(1 if slow else self.repeats):
                    before = self.machine.bandwidth()
                    pair = [sample(ours), sample(theirs)]
                    pairs.append([*pair, pair[1] / pair[0], before, self.machine.bandwidth()])
                self._record(
                    f"{name}: times faster than {peer}",
                    unit="x",
                    pairs=[
                        {
                            "ours_s": a,
                            "theirs_s": b,
                            "ratio": ratio,
                            "probes_gb_s": [before / 1e9, after / 1e9],
                        }
                        for a, b, ratio, before, after in pairs
                    ],
                    **_summary([pair[2] for pair in pairs]),
                )

    # --- Samples, in seconds --------------------------------------------------------------------

    def _decode_sample(self, engine: Process, batch: int, context: int) -> float:
        prompts = [self._prompt(context) for _ in range(batch)]
        return statistics.median(engine.generate(prompts, NEW + 1)["step_s"])

    def _prefill_sample(self, engine: Process, length: int) -> float:
        return float(engine.generate([self._prompt(length)], 1)["first_s"])

    def _ragged_sample(self, engine: Process) -> float:
        answer = engine.generate([self._prompt(n) for n in RAGGED_LENGTHS], RAGGED_NEW)
        return float(answer["first_s"] + sum(answer["step_s"]))

    def _prompt(self, length: int, vocab_size: int | None = None) -> list[int]:
        vocab_size = vocab_size or self.args.vocab_size
        return [self.random.randrange(vocab_size) for _ in range(length)]

    # --- Against the limits ---------------------------------------------------------------------

    def _decode(self, engine: Process, batch: int, context: int) -> None:
        self._decode_sample(engine, batch, context)  # warm-up
        rates, limits = [], []
        for _ in range(self.repeats):
            before = self.machine.bandwidth()
            seconds = self._decode_sample(engine, batch, context)
            bandwidth = (before + self.machine.bandwidth()) / 2
            rates.append(batch / seconds)
            read = cost.step_bytes(
                self.args, engine.n_ranks, self.size, batch, context + NEW // 2, self.quantize
            )
            limits.append(batch * bandwidth / read)
        fractions = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
        self._record(
            f"decode{_ranks(engine)}",
            batch=batch,
            context=context,
            unit="tokens/s",
            **_summary(rates),
            limit=statistics.median(limits),
            of_limit=statistics.median(fractions),
        )

    def _prefill(self, engine: Process, length: int) -> None:
        self._prefill_sample(engine, length)  # warm-up
        rates, limits = [], []
        for _ in range(self.repeats):
            before = self.machine.matrix_rate()
            seconds = self._prefill_sample(engine, length)
            flops = (before + self.machine.matrix_rate()) / 2
            rates.append(length / seconds)
            limits.append(length * flops / cost.prefill_flops(self.args, engine.n_ranks, length))
        fractions = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
        self._record(
            f"prefill{_ranks(engine)}",
            length=length,
            unit="tokens/s",
            **_summary(rates),
            first_token_s=length / statistics.median(rates),
            limit=statistics.median(limits),
            of_limit=statistics.median(fractions),
        )

    # --- Processes, records, tables -------------------------------------------------------------

    @contextlib.contextmanager
    def _engine(
        self,
        name: str,
        max_seq_len: int,
        max_batch: int,
        folder: Path | None = None,
        n_processes: int = 1,
        **changes: Any,
    ) -> Iterator[Process]:
        options = Options(
            n_ranks=self.n_ranks,
            device=self.device,
            dtype=self.dtype,
            max_seq_len=max_seq_len,
            max_batch=max_batch,
            compile=self.compile,
            quantize=self.quantize,
        )
        options = dataclasses.replace(options, **changes)
        engine = Process(name, folder or self.folder, options, n_processes)
        try:
            yield engine
        except BaseException:
            engine.kill()
            raise
        engine.close()

    def _configuration(self) -> dict[str, Any]:
        paths: dict[str, Any]
        try:
            with _at_most(self.limit), self._engine("ours", 512, 2) as engine:
                paths = engine.paths()
        except Exception as error:
            traceback.print_exc()
            self.failed.append("paths")
            paths = {"failed": f"{type(error).__name__}: {error}"}
        return {
            "shape": self.shape,
            "choice of the shape": self.choice,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else self.device,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "compile": self.compile,
            "repeats": self.repeats,
            **processor_and_versions(),
            "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
            **{name: _version(name) for name in ("transformers", "llama-models")},
            "llama.cpp": llamacpp.description(),
            **(_gpu() if self.device == "cuda" else {}),
            "tests": "".join(Path(self.tests).read_text().splitlines()[-1:])
            if self.tests
            else None,
            "bandwidth_gb_s": self.machine.bandwidth() / 1e9,
            "matrix_gflop_s": self.machine.matrix_rate() / 1e9,
            "host_to_device_gb_s": self.machine.host_to_device() / 1e9,
            "paths": paths,
        }

    def _record(self, figure: str, **values: Any) -> None:
        record = {"figure": figure, **values}
        self.records.append(record)
        line = json.dumps(record)
        print(line, flush=True)
        with self.path.with_suffix(".jsonl").open("a") as file:
            file.write(line + "\n")
        # after every record: a run may be killed
        self.path.with_suffix(".md").write_text(report.markdown(self.records))

    def plot(self) -> None:
        """Decoding rate and its limit over the batch and over the context."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        decoded = [record for record in self.records if record["figure"] == "decode"]
        for axis, fixed, value in (("batch", "context", 128), ("context", "batch", 1)):
            points = [record for record in decoded if record[fixed] == value]
            if len(points) < 2:
                continue
            x = [point[axis] for point in points]
            figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
            axes.plot(x, [p["limit"] for p in points], "k--", label="limit: bytes / read bandwidth")
            spread = [[abs(p["median"] - p[k]) for p in points] for k in ("low", "high")]
            axes.errorbar(x, [p["median"] for p in points], spread, marker="o", label="measured")
            axes.set(
                xscale="log",
                xlabel=f"{axis} ({fixed} {value})",
                ylabel="tokens/s",
                title=f"Decoding, {self.shape}, {self.device}, {self.dtype}",
                ylim=(0, None),
            )
            axes.set_xticks(x, [str(n) for n in x])
            axes.legend()
            figure.savefig(f"{self.path}-{axis}.png", dpi=150)
            print(f"{self.path}-{axis}.png")


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _ranks(engine: Process) -> str:
    return f", {engine.n_processes} ranks" if engine.n_processes > 1 else ""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds; 0: never."""
    if not seconds:
        yield
        return

    def give_up(*_: object) -> None:
        raise TimeoutError(f"given up after {seconds:g} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _files_for(peer: str, native: Path, gguf_type: str | None) -> Path:
    """The checkpoint in a peer's format; written if it doesn't exist yet."""
    if peer == "reference":
        return native
    if peer == "llamacpp":
        if gguf_type is None:
            raise ValueError(f"llama.cpp has no type for this dtype: {', '.join(GGUF_TYPES)}")
        from benchmarks.gguf_files import write_gguf

        file = native.with_name(f"{native.name}-{gguf_type}.gguf")
        if not file.exists():
            write_gguf(native, file, gguf_type)
        return file
    return _converted(native, "hf", "--format", "hf")


def _converted(native: Path, suffix: str, *options: str) -> Path:
    """The checkpoint in another folder, written if it doesn't exist yet."""
    folder = native.with_name(f"{native.name}-{suffix}")
    if not folder.exists():
        command = [sys.executable, "-m", "llama", "convert", str(native), str(folder), *options]
        subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603 - our own program
    return folder


def _total_memory(device: torch.device) -> int:
    """Not the free memory: the choice of a shape must not depend on the moment."""
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return total
    return memory.free_bytes(device, 1) or 0


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _gpu() -> dict[str, Any]:
    """What a CUDA device's speed depends on, besides its name."""
    properties = torch.cuda.get_device_properties()
    driver = None
    if nvidia_smi := shutil.which("nvidia-smi"):
        fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
        command = [nvidia_smi, "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)  # noqa: S603
        driver = result.stdout.strip() or None
    return {
        "gpus": torch.cuda.device_count(),
        "memory_gib": properties.total_memory / memory.GIB,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver, power, clocks, temperature": driver,
    }


if __name__ == "__main__":
    fire.Fire(main)
