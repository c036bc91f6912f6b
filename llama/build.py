"""Build a loaded and accelerated model from a checkpoint folder."""

import dataclasses
import os
import sys
import time

import torch
import torch.distributed as dist

from llama import memory
from llama.accel import accelerate
from llama.checkpoint.folder import find_checkpoint
from llama.checkpoint.reader import load
from llama.device import default_dtype, parse_dtype, resolve_device
from llama.distributed import collectives, groups
from llama.distributed.collectives import check_same_on_all_ranks, raise_on_all_ranks
from llama.distributed.watchdog import MIN_TIMEOUT
from llama.model import Transformer
from llama.tokenizer import Tokenizer, load_tokenizer
from llama.vocab.sentencepiece import SentencePieceTokenizer


def build_model(
    ckpt_dir: str,
    tokenizer_path: str | None,
    max_seq_len: int,
    max_batch_size: int,
    model_parallel_size: int | None,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    quiet_ranks: bool,
    rope_scaling_factor: float | None,
    compile: bool,
    rank_timeout: float,
    max_prefill_tokens: int,
    adapter: str | None,
) -> tuple[Transformer, Tokenizer | SentencePieceTokenizer]:
    """The model and the tokenizer; see ``Llama.build`` for arguments and errors."""
    start = time.time()
    torch_device = resolve_device(device)
    torch_dtype = default_dtype(torch_device) if dtype is None else parse_dtype(dtype)
    if not rank_timeout >= MIN_TIMEOUT:
        raise ValueError(
            f"rank_timeout is {rank_timeout}, expected at least {MIN_TIMEOUT:g} seconds: with "
            "less, healthy ranks on a busy machine would count as lost"
        )
    groups.initialize(torch_device, model_parallel_size, rank_timeout)
    ranks = groups.current_groups()
    is_first_process = not dist.is_initialized() or dist.get_rank() == 0
    if quiet_ranks and not is_first_process:
        _silence_stdout()
    with raise_on_all_ranks():
        ckpt = find_checkpoint(ckpt_dir)
        tokenizer = load_tokenizer(
            tokenizer_path or str(ckpt.tokenizer_path), llama31=ckpt.is_llama31
        )
        tokenizer.stop_tokens |= ckpt.stop_tokens
        args = ckpt.args(tokenizer.n_words, max_seq_len, max_batch_size, rope_scaling_factor)
        shards = f" ({ckpt.n_shards} shards)" if ckpt.layout == "native" else ""
        best = min(args.valid_tp_sizes, key=lambda n: abs(n - ckpt.n_shards))
        args.check_tp_size(
            ranks.size,
            f"{str(ckpt.folder)!r}{shards}",
            f"; start it with\n    {groups.torchrun_line(best)}",
        )
        plan = memory.plan(
            args,
            ranks.size,
            torch_dtype,
            torch_device,
            tied=ckpt.tied,
            max_prefill_tokens=max_prefill_tokens,
        )
        memory.check(plan, memory.free_bytes(torch_device, groups.n_local_processes()))
        with torch.device("meta"):
            model = Transformer(args)
    settings = {"dtype": torch_dtype, "device": torch_device.type, "compile": compile}
    settings |= {"max_prefill_tokens": max_prefill_tokens, "adapter": adapter}
    check_same_on_all_ranks("Llama.build", dataclasses.asdict(args) | settings, collectives.world)
    with raise_on_all_ranks(), memory.explain_oom(lambda: plan):
        tensors = load(
            ckpt,
            args,
            ranks.size,
            ranks.rank,
            dtype=torch_dtype,
            device=torch_device,
            progress=is_first_process,
            adapter=adapter,
        )
        model.load_state_dict(tensors, assign=True)
        accelerate(model, compile=compile)
    if is_first_process:
        print(f"Loaded in {time.time() - start:.2f} seconds")
    return model, tokenizer


def _silence_stdout() -> None:
    if getattr(sys.stdout, "name", None) != os.devnull:
        # stays open until exit; accepts any text, since the first rank may print it without error
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
