"""Checkpoint folders: what they hold, and the part of it that one rank needs.

A native folder holds ``consolidated.00.pth`` ... ``consolidated.{M-1:02d}.pth``, a dict of tensors
for each of M model-parallel ranks, and ``params.json``. A Hugging Face folder is read as one shard
(see huggingface.py). Either runs on any number of ranks N that divides the model: a shard and a
rank's part are both boxes, cut out of the full tensor, and a rank reads where its box overlaps the
shards'. Rank and size are arguments here, so nothing needs a process group. Files are not trusted:
only tensors are unpickled, and every key, shape and dtype is checked.
"""

import ctypes
import dataclasses
import mmap
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from llama import huggingface, pth_safety
from llama.files import check_regular, listed, read_json, summary, what_to_do
from llama.model import ModelArgs

# In Llama 2's files, and no parameter: RoPE's frequencies follow from params.json.
IGNORED_KEYS = {"rope.freqs"}
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# params.json of Llama 2 has no rope_theta: 10000 is what it was trained with.
LLAMA2_ROPE_THETA = 10000.0
# Longest context each generation was trained for, told by its rotary embedding.
LLAMA31_CONTEXT = 131072
CONTEXTS = {10000.0: 4096, 500000.0: 8192}
# Native folders do not say how far RoPE is stretched: 8, but 32 in Llama 3.2, told by its shapes.
LLAMA32_SCALING = 32.0
LLAMA32_SHAPES = ((2048, 16), (3072, 28))  # dim, n_layers
_CHUNK_BYTES = 16 * 2**20

# --- Shapes, and how they are cut -------------------------------------------------------------


class Cut(NamedTuple):
    """A tensor's sizes, and how it is cut for the ranks.

    Attributes:
        axis: the axis that is cut; None if every rank holds the whole.
        unit: it is cut in multiples of this: a head stays in one piece.
    """

    sizes: tuple[int, ...]
    axis: int | None
    unit: int = 1


# A part of a tensor: start and stop of every axis.
Box = tuple[tuple[int, int], ...]

# Megatron's scheme: what makes more numbers is cut by its outputs (rows), what makes fewer of them
# by its inputs (columns).
_LAYER_CUTS = {
    "attention.wq": ("heads", "dim", 0),
    "attention.wk": ("kv_heads", "dim", 0),
    "attention.wv": ("kv_heads", "dim", 0),
    "attention.wo": ("dim", "heads", 1),
    "feed_forward.w1": ("ffn", "dim", 0),
    "feed_forward.w2": ("dim", "ffn", 1),
    "feed_forward.w3": ("ffn", "dim", 0),
    "attention_norm": ("dim", None),
    "ffn_norm": ("dim", None),
}
_CUTS = {
    "tok_embeddings": ("vocab", "dim", 0),  # but by its columns in the files of Llama 2
    "norm": ("dim", None),
    "output": ("vocab", "dim", 0),
}


def cuts(args: ModelArgs) -> dict[str, Cut]:
    """Every tensor of the model by its key, as ranks hold it."""
    head = args.head_dim
    units = {"heads": head, "kv_heads": head}
    sizes = {
        "heads": args.n_heads * head,
        "kv_heads": args.kv_heads * head,
        "dim": args.dim,
        "ffn": args.ffn_hidden_dim,
        "vocab": args.vocab_size,
    }

    def cut(*names_and_axis: Any) -> Cut:
        *names, axis = names_and_axis
        unit = 1 if axis is None else units.get(names[axis], 1)
        return Cut(tuple(sizes[name] for name in names), axis, unit)

    modules = {name: cut(*rule) for name, rule in _CUTS.items()}
    for i in range(args.n_layers):
        modules |= {f"layers.{i}.{name}": cut(*rule) for name, rule in _LAYER_CUTS.items()}
    return {f"{name}.weight": found for name, found in modules.items()}


