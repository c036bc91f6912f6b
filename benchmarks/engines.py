"""The measured engines: this library and its peers, each in a separate process.

``python -m benchmarks.engines NAME ...`` loads a model and then answers requests, one JSON line
each, on stdin and stdout: {"prompts": [[id, ...], ...], "n_new": N} gives {"first_s": seconds to
the first new token of every prompt, "step_s": seconds of each further step}. Decoding is greedy and
no token stops it. The peers run in a minimal correct loop, without the overhead of
their own ``generate``. Under torchrun, every rank works, and the first one reads and answers.
"""

import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """How an engine loads its model.

    Attributes:
        n_ranks: the folder holds the first of this many shards. The other ranks are simulated, and
            communication takes no time.
        quantize: for this library; a peer's folder or file has its format.
    """

    device: str
    dtype: str
    max_seq_len: int
    max_batch: int
    n_ranks: int = 1
    compile: bool = False
    quantize: str | None = None


class Engine:
    """A model with one method.

    Args:
        folder: a native checkpoint; for Hugging Face's a folder in its layout, for llama.cpp a GGUF
            file.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        raise NotImplementedError

    def steps(self, prompts: list[list[int]], n_new: int) -> Iterator[None]:
        """Yield when the next token of every prompt is known on the host, ``n_new`` times."""
        raise NotImplementedError


class Ours(Engine):
    def __init__(self, folder: Path, options: Options) -> None:
        from llama import Llama, ModelArgs, Tokenizer, Transformer
        from llama.accel import accelerate

        if options.n_ranks == 1:
            self.llm = Llama.build(
                str(folder),
                max_seq_len=options.max_seq_len,
                max_batch_size=options.max_batch,
                device=options.device,
                dtype=options.dtype,
                compile=options.compile,
                prefix_caching=False,
                quantize=options.quantize,
            )
        else:
            _imagine_ranks(options.n_ranks)
            params = json.loads((folder / "params.json").read_text())
            args = ModelArgs(
                **params, max_seq_len=options.max_seq_len, max_batch_size=options.max_batch
            )
            with torch.device("meta"):
                model = Transformer(args)
            weights = torch.load(folder / "consolidated.00.pth", mmap=True, weights_only=True)
            model.load_state_dict(weights, assign=True)
            model.to(device=options.device, dtype=getattr(torch, options.dtype))
            tokenizer = Tokenizer(str(folder / "tokenizer.model"))
            accelerate(model, compile=options.compile)
            self.llm = Llama(model, tokenizer, prefix_caching=False)
        self.llm.tokenizer.stop_tokens = set()

    def steps(self, prompts: list[list[int]], n_new: int) -> Iterator[None]:
        for _ in self.llm.stream(prompts, n_new, temperature=0, logprobs=False):
            yield

    def paths(self) -> dict[str, Any]:
        """The chosen code paths: the linear layers' functions, the kind of decoding step, and the
        attention kernels that run in prefill and in decoding."""
        from llama import model
        from llama.distributed import layers

        kinds = (layers.ColumnParallelLinear, layers.RowParallelLinear)
        modules = list(self.llm.model.modules())
        functions = [m.linear for m in modules if isinstance(m, kinds)]
        ffn = {m.compute.__name__ for m in modules if isinstance(m, model.FeedForward)}
        decode = self.llm.model.decode
        prompts = [[5] * 300, [6] * 200]
        return {
            "feed_forward": sorted(ffn),
            "linear": sorted({getattr(f, "__name__", type(f).__name__) for f in functions}),
            "step": getattr(decode, "__qualname__", type(decode).__name__),
            "prefill": _attention_kernels(lambda: list(self.steps(prompts, 1))),
            "prefill and decoding": _attention_kernels(lambda: list(self.steps(prompts, 3))),
        }


def _attention_kernels(run: Callable[[], object]) -> list[str]:
    """Names of the operators and CUDA kernels with "attention", "flash" or "fmha" in them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    names = {event.key[:120] for event in profile.key_averages()}
    return sorted(n for n in names if any(w in n for w in ("attention", "flash", "fmha")))


