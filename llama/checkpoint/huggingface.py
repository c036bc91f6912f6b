"""Hugging Face folders: config.json and weight files, whose keys are mapped to native names.

The model is the same, with three differences: the names; RoPE rotates the halves of a head
(x_j, x_{j + D/2}), where native weights rotate neighbours (x_2j, x_2j+1), so that the rows of wq
and wk are permuted; and the token embedding may also be the output layer.
"""

import contextlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.checkpoint.quantization_config import Quantization, parse_quantization
from llama.config import LLAMA2_ROPE_THETA, ModelArgs
from llama.files import LARGEST_INDEX, read_json

WHOLE = "model.safetensors"
INDEX = f"{WHOLE}.index.json"
_PICKLE = "pytorch_model.bin"
# Native module names to Hugging Face's, in a layer and outside.
_LAYER_NAMES = {
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
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
_NATIVE_NAMES = {theirs: ours for ours, theirs in (_LAYER_NAMES | _NAMES).items()}
# Fields of config.json that would change the result, and their neutral values.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", "swish", None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "is_encoder_decoder": (False, None),
}
# Fields of a llama3 rope_scaling, by those of ModelArgs.
_ROPE_FIELDS = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
# multiple_of and ffn_dim_multiplier of the published models; the width tells them apart.
_FFN_SHAPES: tuple[tuple[int, float | None], ...] = (
    (256, None),
    (256, 1.5),
    (4096, 1.3),
    (1024, 1.3),
    (4096, 1.2),
)


def native_key(key: str) -> str:
    """Native name of a tensor; unknown names are returned unchanged."""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", key):
        ours = _NATIVE_NAMES.get(layer[2])
        return f"layers.{layer[1]}.{ours}.weight" if ours in _LAYER_NAMES else key
    ours = _NATIVE_NAMES.get(key.removesuffix(".weight"))
    return f"{ours}.weight" if ours in _NAMES and key.endswith(".weight") else key


def huggingface_key(key: str) -> str:
    """Hugging Face's name of a tensor of the native layout; unknown names are returned
    unchanged."""
    if layer := re.fullmatch(r"layers\.(\d+)\.(.*)\.weight", key):
        theirs = _LAYER_NAMES.get(layer[2])
        return f"model.layers.{layer[1]}.{theirs}.weight" if theirs else key
    theirs = _NAMES.get(key.removesuffix(".weight"))
    return f"{theirs}.weight" if theirs and key.endswith(".weight") else key


def is_rotated(key: str) -> bool:
    """Whether the rows of this tensor are permuted between the two layouts."""
    return key.endswith((".attention.wq.weight", ".attention.wk.weight"))


