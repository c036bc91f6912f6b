"""The measured engines: this library and its peers, each in a separate process.

``python -m benchmarks.engines NAME ...`` loads a model and then answers requests, one JSON line
each, on stdin and stdout: {"prompts": [[id, ...], ...], "n_new": N} gives {"first_s": seconds to
the first new token of every prompt, "step_s": seconds of each further step}. Decoding is greedy and
no token stops it. The peers run in a minimal correct loop, without the overhead of
their own ``generate``.
"""

import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


class Engine:
    """A model with one method.

    Args:
        folder: a native checkpoint; for Hugging Face's a folder in its layout.
        n_ranks: the folder holds the first of this many shards. The other ranks are simulated, and
            communication takes no time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        n_ranks: int,
        device: str,
        dtype: str,
        max_seq_len: int,
        max_batch: int,
        compile: bool,
    ) -> None:
        raise NotImplementedError

    def steps(self, prompts: list[list[int]], n_new: int) -> Iterator[None]:
        """Yield when the next token of every prompt is known on the host, ``n_new`` times."""
        raise NotImplementedError


class Ours(Engine):
    def __init__(
        self,
        folder: Path,
        *,
        n_ranks: int,
        device: str,
        dtype: str,
        max_seq_len: int,
        max_batch: int,
        compile: bool,
    ) -> None:
        from llama import Llama, ModelArgs, Tokenizer, Transformer
        from llama.accel import accelerate

        if n_ranks == 1:
            self.llm = Llama.build(
                str(folder),
                max_seq_len=max_seq_len,
                max_batch_size=max_batch,
                device=device,
                dtype=dtype,
                compile=compile,
                prefix_caching=False,
            )
        else:
            _imagine_ranks(n_ranks)
            params = json.loads((folder / "params.json").read_text())
            args = ModelArgs(**params, max_seq_len=max_seq_len, max_batch_size=max_batch)
            with torch.device("meta"):
                model = Transformer(args)
            weights = torch.load(folder / "consolidated.00.pth", mmap=True, weights_only=True)
            model.load_state_dict(weights, assign=True)
            model.to(device=device, dtype=getattr(torch, dtype))
            tokenizer = Tokenizer(str(folder / "tokenizer.model"))
            accelerate(model, compile=compile)
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

    def __init__(
        self,
        folder: Path,
        *,
        n_ranks: int,
        device: str,
        dtype: str,
        max_seq_len: int,
        max_batch: int,
        compile: bool,
    ) -> None:
        assert n_ranks == 1
        import fairscale.nn.model_parallel.initialize as groups
        import torch.distributed as dist
        from llama_models.llama3.args import ModelArgs
        from llama_models.llama3.model import Transformer
        from torch._C._distributed_c10d import HashStore

        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        groups.initialize_model_parallel(1)
        self.device = torch.device(device)
        args = ModelArgs(
            **json.loads((folder / "params.json").read_text()),
            max_seq_len=max_seq_len,
            max_batch_size=max_batch,
        )
        # like its own build: in the default dtype and on the default device
        torch.set_default_dtype(getattr(torch, dtype))
        torch.set_default_device(self.device)
        weights = torch.load(folder / "consolidated.00.pth", map_location="cpu", weights_only=True)
        self.model = Transformer(args)
        self.model.load_state_dict(weights, strict=False)

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

    def __init__(
        self,
        folder: Path,
        *,
        n_ranks: int,
        device: str,
        dtype: str,
        max_seq_len: int,
        max_batch: int,
        compile: bool,
    ) -> None:
        assert n_ranks == 1
        from transformers import AutoModelForCausalLM

        self.device = torch.device(device)
        self.max_seq_len = max_seq_len
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).to(self.device)
        self.forward: Any = self.model.forward
        if self.device.type == "cuda":
            self.forward = torch.compile(self.forward, mode="reduce-overhead", fullgraph=True)

    @torch.inference_mode()
    def steps(self, prompts: list[list[int]], n_new: int) -> Iterator[None]:
        from transformers import DynamicCache, StaticCache

        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        padded = [[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)]
        tokens = torch.tensor(padded, device=self.device)
        on_cuda = self.device.type == "cuda"
        cache: Any = (
            StaticCache(self.model.config, max_cache_len=self.max_seq_len)
            if on_cuda
            else DynamicCache(config=self.model.config)
        )
        mask = None
        if any(pads):
            kept = [[0] * pad + [1] * (longest + n_new - pad) for pad in pads]
            mask = torch.tensor(kept, device=self.device)
        places = torch.tensor([[-pad] for pad in pads], device=self.device)
        forward = self.model.forward  # prefill isn't compiled
        for i in range(n_new):
            end = longest + i
            span = torch.arange(end - tokens.shape[1], end, device=self.device)
            logits = forward(
                input_ids=tokens,
                attention_mask=None if mask is None else mask[:, :end],
                position_ids=(span + places).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            tokens = torch.argmax(logits[:, -1:], dim=-1)
            tokens.tolist()
            forward = self.forward
            yield


ENGINES: dict[str, type[Engine]] = {"ours": Ours, "reference": Reference, "hf": HuggingFace}


def serve(name: str, **options: Any) -> None:
    """Load an engine, report load time and memory growth, then answer requests."""
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))  # loads libraries that torch loads lazily
    before, start = _resident_bytes(), time.perf_counter()
    engine = ENGINES[name](**options)
    _answer(load_s=time.perf_counter() - start, rss_rise=_resident_bytes() - before)
    for line in sys.stdin:
        request = json.loads(line)
        if "paths" in request:
            assert isinstance(engine, Ours)
            _answer(**engine.paths())
            continue
        times = [time.perf_counter()]
        for _ in engine.steps(request["prompts"], request["n_new"]):
            times.append(time.perf_counter())
        steps = [b - a for a, b in itertools.pairwise(times)]
        _answer(first_s=steps[0], step_s=steps[1:], rss_rise=_resident_bytes() - before)


def _answer(**values: Any) -> None:
    print(json.dumps(values), file=sys.__stdout__, flush=True)


def _resident_bytes() -> int:
    """Peak of the resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss is inherited from the parent
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Process:
    """An engine in a separate process."""

    def __init__(self, name: str, folder: Path, **options: Any) -> None:
        self.name = name
        self.process = subprocess.Popen(  # noqa: S603 - this file
            [sys.executable, "-m", "benchmarks.engines", name, json.dumps(options), str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        loaded = self._read()
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

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise RuntimeError(f"the process of {self.name!r} ended: its message is above")


if __name__ == "__main__":
    serve(sys.argv[1], folder=Path(sys.argv[3]), **json.loads(sys.argv[2]))
