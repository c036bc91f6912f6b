"""LoRA adapters in peft's format, merged into the weights while loading.

A linear layer's weight W [out, in] becomes W + scale * B A, with A [r, in] and B [out, r] (Hu et
al. 2021, arXiv:2106.09685). The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
(Kalajdzievski 2023, arXiv:2312.03732). Files aren't trusted, and fields and tensors that would have
to be left out are refused.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from llama.checkpoint import huggingface
from llama.checkpoint.sharding import Slices, shard_specs
from llama.checkpoint.tensor_files import FLOAT_DTYPES, is_plain, open_file
from llama.config import ModelArgs
from llama.files import MOST_STEPS, listed, n_steps, read_json

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MODULES = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj"
# Fields of adapter_config.json without effect on the merge: those of training, and those that chose
# the layers, which the file shows. Fields that are neither here nor in _READ must be empty.
_IGNORED = set(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules "
    "inference_mode layers_pattern layers_to_transform lora_dropout megatron_core peft_version "
    "qalora_group_size revision target_modules task_type".split()
)
_READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# Fields that may have other values than false and null.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # the others, like "pissa", move a part of the base model into the adapter
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class LowRank(NamedTuple):
    """The update of a linear layer, scale * b @ a. The rows of ``b`` are in native order."""

    a: Tensor
    b: Tensor
    scale: float

    def merged(self, weight: Tensor, part: Slices) -> Tensor:
        """A part of the layer's weight, with that part of the update added.

        The sum is computed in float32 (float64 if the weight is), whatever the dtypes of weight and
        adapter, so that the caller rounds once.
        """
        (row, end_row), (column, end_column) = part
        wide = torch.promote_types(weight.dtype, torch.float32)
        update = self.b[row:end_row].to(wide) @ self.a[:, column:end_column].to(wide)
        return update.mul_(self.scale).add_(weight)


class _Config(NamedTuple):
    """The content of an adapter_config.json.

    Attributes:
        ranks: r, and those of rank_pattern.
        alpha: of layers that no pattern matches.
        alphas: regular expressions for names of layers, and their alpha; the first match counts.
    """

    ranks: set[int]
    alpha: float
    alphas: list[tuple[re.Pattern[str], float]]
    use_rslora: bool

    def scale(self, module: str, rank: int) -> float:
        found = (alpha for pattern, alpha in self.alphas if pattern.match(module))
        alpha = next(found, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter(folder: Path, args: ModelArgs) -> dict[str, LowRank]:
    """The updates of a model's tensors, by key.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ImportError: the package safetensors is missing.
        ValueError: a file is damaged, the adapter isn't a plain LoRA, or it doesn't fit the model;
            the message names the field or the tensor.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(
            f"no LoRA adapter in {str(folder)!r}: give adapter, a folder (not a hub id) that holds "
            f"{CONFIG} and {_FILES[0]}"
        )
    config = _read_config(folder / CONFIG, args)
    paths = [folder / name for name in _FILES if (folder / name).exists()]
    if not paths:
        raise FileNotFoundError(f"{str(folder)!r} lacks {_FILES[0]}: download it too")
    path = paths[0]
    specs = shard_specs(args)
    linear = {key for key, spec in specs.items() if key.startswith("layers.") and spec.sizes[1:]}
    found: dict[str, dict[str, Any]] = {}
    unknown = []
    for key, tensor in open_file(path).items():
        match = _KEY.fullmatch(key)
        native = huggingface.native_key(f"{match[1]}.weight") if match else key
        if match and native in linear:
            found.setdefault(native, {})[match[2]] = tensor
        else:
            unknown.append(key)
    if unknown or not found:
        raise ValueError(
            f"{str(path)!r} holds {listed(sorted(unknown)) or 'no tensors'}, expected lora_A and "
            f"lora_B of {_MODULES} in {args.n_layers} layers"
        )
    adapter = {}
    for key, pair in found.items():
        module = huggingface.huggingface_key(key).removesuffix(".weight")
        a, b = _checked(pair, specs[key].sizes, config.ranks, f"of {module} in {str(path)!r}")
        if huggingface.is_rotated(key):
            b = huggingface.halves_as_pairs(b, args.head_dim).reshape(b.shape)
        adapter[key] = LowRank(a, b, config.scale(module, len(a)))
    return adapter