def halves_as_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """View of whole heads [heads * D, columns] in Hugging Face's order as [heads, D/2, 2, columns],
    which is the native order."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)


def pairs_as_halves(weight: Tensor, head_dim: int) -> Tensor:
    """View of whole heads [heads * D, columns] in native order as [heads, 2, D/2, columns], which
    is Hugging Face's order."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, empty if it isn't in this layout.

    The order is transformers': safetensors before pickles; the whole file, else those that the
    index names. Without any of these, files with similar names.

    Raises:
        FileNotFoundError: the index names a file that is missing.
        ValueError: the index can't be read.
    """
    if not (folder / "config.json").is_file():
        return []
    for whole in (WHOLE, _PICKLE):
        index = folder / f"{whole}.index.json"
        if (folder / whole).exists():
            return [folder / whole]
        if index.is_file():
            return _indexed_files(index, Path(whole).suffix)
    for parts in ("*.safetensors", "pytorch_model-*.bin"):
        # macOS adds a ._NAME to each file on non-Mac file systems
        others = (".", "adapter_model.")
        if found := sorted(p for p in folder.glob(parts) if not p.name.startswith(others)):
            return found
    return []


def _indexed_files(index: Path, suffix: str) -> list[Path]:
    weight_map = read_json(index, LARGEST_INDEX).get("weight_map")
    valid = re.compile(rf"[A-Za-z0-9._-]{{1,200}}{re.escape(suffix)}")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and valid.fullmatch(name) for name in weight_map.values()
    ):
        raise ValueError(f"{str(index)!r} has no valid weight_map: download it again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"{str(index.parent)!r} lacks {', '.join(missing[:4])}, which {index.name} names: "
            "download them"
        )
    return files


class Config(NamedTuple):
    """The content of a config.json.

    Attributes:
        params: fields of ModelArgs.
        context: longest context the model was trained for; None if not given.
        tied: the embedding is also the output layer.
        quantization: how linear layers are quantized; None if they aren't.
    """

    params: dict[str, Any]
    context: int | None
    tied: bool
    quantization: Quantization | None


def read_config(path: Path) -> Config:
    """Read and check a config.json.

    Raises:
        FileNotFoundError, ValueError: a file is missing or invalid, or its model isn't a
            Llama; the message names the field.
    """
    config = read_json(path)
    if config.get("model_type") != "llama":
        raise ValueError(
            f"{str(path)!r} describes a model of the type {config.get('model_type')!r:.40}, "
            "expected 'llama'"
        )
    for name, neutral in _UNSUPPORTED.items():
        if name == "sliding_window" and config.get("use_sliding_window") is False:
            continue
        if config.get(name) not in neutral:
            raise ValueError(
                f"{str(path)!r} has {name} {config[name]!r:.60}, which is not supported: expected "
                f"{neutral[0]!r}"
            )
    needed = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "norm_eps": "rms_norm_eps",
    }
    width_name = "intermediate_size"
    if missing := sorted({*needed.values(), width_name} - config.keys()):
        raise ValueError(f"{str(path)!r} lacks {', '.join(missing)}: download it again")
    params = {ours: config[theirs] for ours, theirs in needed.items()}
    params["n_kv_heads"] = config.get("num_key_value_heads")
    params["attention_head_dim"] = config.get("head_dim")
    if params["vocab_size"] == -1:
        raise ValueError(f"{str(path)!r} has vocab_size -1, expected a positive number")
    params |= _rope_params(config, path)
    try:
        args = ModelArgs(**params)
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from None
    width = config[width_name]
    if type(width) is not int or not 0 < width < 2**24:
        raise ValueError(
            f"{str(path)!r} has {width_name} {width!r:.40}, expected a positive integer"
        )
    own = (config.get("multiple_of"), config.get("ffn_dim_multiplier"))  # written by our convert
    params |= _ffn_params(args.dim, width, own)
    context, tied = config.get("max_position_embeddings"), config.get("tie_word_embeddings")
    if context is not None and (type(context) is not int or context < 1):
        raise ValueError(
            f"{str(path)!r} has max_position_embeddings {context!r:.40}, expected a positive number"
        )
    if context is not None and _is_linear(params):
        context = int(context * args.rope_scaling_factor)
    if not isinstance(tied, bool | None):
        raise ValueError(f"{str(path)!r} has tie_word_embeddings {tied!r:.40}, expected a boolean")
    quantization = parse_quantization(config.get("quantization_config"), path, args.n_layers)
    return Config(params, context, bool(tied), quantization)


def write_config(
    args: ModelArgs, context: int | None, dtype: torch.dtype, *, tied: bool = False
) -> dict[str, Any]:
    """The config.json of a model, with the two parameters that only native files have.

    A ``context`` of None is left out.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        # also for linear scaling, whose original context of 1 scales all wavelengths there too
        rope |= {theirs: getattr(args, ours) for ours, theirs in _ROPE_FIELDS.items()}
        rope["rope_type"] = "llama3"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "rms_norm_eps": args.norm_eps,
        "vocab_size": args.vocab_size,
        # both spellings: libraries that predate rope_parameters read the other two
        "rope_parameters": rope,
        "rope_theta": args.rope_theta,
        "rope_scaling": rope if args.use_scaled_rope else None,
        "tie_word_embeddings": tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "multiple_of": args.multiple_of,
        "ffn_dim_multiplier": args.ffn_dim_multiplier,
    }
    return config if context is None else config | {"max_position_embeddings": context}


