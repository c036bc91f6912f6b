"""python -m llama: inspect, verify, convert, evaluate, run or serve a checkpoint folder."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch

from llama import accel, cli, memory
from llama.checkpoint import convert, hub
from llama.checkpoint import verify as verification
from llama.checkpoint.folder import Checkpoint, find_checkpoint
from llama.checkpoint.quantized import check_quantize
from llama.checkpoint.reader import Weights
from llama.checkpoint.sharding import n_bytes, shard_specs
from llama.commands.batch import batch
from llama.commands.evaluate import evaluate
from llama.commands.interactive import chat, show, show_steps
from llama.commands.options import ModelOptions, SamplingOptions, runs_model
from llama.config import LLAMA2_ROPE_THETA, LLAMA3_ROPE_THETA, LLAMA32_FACTOR, ModelArgs
from llama.device import parse_dtype, resolve_device
from llama.files import expanded
from llama.quantize import parse_quantize
from llama.serving.command import serve
from llama.tokenizer import Tokenizer


def _opened(
    folder: str,
    tokenizer_path: str | None,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
) -> tuple[Checkpoint, Any, ModelArgs]:
    """A folder, its tokenizer and its parameters."""
    ckpt = find_checkpoint(hub.local_folder(folder))
    if max_seq_len is None:
        max_seq_len = min(512, ckpt.context or 512)
    path = tokenizer_path or str(ckpt.tokenizer_path)
    tokenizer = Tokenizer(path, llama31=ckpt.is_llama31)
    return ckpt, tokenizer, ckpt.args(tokenizer.n_words, max_seq_len, max_batch_size)


def _family(args: ModelArgs) -> str:
    if args.use_scaled_rope and args.rope_original_context != 1:
        is_llama32 = args.rope_scaling_factor == LLAMA32_FACTOR
        return "Llama 3.2" if is_llama32 else "Llama 3.1 or 3.3"
    if args.rope_theta == 1e6 and args.vocab_size in (32000, 32016):
        return "Code Llama"
    families = {LLAMA2_ROPE_THETA: "Llama 2", LLAMA3_ROPE_THETA: "Llama 3"}
    return families.get(args.rope_theta, "unknown")


def _count(number: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def info(
    ckpt_dir: str,
    *,
    tokenizer_path: str | None = None,
    mp: int | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> None:
    """Show the model in a folder and the memory it needs, without reading the weights.

    Args:
        ckpt_dir: checkpoint folder, or hub id (owner/name).
        tokenizer_path: tokenizer file; default: the one in the folder.
        mp: number of ranks to plan for; default: the number of shards in the folder.
        max_seq_len: maximum length of prompt plus generation, in tokens; default 512.
        max_batch_size: maximum number of sequences in a batch.
        dtype: bfloat16, float16 or float32.
        quantize: int8 or int4, to plan for quantized weights.
    """
    bits = parse_quantize(quantize)
    ckpt, tokenizer, args = _opened(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    n_ranks = ckpt.n_shards if mp is None else mp
    args.check_tp_size(n_ranks)
    check_quantize(ckpt, bits)
    weights = Weights(ckpt, args)
    faults = [fault for i in range(ckpt.n_shards) for fault in weights.faults(i)]
    numbers = sum(n_bytes(spec, 1, torch.uint8) for spec in shard_specs(args).values())
    if ckpt.tied:
        numbers -= args.vocab_size * args.dim
    stored, valid = "?", args.valid_tp_sizes
    if not faults:
        valid = weights.valid_tp_sizes
        dtypes = {t.dtype for i in range(ckpt.n_shards) for t in weights.shard(i).values()}
        stored = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        if weights.quantized:
            stored = f"{ckpt.quantization}; {stored}"
    device, torch_dtype = resolve_device(None), parse_dtype(dtype)
    plan = memory.plan(
        args,
        n_ranks,
        torch_dtype,
        device,
        tied=ckpt.tied,
        bits=ckpt.quantized_bits(args, bits),
    )
    off, least = accel.why_off(True), min(plan.bits.values(), default=None)
    ways = (
        accel.Ways.plain(off) if off else accel.choose(args, n_ranks, torch_dtype, device, least)[0]
    )
    rows = {
        "folder": f"{ckpt_dir} ({'Meta' if ckpt.layout == 'native' else 'Hugging Face'} layout)",
        "family": _family(args),
        "parameters": _count(numbers),
        "shape": f"dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
        f"{args.kv_heads} key/value heads, feed-forward {args.ffn_hidden_dim}",
        "files": f"{len(ckpt.files)}, split for {ckpt.n_shards} rank(s)",
        "stored as": stored,
        "context": f"{ckpt.context or 'unknown'} tokens",
        "tokenizer": f"{type(tokenizer).__name__}, {tokenizer.n_words} tokens",
        "runs on": f"{', '.join(map(str, valid))} ranks",
        "memory": str(plan),
        "kernels": f"on {device.type}: {ways}",
    }
    for name, value in rows.items():
        print(f"{name + ':':12} {value}")
    for fault in faults:
        print(f"{'wrong:':12} {fault}")
    if faults:
        raise SystemExit(1)


def verify(ckpt_dir: str, *, tokenizer_path: str | None = None) -> None:
    """Check a folder: checksums, archives, and the key, shape, dtype and values of every tensor.

    Args:
        ckpt_dir: checkpoint folder, or hub id (owner/name).
        tokenizer_path: tokenizer file; default: the one in the folder.
    """
    ckpt, _, args = _opened(ckpt_dir, tokenizer_path)
    path = expanded(tokenizer_path or ckpt.tokenizer_path)
    faults = verification.verify(ckpt, args, path, progress=True)
    for fault in faults:
        print(fault)
    if faults:
        raise SystemExit(1)
    print(f"{ckpt_dir}: no faults found")


def convert_folder(
    src: str,
    dst: str,
    *,
    mp: int | None = None,
    format: Literal["native", "hf"] = "native",
    dtype: str | None = None,
    quantize: str | None = None,
    force: bool = False,
    tokenizer_path: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write a folder in another layout, for another number of ranks, or with another dtype.

    Args:
        src: checkpoint folder, or hub id (owner/name).
        dst: folder to write; it appears once it is complete.
        mp: number of shards in a native folder; default 1.
        format: native (Meta's) or hf (Hugging Face's).
        dtype: bfloat16, float16 or float32; default: as stored.
        quantize: int8 or int4: quantize the linear layers; needs the format hf.
        force: replace dst if it exists.
        tokenizer_path: tokenizer file; default: the one in src.
        adapter: folder of a LoRA adapter to merge into the weights.
    """
    if format not in ("native", "hf"):
        raise ValueError(f"format is {format!r}, expected 'native' or 'hf'")
    bits = parse_quantize(quantize)
    if bits is not None and format != "hf":
        raise ValueError("Meta's layout has no quantized weights: give --format hf")
    if format == "hf" and mp is not None:
        raise ValueError("Hugging Face's layout isn't split for ranks: leave --mp out")
    ckpt, tokenizer, args = _opened(src, tokenizer_path)
    convert.convert(
        ckpt,
        args,
        expanded(dst),
        layout=format,
        n_shards=1 if mp is None else mp,
        dtype=None if dtype is None else parse_dtype(dtype),
        quantize=bits,
        tokenizer=tokenizer,
        tokenizer_path=expanded(tokenizer_path or ckpt.tokenizer_path),
        force=force,
        progress=True,
        adapter=None if adapter is None else expanded(adapter),
    )
    print(f"{dst} written")
    new = find_checkpoint(dst)
    if new.context != ckpt.context:
        print(
            f"note: {dst} can't record the context of {ckpt.context} tokens; it will be read as "
            f"{new.context or 'unknown'}"
        )
    if lost := ckpt.stop_tokens - tokenizer.stop_tokens - new.stop_tokens:
        print(f"note: {dst} can't record that {sorted(lost)} end a generation")


@runs_model(max_batch_size=1)
def complete(
    model: ModelOptions,
    sampling: SamplingOptions,
    prompt: str,
) -> None:
    """Continue a text and show it as it is generated.

    Args:
        prompt: the text.
    """
    llm = model.build()
    tokens = llm.tokenizer.encode(prompt, bos=True, eos=False)
    show(prompt)
    show_steps(llm.stream([tokens], **dataclasses.asdict(sampling), logprobs=False))


COMMANDS: dict[str, Callable[..., None]] = {
    "info": info,
    "verify": verify,
    "convert": convert_folder,
    "complete": complete,
    "chat": chat,
    "serve": serve,
    "batch": batch,
    "eval": evaluate,
}


def main() -> None:
    cli.run(COMMANDS, name="python -m llama")


if __name__ == "__main__":
    main()
