"""Checkpoint folders: find the files and read their metadata, before any weights.

A native folder holds ``consolidated.00.pth`` ... ``consolidated.{M-1:02d}.pth``, a dict of tensors
for each of M model-parallel ranks, and ``params.json``. A Hugging Face folder (see huggingface.py)
counts as one shard.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llama.checkpoint import huggingface, lora
from llama.checkpoint.quantization_config import Quantization
from llama.checkpoint.sharding import is_linear, quantized_bits, shard_specs
from llama.config import LLAMA2_ROPE_THETA, LLAMA3_ROPE_THETA, ModelArgs
from llama.files import listed, read_json
from llama.quantize import Bits

# Longest context that each generation was trained for, by rope_theta.
LLAMA31_CONTEXT = 131072
CONTEXTS = {LLAMA2_ROPE_THETA: 4096, LLAMA3_ROPE_THETA: 8192}
# Fields of the published params.json that don't describe the text model.
_OTHER_FIELDS = {"max_seq_len", "max_batch_size", "vision_max_num_chunks"}
_SWITCHED_OFF: tuple[Any, ...] = (None, False, -1, {})


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The metadata of a folder, known before any weights are read.

    Attributes:
        layout: "native", or "hf" for Hugging Face's.
        files: the shards, or Hugging Face's safetensors or pytorch_model*.bin files.
        params: fields of ModelArgs. vocab_size is -1 or missing if the tokenizer's is used.
        context: longest context the model was trained for, in tokens; None if not known.
        stop_tokens: ids that end a generation, in addition to the tokenizer's own.
        tied: the embedding is also the output layer.
        quantization: how linear layers are stored in 8 or 4 bits; None if they aren't.
    """

    folder: Path
    layout: Literal["native", "hf"]
    files: list[Path]
    params: dict[str, Any]
    context: int | None
    stop_tokens: set[int]
    tied: bool = False
    quantization: Quantization | None = None

    @property
    def n_shards(self) -> int:
        return len(self.files) if self.layout == "native" else 1

    @property
    def is_llama31(self) -> bool:
        """Whether this is Llama 3.1 or later, which have scaled RoPE."""
        is_linear = self.params.get("rope_original_context") == 1
        return self.params.get("use_scaled_rope") is True and not is_linear

    def quantized_bits(self, args: ModelArgs, quantize: Bits | None) -> dict[str, Bits]:
        """The bits, by key, of the tensors that are quantized in the files or by ``quantize``."""
        specs = shard_specs(args)
        found = quantized_bits(specs, quantize)
        if self.quantization is not None:
            for key, spec in specs.items():
                layer = huggingface.huggingface_key(key).removesuffix(".weight")
                scheme = self.quantization.scheme(layer) if is_linear(key, spec) else None
                if scheme and not (self.tied and key == "output.weight"):
                    found[key] = scheme.bits
        return found

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file. Llama 2's is in the parent folder. Only tokenizer.json has the
        tokens that a fine-tune added or renamed.

        Raises:
            FileNotFoundError: there is none.
        """
        names = ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"]
        candidates = [self.folder / name for name in names]
        if self.layout == "native":
            candidates.append(self.folder.resolve().parent / "tokenizer.model")
        for path in candidates:
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"no tokenizer in {str(self.folder)!r} ({', '.join(names)}): give tokenizer_path, the "
            "tokenizer.model file that was downloaded with the weights"
        )

    def args(
        self,
        n_words: int,
        max_seq_len: int,
        max_batch_size: int,
        rope_scaling_factor: float | None = None,
    ) -> ModelArgs:
        """ModelArgs for a tokenizer of ``n_words`` and a cache of this size.

        Raises:
            ValueError: a value is impossible, the tokenizer belongs to another model, or
                ``max_seq_len`` exceeds the context.
        """
        params = dict(self.params)
        if params.get("vocab_size", -1) == -1:
            params["vocab_size"] = n_words
        if rope_scaling_factor is not None:
            if not self.is_llama31:
                raise ValueError(
                    f"rope_scaling_factor is {rope_scaling_factor}, but {str(self.folder)!r} isn't "
                    "a model with scaled RoPE (Llama 3.1 or later): leave it out"
                )
            params["rope_scaling_factor"] = rope_scaling_factor
        try:
            args = ModelArgs(**params, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        except ValueError as error:
            raise ValueError(f"{str(self.folder)!r} or an argument of build: {error}") from None
        # weights are often padded, to a multiple of up to 128, or of more for large vocabularies
        if not 0 <= args.vocab_size - n_words < max(128, n_words // 20):
            raise ValueError(wrong_tokenizer(self.folder, args.vocab_size, n_words))
        if self.context is not None and max_seq_len > self.context:
            raise ValueError(
                f"max_seq_len is {max_seq_len}, but this model was trained for at most "
                f"{self.context} tokens"
            )
        return args


def find_checkpoint(folder: str) -> Checkpoint:
    """Read the metadata of a folder.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError: params.json or config.json can't be read or describes another kind of model, or
            the folder holds an adapter.
    """
    folder = os.path.expanduser(folder)
    path = Path(folder)
    if not path.is_dir():
        found = ", but a file" if path.exists() else ""
        raise FileNotFoundError(
            f"no checkpoint folder at {folder!r}{found}: give ckpt_dir, the folder "
            "that holds the weights (consolidated.00.pth and params.json, or config.json and "
            "safetensors files), or the id owner/name of a model on the Hugging Face hub, to "
            "download it"
        )
    if files := sorted(path.glob("consolidated.*.pth")):
        _check_shard_names(folder, files)
        params = _read_params(path / "params.json")
        return Checkpoint(path, "native", files, params, _native_context(params), set())
    if files := huggingface.weight_files(path):
        config = huggingface.read_config(path / "config.json")
        stops = huggingface.stop_tokens(path)
        return Checkpoint(
            path,
            "hf",
            files,
            config.params,
            config.context,
            stops,
            config.tied,
            config.quantization,
        )
    if adapter := lora.describe(path):
        raise ValueError(
            f"{folder!r} holds {adapter}: give that model's folder as ckpt_dir, and a LoRA "
            "adapter's as adapter"
        )
    present = sorted(p.name for p in path.iterdir())
    raise FileNotFoundError(
        f"{folder!r} holds no consolidated.00.pth, and no config.json with safetensors files, but "
        f"{listed(present) or 'nothing'}: {_what_is_missing(path, present)}"
    )


def _what_is_missing(folder: Path, present: list[str]) -> str:
    endings = {name.rpartition(".")[2] for name in present}
    patterns = ("snapshots/*", "models--*/snapshots/*", "hub/models--*/snapshots/*")
    snapshots = [path for pattern in patterns for path in folder.glob(pattern)]
    if snapshots:
        found = " or ".join(sorted(repr(str(path)) for path in snapshots)[:10])
        return f"this is Hugging Face's cache: give the folder of a model in it, {found}"
    if parts := [*folder.glob("*.distcp"), *folder.glob("pytorch_model*/*.distcp")]:
        return (
            "these are parts of a torch.distributed.checkpoint (FSDP): have the training program "
            "save the whole model, or, if it used transformers or accelerate, run: accelerate "
            f"merge-weights {str(parts[0].parent)!r} OUTPUT, and copy the base model's config.json "
            "and tokenizer to OUTPUT"
        )
    by_torchtune = [name for name in present if re.fullmatch(r"meta_model_\d+\.pt", name)]
    if "params.json" in present and "config.json" not in present:  # its name since version 0.5
        by_torchtune += [name for name in present if name.endswith("model-00001-of-00001.bin")]
    if by_torchtune:
        return (
            "torchtune writes Meta's format under another name: rename "
            f"{' or '.join(map(repr, by_torchtune))} to consolidated.00.pth, next to the base "
            "model's params.json and tokenizer.model"
        )
    if any(re.fullmatch(r"hf_model_\d+_\d+\.pt", name) for name in present):  # before 0.5
        return (
            "torchtune wrote Hugging Face's format under another name: rename "
            "hf_model_NUMBER_EPOCH.pt, for the numbers of one epoch, to pytorch_model-NUMBER.bin, "
            "next to the base model's config.json and tokenizer"
        )
    if "original" in present:
        return f"Meta's files are in {str(folder / 'original')!r}"
    if "config.json" in present and endings & {"bin", "pt", "h5", "msgpack"}:
        return "these weights are in another format: download the safetensors files"
    if "config.json" in present:
        return "download the weights too (model*.safetensors)"
    if "safetensors" in endings:
        return "download Hugging Face's config.json too"
    if "gguf" in endings:
        return "llama.cpp's GGUF is not supported: download Meta's or Hugging Face's files"
    configs = ("params.json", "config.json")
    inner = [name for name in present if any((folder / name / c).is_file() for c in configs)]
    if inner:
        return f"give one of the folders in it, {listed(inner)}"
    return "expected a folder in Meta's native or in Hugging Face's layout"


def _check_shard_names(folder: str, shards: list[Path]) -> None:
    names = [shard.name for shard in shards]
    expected = [f"consolidated.{i:02d}.pth" for i in range(len(shards))]
    if names != expected:
        missing = sorted(set(expected) - set(names))
        raise FileNotFoundError(
            f"{folder!r} holds {listed(names)}, but not {listed(missing)}: download it again"
        )


def _read_params(path: Path) -> dict[str, Any]:
    found = read_json(path)
    known = ModelArgs.__dataclass_fields__.keys() - _OTHER_FIELDS
    params = {key: found[key] for key in found.keys() & known if found[key] is not None}
    unknown = {
        key: value
        for key, value in found.items()
        if key not in known | _OTHER_FIELDS and value not in _SWITCHED_OFF
    }
    if unknown.keys() & {"quantization_args", "lora_args"}:
        raise ValueError(
            f"{str(path)!r} describes quantized weights (quantization_args, lora_args), which are "
            "not supported: download the bfloat16 version"
        )
    if unknown:
        raise ValueError(
            f"{str(path)!r} has the unknown parameter(s) {listed(sorted(unknown))}, expected some "
            f"of {', '.join(sorted(known))}"
        )
    return params


def _native_context(params: Mapping[str, Any]) -> int | None:
    if params.get("use_scaled_rope") is True:
        return LLAMA31_CONTEXT if params.get("rope_original_context", 8192) == 8192 else None
    theta = params.get("rope_theta", LLAMA2_ROPE_THETA)
    return CONTEXTS.get(theta) if isinstance(theta, int | float) else None


def wrong_tokenizer(folder: Path, n_weights: int, n_words: int) -> str:
    return (
        f"{str(folder)!r} holds {n_weights} tokens, but the tokenizer has {n_words}: "
        "give the tokenizer.model that was downloaded with these weights"
    )