def _imagine_ranks(n_ranks: int) -> None:
    import fairscale.nn.model_parallel.initialize as groups
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
    groups.initialize_model_parallel(n_ranks)


class Reference(Engine):
    """The published code: llama-models' Transformer. Its ``generate`` prefills up to the shortest
    prompt's length, then continues token by token, using a prompt's own tokens while it has any."""

    def __init__(self, folder: Path, options: Options) -> None:
        assert options.n_ranks == 1
        import fairscale.nn.model_parallel.initialize as groups
        import torch.distributed as dist
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer
        from torch._C._distributed_c10d import HashStore

        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        groups.initialize_model_parallel(1)
        self.device = torch.device(options.device)
        args = ModelArgs(
            **json.loads((folder / "params.json").read_text()),
            max_seq_len=options.max_seq_len,
            max_batch_size=options.max_batch,
        )
        # like its own build: in the default dtype and on the default device
        torch.set_default_dtype(getattr(torch, options.dtype))
        torch.set_default_device(self.device)
        file = folder / "consolidated.00.pth"
        weights = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        self.model = Transformer(args)
        self.model.load_state_dict(weights, strict=False)
        self.model.to(self.device)  # fairscale's layers ignore the default device

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], n_new: int) -> Iterator[None]:
        shortest, longest = min(map(len, prompts)), max(map(len, prompts))
        total = longest + n_new
        tokens = torch.zeros((len(prompts), total), dtype=torch.long, device=self.device)
        given = torch.zeros_like(tokens, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt, device=self.device)
            given[row, : len(prompt)] = True
        start = 0
        for position in range(shortest, total):
            logits = self.model.forward(tokens[:, start:position], start)
            chosen = torch.argmax(logits[:, -1], dim=-1)
            chosen = torch.where(given[:, position], tokens[:, position], chosen)
            tokens[:, position] = chosen
            chosen.tolist()
            start = position
            if position >= longest:
                yield


