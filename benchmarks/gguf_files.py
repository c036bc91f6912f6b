"""GGUF files of checkpoints, for llama.cpp.

Types are chosen as llama-quantize does without an importance matrix, and the numbers are quantized
by llama.cpp's own code. The vocabulary is left out: benchmarks give token ids.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from benchmarks.llamacpp import quantized
from llama import ModelArgs, Tokenizer
from llama.checkpoint.folder import find_checkpoint
from llama.checkpoint.reader import Weights
from llama.checkpoint.sharding import ShardSpec
from llama.model import precompute_freqs_cis

TYPES = ("F32", "BF16", "Q8_0", "Q4_0")
_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def write_gguf(
    folder: Path,
    file: Path,
    type_name: str,
    *,
    pad: bool = False,
    override: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a checkpoint as one GGUF file.

    One tensor at a time is in memory, in float32.

    Args:
        folder: in any layout that ``Llama.build`` reads.
        type_name: one of ``TYPES``: F32, BF16, Q8_0 or Q4_0. In Q4_0 the output layer is Q6_K, as
            llama-quantize makes it.
        pad: make the feed-forward width a multiple of 32 with zeros, which change nothing. The
            narrow models of tests need it: a tensor of another width becomes F16.
        override: other types, by tensors' names in GGUF: {"token_embd": "BF16"} for example.

    Raises:
        FileNotFoundError, ValueError: ``folder`` isn't a valid checkpoint, or the type is unknown.
    """
    if type_name not in TYPES:
        raise ValueError(f"type is {type_name!r}, expected one of {', '.join(TYPES)}")
    ckpt = find_checkpoint(str(folder))
    n_words = Tokenizer(str(ckpt.tokenizer_path), llama31=ckpt.is_llama31).n_words
    args = ckpt.args(n_words, ckpt.context or 8192, 1)
    weights = Weights(ckpt, args)
    ffn_width = args.ffn_hidden_dim + (-args.ffn_hidden_dim % 32 if pad else 0)
    partial = file.with_name(f".{file.name}")
    writer = GGUFWriter(partial, "llama")
    _add_metadata(writer, args, ffn_width)
    types, shapes, rope = {}, {}, _rope_factors(args)
    if rope is not None:
        writer.add_tensor_info("rope_freqs.weight", rope.shape, rope.dtype, rope.nbytes)
    for key, spec in weights.specs.items():
        name, sizes = _name(key), _sizes(key, spec, ffn_width)
        types[key] = _type(name, sizes, type_name, override)
        shapes[key] = quant_shape_to_byte_shape(sizes, types[key])
        size = int(np.prod(shapes[key]))
        writer.add_tensor_info(f"{name}.weight", shapes[key], np.dtype(np.uint8), size, types[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if rope is not None:
        writer.write_tensor_data(rope)
    for key, spec in weights.specs.items():
        # not permuted: native files have pairs of neighbours, as llama.cpp's "llama" rotates them
        weight = weights.read(key, 1, 0, torch.float32, torch.device("cpu"))
        sizes = _sizes(key, spec, ffn_width)
        missing = [(0, a - b) for a, b in zip(sizes, spec.sizes, strict=True)]
        rows = np.atleast_2d(np.pad(weight.numpy(), missing))
        data = quantized(rows, int(types[key]), int(np.prod(shapes[key])))
        writer.write_tensor_data(data)
    writer.close()
    os.replace(partial, file)


def _name(key: str) -> str:
    parts = key.removesuffix(".weight").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{_NAMES['.'.join(parts[2:])]}"
    return _NAMES[".".join(parts)]


def _sizes(key: str, spec: ShardSpec, ffn_width: int) -> tuple[int, ...]:
    if ".feed_forward." not in key:
        return spec.sizes
    return (spec.sizes[0], ffn_width) if ".w2." in key else (ffn_width, spec.sizes[1])


def _type(name: str, sizes: tuple[int, ...], type_name: str, override: Mapping[str, str]) -> Type:
    if len(sizes) == 1:
        return Type.F32
    if name in override:
        return Type[override[name]]
    chosen, width = Type[type_name], sizes[-1]
    if chosen is Type.Q4_0 and name == "output":
        chosen = Type.Q8_0 if width % 256 else Type.Q6_K
    is_quantized = chosen not in (Type.F32, Type.BF16)
    return Type.F16 if is_quantized and width % 32 else chosen


def _rope_factors(args: ModelArgs) -> Any:
    """[head_dim / 2] by which llama.cpp divides the frequencies; None if none is scaled."""
    if not args.rope_scaling:
        return None
    # at position 1, angles are the frequencies
    plain, scaled = (
        precompute_freqs_cis(args.head_dim, 2, args.rope_theta, scaling)[1].angle()
        for scaling in (False, args.rope_scaling)
    )
    return (plain / scaled).numpy()


def _add_metadata(writer: GGUFWriter, args: ModelArgs, ffn_width: int) -> None:
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(ffn_width)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("no_vocab")
