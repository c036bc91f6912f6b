"""The same weights in the published code's Transformer and in Hugging Face's Llama.

Key names and the order of rows are defined again here, as an independent check of
llama/checkpoint/huggingface.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from llama_models.llama3.args import ModelArgs as PublishedArgs
from llama_models.llama3.model import Transformer as PublishedTransformer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama import ModelArgs


def published_model(params: Mapping[str, Any], weights: Mapping[str, Tensor]) -> torch.nn.Module:
    """Needs an initialized process group of one."""
    known: dict[str, Any] = {
        key: value for key, value in params.items() if key != "rope_scaling_factor"
    }
    model = PublishedTransformer(PublishedArgs(**known, max_batch_size=2, max_seq_len=64))
    model.to(next(iter(weights.values())).dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing
    assert not unexpected
    return model


def huggingface_model(params: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LlamaForCausalLM:
    args = ModelArgs(**params)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params["rope_theta"]}
    if args.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.ffn_hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        rms_norm_eps=args.norm_eps,
        max_position_embeddings=131072,
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    renamed = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for i in range(args.n_layers):
        for native, theirs in names.items():
            weight = weights[f"layers.{i}.{native}.weight"]
            if native.endswith((".wq", ".wk")):  # interleaved pairs to halves
                pairs = weight.view(-1, args.head_dim // 2, 2, args.dim)
                weight = pairs.transpose(1, 2).reshape(weight.shape)
            renamed[f"model.layers.{i}.{theirs}.weight"] = weight
    model.load_state_dict(renamed)
    return model