class HuggingFace(Engine):
    """transformers with SDPA; prompts of a ragged batch are left-padded."""

    def __init__(self, folder: Path, options: Options) -> None:
        assert options.n_ranks == 1
        from transformers import AutoModelForCausalLM

        self.device = torch.device(options.device)
        self.max_seq_len = options.max_seq_len
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
        ).to(self.device)
        self.static = self.device.type == "cuda"
        self.caches: dict[int, Any] = {}  # by batch
        self.forward: Any = self.model.forward
        if self.static:
            self.forward = torch.compile(self.forward, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], n_new: int) -> Iterator[None]:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        padded = [[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
        tokens = torch.tensor(padded, device=self.device)
        cache = self._cache(len(prompts))
        mask = None
        if any(pads):
            # a static cache has one length, and so has its mask: one graph serves every step
            length = self.max_seq_len if self.static else longest + n_new
            kept = [[0] * pad + [1] * (length - pad) for pad in pads]
            mask = torch.tensor(kept, device=self.device)
        places = torch.tensor([[-pad] for pad in pads], device=self.device)
        forward = self.model.forward  # prefill isn't compiled
        for i in range(n_new):
            end = longest + i
            span = torch.arange(end - tokens.shape[1], end, device=self.device)
            logits = forward(
                input_ids=tokens,
                attention_mask=mask if mask is None or self.static else mask[:, :end],
                position_ids=(span + places).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            tokens = torch.argmax(logits[:, -1:], dim=-1)
            tokens.tolist()
            forward = self.forward
            yield

    def _cache(self, batch: int) -> Any:
        """An empty cache. Static ones are used again: the compiled step holds their addresses."""
        from transformers import DynamicCache, StaticCache

        if not self.static:
            return DynamicCache(config=self.model.config)
        if batch not in self.caches:
            self.caches[batch] = StaticCache(self.model.config, max_cache_len=self.max_seq_len)
        self.caches[batch].reset()
        return self.caches[batch]


class LlamaCpp(Engine):
    """llama.cpp: one llama_decode call per step, with a sequence per prompt, as its server's
    slots."""

    def __init__(self, folder: Path, options: Options) -> None:
        assert (options.n_ranks, options.device) == (1, "cpu")
        from benchmarks.llamacpp import Model

        self.model = Model(folder, options.max_batch, options.max_seq_len, torch.get_num_threads())

    def steps(self, prompts: list[list[int]], n_new: int) -> Iterator[None]:
        self.model.clear()
        rows = range(len(prompts))
        where = [(row, i) for row in rows for i in range(len(prompts[row]))]
        logits = self.model.forward(
            [prompts[row][i] for row, i in where],
            [i for _, i in where],
            [row for row, _ in where],
            [i == len(prompts[row]) - 1 for row, i in where],
        )
        for step in range(n_new):
            chosen = torch.from_numpy(logits).argmax(-1).tolist()
            yield
            if step < n_new - 1:
                positions = [len(prompt) + step for prompt in prompts]
                logits = self.model.forward(chosen, positions, list(rows), [True] * len(prompts))


ENGINES: dict[str, type[Engine]] = {
    "ours": Ours,
    "reference": Reference,
    "hf": HuggingFace,
    "llamacpp": LlamaCpp,
}


def serve(name: str, folder: Path, options: Options) -> None:
    """Load an engine, report load time and memory growth, then answer requests."""
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # libraries that torch loads lazily, and the device's context
    one = torch.ones(1, 1, device=options.device)
    torch.mm(one, one)
    before, start = _resident_bytes(), time.perf_counter()
    engine = ENGINES[name](folder, options)
    _answer(load_s=time.perf_counter() - start, rss_rise=_resident_bytes() - before)
    for request in _requests():
        if "paths" in request:
            assert isinstance(engine, Ours)
            _answer(**engine.paths())
            continue
        times = [time.perf_counter()]
        for _ in engine.steps(request["prompts"], request["n_new"]):
            times.append(time.perf_counter())
        steps = [b - a for a, b in itertools.pairwise(times)]
        _answer(first_s=steps[0], step_s=steps[1:], rss_rise=_resident_bytes() - before)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _requests() -> Iterator[dict[str, Any]]:
    """The requests on stdin; under torchrun the first rank's, on every rank."""
    while True:
        lines = [sys.stdin.readline() if _is_first_rank() else ""]
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            torch.distributed.broadcast_object_list(lines, src=0)
        if not lines[0]:
            return
        yield json.loads(lines[0])


def _answer(**values: Any) -> None:
    if _is_first_rank():
        print(json.dumps(values), file=sys.__stdout__, flush=True)


def _resident_bytes() -> int:
    """Peak of the resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss is inherited from the parent
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Process:
    """An engine in a separate process, or in ``n_processes`` under torchrun.

    Attributes:
        n_ranks: parts of the model, of which each process (or the only one) has one.
    """

    def __init__(self, name: str, folder: Path, options: Options, n_processes: int = 1) -> None:
        self.name = name
        self.n_processes, self.n_ranks = n_processes, max(options.n_ranks, n_processes)
        module = ["-m", "benchmarks.engines"]
        if n_processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            module = [*launcher, str(n_processes), *module]
        self.process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, *module, name, json.dumps(dataclasses.asdict(options)), str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            loaded = self._read()
        except BaseException:
            self.kill()
            raise
        self.load_s: float = loaded["load_s"]
        self.rss_rise: int = loaded["rss_rise"]

    def generate(self, prompts: list[list[int]], n_new: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"prompts": prompts, "n_new": n_new}), file=self.process.stdin, flush=True)
        return self._read()

    def paths(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print('{"paths": true}', file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def kill(self) -> None:
        """End a process that may be busy or hang. torchrun ends its ranks when it is terminated."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer = dict(json.loads(line))
                if "error" in answer:
                    raise RuntimeError(f"{self.name}: {answer['error']}")
                return answer
        raise RuntimeError(f"the process of {self.name!r} ended: its message is above")


if __name__ == "__main__":
    try:
        serve(sys.argv[1], Path(sys.argv[3]), Options(**json.loads(sys.argv[2])))
    except Exception as error:
        _answer(error=f"{type(error).__name__}: {error}")
        raise
