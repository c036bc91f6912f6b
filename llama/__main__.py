"""python -m llama: look at a checkpoint folder, check it, convert it, or run one prompt on it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from llama import checkpoint, cli, convert, generation, memory
from llama import verify as verification
from llama.files import escaped
from llama.llama2 import open_tokenizer
from llama.model import ModelArgs
from llama.tokenizer import Message


def _opened(
    folder: str,
    tokenizer_path: str | None,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
) -> tuple[checkpoint.Checkpoint, Any, ModelArgs]:
    """A folder, its tokenizer and its parameters."""
    found = checkpoint.find(folder)
    if max_seq_len is None:
        max_seq_len = min(512, found.context or 512)
    path = tokenizer_path or str(found.tokenizer_path)
    tokenizer = open_tokenizer(path, llama31=found.is_llama31)
    return found, tokenizer, found.args(tokenizer.n_words, max_seq_len, max_batch_size)


def _family(args: ModelArgs) -> str:
    if args.use_scaled_rope:
        is_llama32 = args.rope_scaling_factor == checkpoint.LLAMA32_SCALING
        return "Llama 3.2" if is_llama32 else "Llama 3.1 or 3.3"
    return {10000.0: "Llama 2", 500000.0: "Llama 3"}.get(args.rope_theta, "unknown")


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
) -> None:
    """Show what a folder holds and what it needs. The weights themselves are not read.

    Args:
        ckpt_dir: checkpoint folder.
        tokenizer_path: default the one in the folder.
        mp: number of ranks to plan for; default as many as the folder has shards.
        max_seq_len: longest prompt and generation together, in tokens; default 512.
        max_batch_size: rows that run together.
        dtype: bfloat16, float16 or float32.
    """
    found, tokenizer, args = _opened(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    n_ranks = found.n_shards if mp is None else mp
    if n_ranks not in args.rank_counts:
        raise ValueError(f"mp is {n_ranks}, expected one of {args.rank_counts}")
    weights = checkpoint.Weights(found, args)
    faults = [fault for i in range(found.n_shards) for fault in weights.faults(i)]
    numbers = sum(checkpoint.n_bytes(cut, 1, torch.uint8) for cut in checkpoint.cuts(args).values())
    if found.tied:
        numbers -= args.vocab_size * args.dim
    stored = "?"
    if not faults:
        dtypes = {t.dtype for i in range(found.n_shards) for t in weights.shard(i).values()}
        stored = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    device = generation.resolve_device(None)
    plan = memory.plan(args, n_ranks, generation.dtype_of(dtype), device, tied=found.tied)
    rows = {
        "folder": f"{ckpt_dir} ({'Meta' if found.layout == 'native' else 'Hugging Face'} layout)",
        "family": _family(args),
        "parameters": _count(numbers),
        "shape": f"dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
        f"{args.kv_heads} key/value heads, feed-forward {args.ffn_hidden_dim}",
        "files": f"{len(found.files)}, cut for {found.n_shards} rank(s)",
        "stored as": stored,
        "context": f"{found.context or 'unknown'} tokens",
        "tokenizer": f"{type(tokenizer).__name__}, {tokenizer.n_words} tokens",
        "runs on": f"{', '.join(map(str, args.rank_counts))} ranks",
        "memory": str(plan),
    }
    for name, value in rows.items():
        print(f"{name + ':':12} {value}")
    for fault in faults:
        print(f"{'wrong:':12} {fault}")
    if faults:
        raise SystemExit(1)


def verify(ckpt_dir: str, *, tokenizer_path: str | None = None) -> None:
    """Check a folder: sums of checklist.chk, archives, every key, shape, dtype and number.

    Args:
        ckpt_dir: checkpoint folder.
        tokenizer_path: default the one in the folder.
    """
    found, _, args = _opened(ckpt_dir, tokenizer_path)
    faults = verification.verify(found, args, progress=True)
    for fault in faults:
        print(fault)
    if faults:
        raise SystemExit(1)
    print(f"{ckpt_dir}: all is well")


def convert_folder(
    src: str,
    dst: str,
    *,
    mp: int | None = None,
    format: Literal["native", "hf"] = "native",
    dtype: str | None = None,
    force: bool = False,
    tokenizer_path: str | None = None,
) -> None:
    """Write a folder in another layout, for another number of ranks, or with another dtype.

    Args:
        src: checkpoint folder.
        dst: folder to write; it appears when it is whole.
        mp: shards of a native folder; default 1.
        format: native (Meta's) or hf (Hugging Face's).
        dtype: bfloat16, float16 or float32; default what the files have.
        force: replace dst if it is there.
        tokenizer_path: default the one in src.
    """
    if format not in ("native", "hf"):
        raise ValueError(f"format is {format!r}, expected 'native' or 'hf'")
    if format == "hf" and mp is not None:
        raise ValueError("Hugging Face's layout is not cut for ranks: leave --mp out")
    found, tokenizer, args = _opened(src, tokenizer_path)
    convert.convert(
        found,
        args,
        Path(dst),
        layout=format,
        n_shards=1 if mp is None else mp,
        dtype=None if dtype is None else generation.dtype_of(dtype),
        tokenizer_path=Path(tokenizer_path or found.tokenizer_path),
        bos_token=tokenizer.bos_id,
        stop_tokens=tokenizer.stop_tokens | found.stop_tokens,
        force=force,
        progress=True,
    )
    print(f"{dst} written")
    new = checkpoint.find(dst)
    if new.context != found.context:
        print(
            f"note: {dst} cannot say that the context is {found.context} tokens; it will be taken "
            f"to be {new.context}"
        )
    if lost := found.stop_tokens - tokenizer.stop_tokens - new.stop_tokens:
        print(f"note: {dst} cannot say that {sorted(lost)} end a generation")


def _write(steps: Iterator[list[generation.TokenEvent]]) -> None:
    for events in steps:
        for event in events:
            _show(event.text)
    print()


def _show(text: str) -> None:
    """Print a piece of text; a terminal would obey the control characters in it."""
    print(escaped(text) if sys.stdout.isatty() else text, end="", flush=True)


def complete(
    ckpt_dir: str,
    prompt: str,
    *,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 1,
) -> None:
    """Continue a text and show it as it comes.

    Args:
        ckpt_dir: checkpoint folder.
        prompt: the text.
        tokenizer_path: default the one in the folder.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens that sum up to this probability.
        max_seq_len: longest prompt and generation together, in tokens.
        max_gen_len: longest generation, in tokens; default what max_seq_len leaves.
        dtype: bfloat16, float16 or float32; default what the device computes best in.
        device: cuda, mps or cpu; default the first of them that is there.
        seed: of the draws.
    """
    llm = generation.Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, 1, seed=seed, dtype=dtype, device=device
    )
    tokens = llm.tokenizer.encode(prompt, bos=True, eos=False)
    _show(prompt)
    _write(llm.stream([tokens], max_gen_len, temperature, top_p, logprobs=False))


def chat(
    ckpt_dir: str,
    prompt: str,
    *,
    system: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 1,
) -> None:
    """Answer a message and show the answer as it comes.

    Args:
        ckpt_dir: checkpoint folder.
        prompt: the message.
        system: a system message before it.
        tokenizer_path: default the one in the folder.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens that sum up to this probability.
        max_seq_len: longest prompt and answer together, in tokens.
        max_gen_len: longest answer, in tokens; default what max_seq_len leaves.
        dtype: bfloat16, float16 or float32; default what the device computes best in.
        device: cuda, mps or cpu; default the first of them that is there.
        seed: of the draws.
    """
    llm = generation.Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, 1, seed=seed, dtype=dtype, device=device
    )
    dialog: list[Message] = [{"role": "user", "content": prompt}]
    if system is not None:
        dialog.insert(0, {"role": "system", "content": system})
    tokens = llm.formatter.encode_dialog_prompt(dialog)
    _write(llm.stream([tokens], max_gen_len, temperature, top_p, logprobs=False))


def main() -> None:
    commands: dict[str, Callable[..., None]] = {
        "info": info,
        "verify": verify,
        "convert": convert_folder,
        "complete": complete,
        "chat": chat,
    }
    cli.run(commands, name="python -m llama")


if __name__ == "__main__":
    main()