def describe(folder: Path) -> str | None:
    """The kind and the base model of the adapter in a folder, if there is one."""
    if not (folder / CONFIG).is_file():
        return None
    config = read_json(folder / CONFIG)
    kind = "LoRA" if config.get("peft_type") == "LORA" else f"{config.get('peft_type')!r:.40}"
    return f"a {kind} adapter for the base model {config.get('base_model_name_or_path')!r:.200}"


def _checked(
    pair: Mapping[str, Any], sizes: tuple[int, ...], ranks: set[int], where: str
) -> tuple[Tensor, Tensor]:
    """A and B of a layer of ``sizes``."""
    for name, rank_axis in (("A", 0), ("B", 1)):
        if name not in pair:
            raise ValueError(f"lora_{name} {where} is missing: download the adapter again")
        tensor = pair[name]
        if not is_plain(tensor) or tensor.dtype not in FLOAT_DTYPES:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"lora_{name} {where} is {kind}, expected a dense tensor of floats")
        rank = tensor.shape[rank_axis] if tensor.dim() == 2 else 0
        expected = {"A": (rank, sizes[1]), "B": (sizes[0], rank)}[name]
        if rank not in ranks or tensor.shape != expected:
            names = " or ".join(map(str, sorted(ranks)[:10]))
            shape = f"({names}, {sizes[1]})" if name == "A" else f"({sizes[0]}, {names})"
            raise ValueError(
                f"lora_{name} {where} has the shape {tuple(tensor.shape)}, expected {shape}: is it "
                "an adapter of another model?"
            )
    a, b = pair["A"], pair["B"]
    if len(a) != b.shape[1]:
        raise ValueError(
            f"lora_A {where} has the rank {len(a)}, but lora_B {b.shape[1]}: download the adapter "
            "again"
        )
    return a, b


def _read_config(path: Path, args: ModelArgs) -> _Config:
    config = read_json(path)

    def refuse(name: str, expected: str) -> ValueError:
        return ValueError(
            f"{str(path)!r} has {name[:100]!r} {config.get(name)!r:.100}, which is not supported: "
            f"expected {expected}"
        )

    for name in [*_CHOICES, *sorted(config.keys() - _CHOICES.keys())]:  # peft_type first
        value = config.get(name)
        if name in _CHOICES:
            if not any(type(value) is type(c) and value == c for c in _CHOICES[name]):
                raise refuse(name, " or ".join(map(repr, _CHOICES[name])))
        elif value and name not in _READ | _IGNORED:
            raise refuse(name, "false or null")
    rank_pattern, alpha_pattern = config.get("rank_pattern"), config.get("alpha_pattern")
    ranks, alphas = rank_pattern or {}, alpha_pattern or {}
    r, alpha, use_rslora = config.get("r"), config.get("lora_alpha"), config.get("use_rslora")
    if not _is_rank(r):
        raise refuse("r", "a positive integer")
    if not _is_alpha(alpha):
        raise refuse("lora_alpha", "a number")
    if not (isinstance(ranks, dict) and all(map(_is_rank, ranks.values()))):
        raise refuse("rank_pattern", "an object of positive integers")
    if not (isinstance(alphas, dict) and all(map(_is_alpha, alphas.values()))):
        raise refuse("alpha_pattern", "an object of numbers")
    if use_rslora not in (True, False, None):
        raise refuse("use_rslora", "a boolean")
    if sum(map(n_steps, alphas)) * 7 * args.n_layers > MOST_STEPS:
        raise refuse("alpha_pattern", "names of layers, or simple regular expressions")
    # as in peft: a pattern is for the end of a name, after a dot
    patterns = [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in alphas.items()]
    return _Config({r, *ranks.values()}, alpha, patterns, bool(use_rslora))


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _is_alpha(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e9
