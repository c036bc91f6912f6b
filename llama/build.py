"""Build a loaded and accelerated model from a checkpoint folder."""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import accel, memory
from llama.accel.cpu import activation_dtype
from llama.checkpoint import hub
from llama.checkpoint.folder import find_checkpoint
from llama.checkpoint.reader import load
from llama.device import default_dtype, parse_dtype, resolve_device
from llama.distributed import collectives, groups
from llama.distributed.collectives import check_same_on_all_ranks, raise_on_all_ranks
from llama.distributed.watchdog import MIN_TIMEOUT
from llama.model import Transformer
from llama.quantize import parse_quantize
from llama.tokenizer import AnyTokenizer, Tokenizer

# With max_seq_len=None, if the model's context isn't shorter.
_DEFAULT_SEQ_LEN = 2048


def build_model(
    ckpt_dir: str,
    tokenizer_path: str | None,
    max_seq_len: int | None,
    max_batch_size: int,
    model_parallel_size: int | None,
    *,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    quiet_ranks: bool,
    rope_scaling_factor: float | None,
    compile: bool,
    accelerate: bool,
    rank_timeout: float,
    max_prefill_tokens: int,
    adapter: str | None,
    quantize: str | None,
) -> tuple[Transformer, AnyTokenizer]:
    """The model and the tokenizer; see ``Llama.build`` for arguments and errors."""
    start = time.time()
    torch_device = resolve_device(device)
    torch_dtype = default_dtype(torch_device) if dtype is None else parse_dtype(dtype)
    if not rank_timeout >= MIN_TIMEOUT:
        raise ValueError(
            f"rank_timeout is {rank_timeout}, expected at least {MIN_TIMEOUT:g} seconds: with "
            "less, healthy ranks on a busy machine would count as lost"
        )
    bits = parse_quantize(quantize)
    off = accel.why_off(accelerate)
    if compile and not accelerate:
        raise ValueError("compile is True, but accelerate is False: leave one of them out")
    groups.initialize(torch_device, model_parallel_size, rank_timeout)
    ranks = groups.current_groups()
    is_first_process = groups.is_first_process()
    if quiet_ranks and not is_first_process:
        _silence_stdout()
    folder = _local_folder(ckpt_dir)
    with raise_on_all_ranks():
        ckpt = find_checkpoint(folder)
        path = tokenizer_path or str(ckpt.tokenizer_path)
        tokenizer: AnyTokenizer = Tokenizer(path, llama31=ckpt.is_llama31)
        tokenizer.stop_tokens |= ckpt.stop_tokens
        if max_seq_len is None:
            max_seq_len = min(_DEFAULT_SEQ_LEN, ckpt.context or _DEFAULT_SEQ_LEN)
        args = ckpt.args(tokenizer.n_words, max_seq_len, max_batch_size, rope_scaling_factor)
        tokenizer.n_padding = args.vocab_size - tokenizer.n_words
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
            bits=ckpt.quantized_bits(args, bits),
        )
        memory.check(plan, memory.free_bytes(torch_device, groups.n_local_processes()))
        with torch.device("meta"):
            model = Transformer(args)
    settings = {"dtype": torch_dtype, "device": torch_device.type, "compile": compile}
    settings |= {"max_prefill_tokens": max_prefill_tokens, "adapter": adapter}
    settings |= {"accelerate": off is None}
    activations = activation_dtype(torch_device, torch_dtype) if off is None else torch_dtype
    settings |= {"quantize": bits, "activations": activations}
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
            norm_dtype=activations,
            adapter=adapter,
            quantize=bits,
            form=accel.quantized_form(torch_device, off),
        )
        _assign(model, tensors)
        del tensors  # accelerate replaces some
    with memory.explain_oom(lambda: plan):
        accel.accelerate(model, compile=compile, off=off)
    could_use_kernels = dtype is None or torch_dtype != torch.float32 or bits is not None
    if torch_device.type == "cpu" and off is None and could_use_kernels:
        accel.warn_missing_kernels(model)
    if is_first_process:
        print(f"Loaded in {time.time() - start:.2f} seconds")
    return model, tokenizer


def _assign(model: Transformer, tensors: dict[str, Any]) -> None:
    """Make ``tensors`` the model's weights. The matmul of a quantized layer owns its weight."""
    for key in [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        layer: Any = model.get_submodule(key.removesuffix(".weight"))
        layer.weight, layer.linear = None, tensors.pop(key)
    model.load_state_dict(tensors, assign=True)


def _local_folder(ckpt_dir: str) -> str:
    """``hub.local_folder``, called by one rank of each machine before the others.

    All ranks at once would download everything several times where the file system of the cache has
    no locks. Waiting ranks send heartbeats, and the collective has no timeout.
    """
    folder = ckpt_dir
    for turn in (True, False):
        with raise_on_all_ranks():
            if groups.is_first_on_machine() is turn:
                folder = hub.local_folder(ckpt_dir)
    # machines may have different commits in their caches, and the hub may get a new one meanwhile
    commit = None if folder == ckpt_dir else Path(folder).name
    check_same_on_all_ranks("Llama.build", {"the hub's commit": commit}, collectives.world)
    return folder


def _silence_stdout() -> None:
    if getattr(sys.stdout, "name", None) != os.devnull:
        # stays open until exit; accepts any text, since the first rank may print it without error
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