def stop_tokens(folder: Path) -> set[int]:
    """Ids that end a generation, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        found = read_json(path).get("eos_token_id")
        if found is None or found == []:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int and i >= -1 for i in ids):
            raise ValueError(
                f"{str(path)!r} has eos_token_id {found!r:.60}, expected an id or a list of them"
            )
        return set(ids) - {-1}
    return set()


def import_safetensors() -> ModuleType:
    """The package, with safetensors.torch; an ImportError gives the command that installs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "Hugging Face's files need the package safetensors: pip install safetensors"
        ) from error
    return safetensors


def by_native_name(contents: Iterable[tuple[Path, Mapping[str, Any]]]) -> dict[str, Any]:
    """The tensors of all files by native name; rows of wq and wk in Hugging Face's order.

    Raises:
        ValueError: a key is in two files, or is one of Meta's layout.
    """
    tensors: dict[str, Any] = {}
    for path, found in contents:
        for key, tensor in found.items():
            if (theirs := huggingface_key(key)) != key:
                raise ValueError(
                    f"{str(path)!r} holds {key!r}, a name of Meta's layout, expected Hugging "
                    f"Face's, {theirs!r}"
                )
            if key.endswith(".rotary_emb.inv_freq"):
                continue
            if native_key(key) in tensors:
                raise ValueError(
                    f"{key!r:.200} is in {str(path)!r} and in another file of the folder"
                )
            tensors[native_key(key)] = tensor
    return tensors


def _rope_params(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    if config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):  # the second is the newer one
        found = config.get(name) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{str(path)!r} has {name} {found!r:.60}, expected a JSON object")
        if found:
            found = {"rope_type": found.get("type", "default")} | found
        for key in sorted(found.keys() & rope.keys()):
            if found[key] != rope[key]:
                raise ValueError(
                    f"{str(path)!r} gives {key!r:.40} two values, {rope[key]!r:.40} and, in "
                    f"{name}, {found[key]!r:.40}: leave one of them out"
                )
        rope |= found
    params = {"rope_theta": rope.get("rope_theta", LLAMA2_ROPE_THETA)}
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "llama3", "linear"):
        raise ValueError(
            f"{str(path)!r} has the rope_type {kind!r:.40}, which is not supported: expected "
            "'default', 'linear' or 'llama3'"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{str(path)!r} has a partial_rotary_factor, which is not supported")
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        return params
    needed = _ROPE_FIELDS if kind == "llama3" else {"rope_scaling_factor": "factor"}
    if missing := sorted(name for name in needed.values() if rope.get(name) is None):
        raise ValueError(
            f"{str(path)!r} has a {kind} rope_scaling without {', '.join(missing)}: download it "
            "again"
        )
    params |= {ours: rope[theirs] for ours, theirs in needed.items()}
    if kind == "linear":
        params["rope_original_context"] = 1
    return params | {"use_scaled_rope": True}


def _is_linear(params: Mapping[str, Any]) -> bool:
    """Whether the scaling is linear: max_position_embeddings is then the context before it."""
    return "rope_scaling_factor" in params and "rope_low_freq_factor" not in params


def _ffn_params(dim: int, width: int, first: tuple[Any, Any]) -> dict[str, Any]:
    """A multiple_of and ffn_dim_multiplier that yield this feed-forward width: ``first`` if they
    do, else those of a published model, else any."""
    base = int(2 * (4 * dim) / 3)
    candidates = [first, *_FFN_SHAPES, *((2**i, None) for i in range(7, -1, -1))]
    # works for any width; + 0.5, so that truncation yields it despite rounding errors
    candidates.append((1, (width + 0.5) / base))
    for multiple_of, multiplier in candidates:
        params = {"multiple_of": multiple_of, "ffn_dim_multiplier": multiplier}
        with contextlib.suppress(ValueError):  # too wide, or not numbers
            if ModelArgs(dim=dim, n_heads=1, **params).ffn_hidden_dim == width:
                return params
    raise AssertionError("the last candidate gives every width")