def box(cut: Cut, n_ranks: int, rank: int) -> Box:
    """The part of a tensor that one of ``n_ranks`` holds. With more ranks than units (key/value
    heads) neighbours hold the same one, so that each has the head that its query heads share."""
    spans = [(0, size) for size in cut.sizes]
    if cut.axis is not None:
        n_units = cut.sizes[cut.axis] // cut.unit
        start = rank * n_units // n_ranks
        stop = max(start + 1, (rank + 1) * n_units // n_ranks)
        spans[cut.axis] = (start * cut.unit, stop * cut.unit)
    return tuple(spans)


class Read(NamedTuple):
    """A piece to copy: where it is in a shard's tensor, and where it comes to in the rank's."""

    shard: int
    source: Box
    target: Box


def reads(source: Cut, n_shards: int, target: Cut, n_ranks: int, rank: int) -> list[Read]:
    """The pieces that make up a rank's part of a tensor which is in ``n_shards``.

    What several shards hold is read from the one that is nearest to the rank, so that with as many
    ranks as shards each opens its own.
    """
    wanted = box(target, n_ranks, rank)
    seen: set[Box] = set()
    found = []
    for i in range(n_shards):
        shard = (rank * n_shards // n_ranks + i) % n_shards
        held = box(source, n_shards, shard)
        common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(held, wanted, strict=True))
        if held in seen or any(a >= b for a, b in common):
            continue
        seen.add(held)
        found.append(Read(shard, _relative(common, held), _relative(common, wanted)))
    return found


def _relative(part: Box, whole: Box) -> Box:
    return tuple((a - c, b - c) for (a, b), (c, _) in zip(part, whole, strict=True))


def take(tensor: Tensor, part: Box) -> Tensor:
    """View of a part of a tensor."""
    return tensor[tuple(slice(a, b) for a, b in part)]


# --- Folders ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder says of itself before any weights are read.

    Attributes:
        layout: "native", or "hf" for Hugging Face's.
        files: the shards, or the safetensors files.
        params: fields of ModelArgs. vocab_size is -1 or missing where the tokenizer is to say it.
        context: the longest context the model was trained for, in tokens; None if it is not known.
        stop_tokens: ids that end a generation beside the tokenizer's own.
        tied: the embedding is the output layer too.
    """

    folder: Path
    layout: Literal["native", "hf"]
    files: list[Path]
    params: dict[str, Any]
    context: int | None
    stop_tokens: set[int]
    tied: bool = False

    @property
    def n_shards(self) -> int:
        return len(self.files) if self.layout == "native" else 1

    @property
    def is_llama31(self) -> bool:
        """Whether this is Llama 3.1 or later: told by its rotary embedding."""
        return self.params.get("use_scaled_rope") is True

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file. Llama 2's is in the parent folder.

        Raises:
            FileNotFoundError: there is none.
        """
        names = ["tokenizer.model", "original/tokenizer.model", "tokenizer.json"]
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
            ValueError: a value is impossible, the tokenizer is another model's, or ``max_seq_len``
                is longer than the context.
        """
        params = dict(self.params)
        if params.get("vocab_size", -1) == -1:
            params["vocab_size"] = n_words
        if rope_scaling_factor is not None:
            if not self.is_llama31:
                raise ValueError(
                    f"rope_scaling_factor is {rope_scaling_factor}, but {str(self.folder)!r} is no "
                    "model with scaled rotary embeddings (Llama 3.1 or later): leave it out"
                )
            params["rope_scaling_factor"] = rope_scaling_factor
        try:
            args = ModelArgs(**params, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        except ValueError as error:
            raise ValueError(f"{str(self.folder)!r} or an argument of build: {error}") from None
        if args.vocab_size != n_words:
            raise ValueError(_wrong_tokenizer(self.folder, args.vocab_size, n_words))
        if self.context is not None and max_seq_len > self.context:
            raise ValueError(
                f"max_seq_len is {max_seq_len}, but this model was trained for at most "
                f"{self.context} tokens"
            )
        return args


def find(folder: str) -> Checkpoint:
    """Read what a folder says of itself.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: params.json or config.json cannot be read or describes something else.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(
            f"no checkpoint folder at {folder!r}: give ckpt_dir, the folder that holds the weights "
            "(consolidated.00.pth and params.json, or config.json and safetensors files)"
        )
    if files := sorted(path.glob("consolidated.*.pth")):
        _check_shard_names(folder, files)
        params = _read_params(path / "params.json")
        return Checkpoint(path, "native", files, params, _native_context(params), set())
    if files := huggingface.weight_files(path):
        config = huggingface.read_config(path / "config.json")
        stops = huggingface.stop_tokens(path)
        return Checkpoint(path, "hf", files, config.params, config.context, stops, config.tied)
    present = sorted(p.name for p in path.iterdir())
    raise FileNotFoundError(
        f"{folder!r} holds no consolidated.00.pth, and no config.json with safetensors files, but "
        f"{listed(present) or 'nothing'}: {_what_is_missing(path, present)}"
    )


def _what_is_missing(folder: Path, present: list[str]) -> str:
    endings = {name.rpartition(".")[2] for name in present}
    if "original" in present:
        return f"Meta's files are in {str(folder / 'original')!r}"
    if "config.json" in present and endings & {"bin", "pt", "h5", "msgpack"}:
        return "these are older Hugging Face weights: download the safetensors files"
    if "config.json" in present:
        return "download the weights too (model*.safetensors)"
    if "safetensors" in endings:
        return "download Hugging Face's config.json too"
    if "gguf" in endings:
        return "llama.cpp's GGUF is not supported: download Meta's or Hugging Face's files"
    inner = [name for name in present if (folder / name / "params.json").is_file()]
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
    known = ModelArgs.__dataclass_fields__.keys() - {"max_seq_len", "max_batch_size"}
    if "quantization_args" in found:
        raise ValueError(
            f"{str(path)!r} describes quantized weights (quantization_args), which are not "
            "supported: download the bfloat16 version"
        )
    if unknown := sorted(found.keys() - known):
        raise ValueError(
            f"{str(path)!r} has the unknown parameter(s) {listed(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    params = {"rope_theta": LLAMA2_ROPE_THETA} | found
    is_llama32 = (params.get("dim"), params.get("n_layers")) in LLAMA32_SHAPES
    if params.get("use_scaled_rope") is True and is_llama32:
        params = {"rope_scaling_factor": LLAMA32_SCALING} | params
    return params


def _native_context(params: Mapping[str, Any]) -> int | None:
    if params.get("use_scaled_rope") is True:
        return LLAMA31_CONTEXT
    theta = params["rope_theta"]
    return CONTEXTS.get(theta) if isinstance(theta, int | float) else None


def _wrong_tokenizer(folder: Path, n_weights: int, n_words: int) -> str:
    return (
        f"{str(folder)!r} was trained on {n_weights} tokens, but the tokenizer has {n_words}: "
        "give the tokenizer.model that was downloaded with these weights"
    )


# --- Weights ----------------------------------------------------------------------------------


class Weights:
    """The mapped tensors of a checkpoint; a shard is opened when it is first needed, and checked.

    Raises:
        ValueError: here or at a read: a file cannot be read, or does not hold exactly what ``args``
            describe; the message says where.
    """

    def __init__(self, found: Checkpoint, args: ModelArgs) -> None:
        if found.n_shards not in args.rank_counts:
            raise ValueError(
                f"{str(found.folder)!r} holds {found.n_shards} shards, but params.json describes "
                f"a model that is cut in {', '.join(map(str, args.rank_counts))}: files of another "
                "model?"
            )
        self.found = found
        self.args = args
        self.cuts = cuts(args)
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._users: Counter[int] = Counter()
        self._dtypes: dict[str, torch.dtype] = {}
        self._stored_cuts: dict[str, Cut] | None = None

    def _map(self, i: int) -> tuple[str, dict[str, Any]]:
        """A shard's name and what is in it, unchecked."""
        found = self.found
        if found.layout == "hf":
            tensors: dict[str, Any] = huggingface.open_tensors(found.files)
            if found.tied and "tok_embeddings.weight" in tensors:
                tensors["output.weight"] = tensors["tok_embeddings.weight"]
            name = str(found.folder)
        else:
            tensors, name = _open(found.files[i]), str(found.files[i])
        if self._stored_cuts is None:
            self._stored_cuts = self._cuts_of(tensors)
        return name, tensors

    def faults(self, i: int) -> list[str]:
        """Everything in which a shard is not what it must be; also that it cannot be read."""
        try:
            return list(self._faults(*self._map(i), i))
        except (OSError, ValueError) as error:
            return [str(error)]

    def shard(self, i: int) -> dict[str, Tensor]:
        """The tensors of one shard, checked."""
        if i not in self._shards:
            name, tensors = self._map(i)
            if faults := list(self._faults(name, tensors, i)):
                more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
                raise ValueError("; ".join(faults[:10]) + more)
            self._shards[i] = {key: tensors[key] for key in self.cuts}
            distinct = {id(tensor): tensor for tensor in self._shards[i].values()}.values()
            self._users.update(tensor.untyped_storage().data_ptr() for tensor in distinct)
        return self._shards[i]

    def check_same_model(self) -> None:
        """Raise ValueError if a shard that was opened repeats other norms than the first one: they
        come from two models of the same shape."""
        for i in sorted(self._shards.keys() - {0}):
            for key, cut in self.cuts.items():
                if cut.axis is None and not torch.equal(self.shard(i)[key], self.shard(0)[key]):
                    first, other = self.found.files[0].name, self.found.files[i].name
                    raise ValueError(
                        f"{first} and {other} in {str(self.found.folder)!r} are shards of two "
                        f"models, {key} is not the same: download them again"
                    )

    def pieces(self, key: str, n_ranks: int, rank: int) -> list[tuple[Tensor, Box]]:
        """What makes up a rank's part of a tensor: views of mapped tensors, and where they go."""
        self.shard(rank * self.found.n_shards // n_ranks)
        assert self._stored_cuts is not None
        found = reads(self._stored_cuts[key], self.found.n_shards, self.cuts[key], n_ranks, rank)
        return [(take(self.shard(r.shard)[key], r.source), r.target) for r in found]

    def place(self, key: str, n_ranks: int, rank: int) -> tuple[object, ...]:
        """Where the numbers of a rank's part are: equal for two keys of one tensor."""
        pieces = self.pieces(key, n_ranks, rank)
        views = tuple((t.data_ptr(), t.stride(), t.dtype, where) for t, where in pieces)
        return (*views, self.is_rotated(key))

    def read(
        self, key: str, n_ranks: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A rank's part of a tensor. What is right as it is stays mapped; else a copy is made,
        chunk by chunk, and the mapped pages are given back, so that memory holds the result."""
        pieces = self.pieces(key, n_ranks, rank)
        head_dim = self.args.head_dim if self.is_rotated(key) else None
        first = pieces[0][0]
        as_it_is = first.dtype == dtype and device.type == "cpu" and head_dim is None
        if len(pieces) == 1 and as_it_is and first.is_contiguous():
            return first
        part = box(self.cuts[key], n_ranks, rank)
        result = torch.empty([b - a for a, b in part], dtype=dtype, device=device)
        for source, where in pieces:
            target = take(result, where)
            if head_dim is not None:
                target = target.unflatten(0, (-1, head_dim // 2, 2))
                source = huggingface.halves_as_pairs(source, head_dim)
            for start, stop in chunks(source):
                target[start:stop].copy_(source[start:stop])
                self.release(source[start:stop])
        return result

    def is_rotated(self, key: str) -> bool:
        """Whether the rows of a tensor are stored in Hugging Face's order."""
        return self.found.layout == "hf" and huggingface.is_rotated(key)

    def release(self, source: Tensor) -> None:
        """Give back the memory of a mapped piece that has been read for the last time."""
        if self._users[source.untyped_storage().data_ptr()] == 1:
            _release_pages(source)

    def _cuts_of(self, tensors: Mapping[str, Any]) -> dict[str, Cut]:
        """How the files are cut: Llama 2's hold columns of the embedding, Llama 3's hold rows."""
        key = "tok_embeddings.weight"
        stored = dict(self.cuts)
        tensor = tensors.get(key)
        by_columns = Cut(self.cuts[key].sizes, axis=1)
        columns = tuple(b - a for a, b in box(by_columns, self.found.n_shards, 0))
        if self.found.n_shards > 1 and isinstance(tensor, Tensor) and tensor.shape == columns:
            stored[key] = by_columns
        return stored

    def _faults(self, name: str, tensors: Mapping[str, Any], shard: int) -> Iterator[str]:
        """Everything in which a shard is not what it must be."""

        assert self._stored_cuts is not None
        wanted = self._stored_cuts
        if missing := wanted.keys() - tensors.keys():
            yield f"{name!r} lacks {listed(sorted(missing))}: does {self._says} belong to it?"
        if unknown := tensors.keys() - wanted.keys() - IGNORED_KEYS:
            keys = listed(sorted(unknown, key=str))
            yield f"{name!r} has the unknown key(s) {keys}: does {self._says} belong to it?"
        output = tensors.get("output.weight")
        if isinstance(output, Tensor) and output.shape[1:] == (self.args.dim,):
            n_weights = len(output) * self.found.n_shards
            if n_weights != self.args.vocab_size:
                yield _wrong_tokenizer(self.found.folder, n_weights, self.args.vocab_size)
                return
        for key, cut in wanted.items():
            if key not in tensors:
                continue
            tensor = tensors[key]
            if not _is_plain(tensor):
                yield f"{key} in {name!r} is no dense tensor: {type(tensor).__name__}"
                continue
            if (other := self._dtypes.setdefault(key, tensor.dtype)) != tensor.dtype:
                yield f"{key} in {name!r} is {tensor.dtype}, but {other} in another shard"
            if tensor.dtype not in FLOAT_DTYPES:
                yield (
                    f"{key} in {name!r} is {tensor.dtype}, expected bfloat16, float16, float32 or "
                    "float64: quantized checkpoints are not supported"
                )
            shape = tuple(b - a for a, b in box(cut, self.found.n_shards, shard))
            if tensor.shape != shape:
                yield (
                    f"{key} in {name!r} has the shape {tuple(tensor.shape)}, expected {shape}: "
                    f"does {self._says} belong to it?"
                )

    @property
    def _says(self) -> str:
        return "params.json" if self.found.layout == "native" else "config.json"


def load(
    found: Checkpoint,
    args: ModelArgs,
    n_ranks: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
) -> dict[str, Tensor]:
    """One rank's tensors by their keys, with ``dtype`` and on ``device``.

    A tensor that the files hold twice (Llama 3.2's embedding is its output layer) is loaded once
    where they say so.

    Args:
        progress: show a bar on stderr if it takes more than a second.

    Raises:
        ValueError: the files cannot be read or do not hold exactly this; the message says where.
    """
    weights = Weights(found, args)
    loaded: dict[str, Tensor] = {}
    same: dict[Any, str] = {}  # keys by where their numbers are
    with tqdm(
        total=sum(n_bytes(cut, n_ranks, dtype) for cut in weights.cuts.values()),
        desc=f"Loading {found.folder.name}",
        unit="B",
        unit_scale=True,
        delay=1,
        disable=not progress,
    ) as bar:
        for key, cut in weights.cuts.items():
            twin = same.setdefault(weights.place(key, n_ranks, rank), key)
            loaded[key] = (
                weights.read(key, n_ranks, rank, dtype, device) if twin == key else loaded[twin]
            )
            bar.update(n_bytes(cut, n_ranks, dtype))
    weights.check_same_model()
    return loaded


def n_bytes(cut: Cut, n_ranks: int, dtype: torch.dtype) -> int:
    """Size of a rank's part of a tensor, in bytes."""
    size = dtype.itemsize
    for a, b in box(cut, n_ranks, 0):
        size *= b - a
    return size


def chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Cut the first axis so that a chunk spans about 16 MiB of the file."""
    step = max(1, _CHUNK_BYTES // max(1, tensor.stride(0) * tensor.element_size()))
    for start in range(0, len(tensor), step):
        yield start, min(start + step, len(tensor))


def _is_plain(tensor: Any) -> bool:
    """Whether the numbers of a tensor lie in memory as they are, each of them."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_neg()
        and tensor.untyped_storage().nbytes() >= tensor.nbytes
    )


# --- Native files -------------------------------------------------------------------------------


def _open(path: Path) -> dict[str, Any]:
    try:
        check_regular(path)
        with path.open("rb") as file:
            byte_order = pth_safety.check(file)
            # by its descriptor: the path may lead to another file by now
            opened = f"/dev/fd/{file.fileno()}"
            tensors = torch.load(opened, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except pth_safety.UnsafeFileError as error:
        raise ValueError(
            f"{str(path)!r} was not loaded: {error}; expected a dict of dense tensors. Compare it "
            "with checklist.chk, and ask where it came from"
        ) from None
    except MemoryError as error:
        raise MemoryError(f"{str(path)!r} asks for more memory than there is") from error
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise ValueError(
            f"{str(path)!r} is no readable checkpoint ({summary(error)}): {what_to_do(path)}"
        ) from error
    if byte_order != sys.byteorder:  # torch would have swapped the pages that we give back
        raise ValueError(
            f"{str(path)!r} is {byte_order!r:.20}-endian and this machine {sys.byteorder!r}: save "
            "it again on a machine like this one"
        )
    if not isinstance(tensors, dict):
        raise ValueError(f"{str(path)!r} holds a {type(tensors).__name__}, expected a dict")
    return tensors


def _release_pages(tensor: Tensor) -> None:
    """Tell the system that the mapped pages from a tensor's first to its last number are not needed
    any more. They come from the file again if they are."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    stop = tensor.data_ptr() + (last + 1) * tensor.element_size()
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
        )
