"""Read the weights that one rank needs from a checkpoint's files.

Rank and number of ranks are arguments, so nothing here needs a process group. Files aren't trusted:
only tensors are unpickled, and every key, shape and dtype is checked.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama.accel import kernels
from llama.checkpoint import huggingface
from llama.checkpoint.device_copy import BUFFER_BYTES, DeviceCopier, needs_staging
from llama.checkpoint.folder import Checkpoint, wrong_tokenizer
from llama.checkpoint.lora import LowRank, read_adapter
from llama.checkpoint.quantized import (
    StoredWeight,
    check_quantize,
    gather_quantized,
    read_part,
    valid_cuts,
)
from llama.checkpoint.sharding import (
    ShardSpec,
    Slices,
    copies,
    local_slices,
    n_bytes,
    narrow,
    quantized_bits,
    shard_specs,
)
from llama.checkpoint.tensor_files import FLOAT_DTYPES, is_plain, open_file
from llama.config import ModelArgs
from llama.files import expanded, listed
from llama.pages import release_freed_memory, release_pages, will_read_in_order
from llama.quantize import GROUP, Bits, QuantizedWeight

# In Llama 2's files, but not parameters: RoPE frequencies are computed from params.json.
IGNORED_KEYS = {"rope.freqs"}
_CHUNK_BYTES = 16 * 2**20
_QUANTIZE_BYTES = 2 * 2**20  # quantizing needs temporary tensors of many times this size


class Weights:
    """The memory-mapped tensors of a checkpoint; a shard is opened and checked on first use.

    Args:
        adapter: updates of tensors, by key; ``read`` and ``quantize`` add them, ``shard`` and
            ``pieces`` don't.

    Raises:
        ValueError: here or on a later read: a file can't be read, or doesn't match ``args``
            exactly; the message names the file.
    """

    def __init__(
        self, ckpt: Checkpoint, args: ModelArgs, adapter: Mapping[str, LowRank] | None = None
    ) -> None:
        if ckpt.n_shards not in args.valid_tp_sizes:
            raise ValueError(
                f"{str(ckpt.folder)!r} holds {ckpt.n_shards} shards, but params.json allows "
                f"{', '.join(map(str, args.valid_tp_sizes))}: files of another model?"
            )
        self.ckpt = ckpt
        self.args = args
        self.adapter = adapter or {}
        self.specs = shard_specs(args)
        self._shards: dict[int, dict[str, Tensor]] = {}
        self._quantized: dict[str, StoredWeight] = {}
        self._users: Counter[int] = Counter()
        self._dtypes: dict[str, torch.dtype] = {}
        self._stored_specs: dict[str, ShardSpec] | None = None
        self._copier: DeviceCopier | None = None

    def _map(self, i: int) -> tuple[str, dict[str, Any]]:
        """A shard's name and its content, unchecked."""
        ckpt = self.ckpt
        if ckpt.layout == "hf":
            contents = ((path, open_file(path)) for path in ckpt.files)
            tensors = huggingface.by_native_name(contents)
            if ckpt.quantization is not None:
                gather_quantized(tensors, self.specs, ckpt.quantization)
            if ckpt.tied and "tok_embeddings.weight" in tensors:
                tensors["output.weight"] = tensors["tok_embeddings.weight"]
            name = str(ckpt.folder)
        else:
            tensors, name = open_file(ckpt.files[i]), str(ckpt.files[i])
        if self._stored_specs is None:
            self._stored_specs = self._specs_of(tensors)
        return name, tensors

    def faults(self, i: int) -> list[str]:
        """All faults of a shard, including that it can't be read."""
        try:
            return list(self._faults(*self._map(i), i))
        except (OSError, ValueError) as error:
            return [str(error)]

    def shard(self, i: int) -> dict[str, Tensor]:
        """The tensors of one shard that aren't quantized, checked."""
        if i not in self._shards:
            name, tensors = self._map(i)
            if faults := list(self._faults(name, tensors, i)):
                more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
                raise ValueError("; ".join(faults[:10]) + more)
            quantized = {k: t for k, t in tensors.items() if isinstance(t, StoredWeight)}
            self._quantized |= quantized
            self._shards[i] = {k: tensors[k] for k in self.specs if k not in quantized}
            distinct = {id(tensor): tensor for tensor in self._shards[i].values()}.values()
            self._users.update(tensor.untyped_storage().data_ptr() for tensor in distinct)
        return self._shards[i]

    @property
    def quantized(self) -> dict[str, StoredWeight]:
        """The quantized tensors, checked. Only Hugging Face folders, of one shard, have some."""
        if self.ckpt.quantization is not None:
            self.shard(0)
        return self._quantized

    @property
    def valid_tp_sizes(self) -> list[int]:
        """The numbers of ranks that the tensors can be split over."""
        specs = [self.specs[key] for key in self.quantized]
        return valid_cuts(specs, self.args.valid_tp_sizes)

    def check_same_model(self) -> None:
        """Raise ValueError if the norms of two opened shards differ: they belong to different
        models of the same shape."""
        for i in sorted(self._shards.keys() - {0}):
            for key, spec in self.specs.items():
                if spec.axis is None and not torch.equal(self.shard(i)[key], self.shard(0)[key]):
                    first, other = self.ckpt.files[0].name, self.ckpt.files[i].name
                    raise ValueError(
                        f"{first} and {other} in {str(self.ckpt.folder)!r} are shards of two "
                        f"models ({key} differs): download them again"
                    )

    def pieces(self, key: str, n_ranks: int, rank: int) -> list[tuple[Tensor, Slices]]:
        """The pieces of a rank's part of a tensor: views of mapped tensors, and their slices."""
        self.shard(rank * self.ckpt.n_shards // n_ranks)
        assert self._stored_specs is not None
        pieces = copies(self._stored_specs[key], self.ckpt.n_shards, self.specs[key], n_ranks, rank)
        return [(narrow(self.shard(c.shard)[key], c.source), c.target) for c in pieces]

    def place(self, key: str, n_ranks: int, rank: int) -> tuple[object, ...]:
        """Identity of the data of a rank's part: equal for keys that share a stored tensor."""
        pieces = self.pieces(key, n_ranks, rank)
        views = tuple((t.data_ptr(), t.stride(), t.dtype, where) for t, where in pieces)
        return (*views, self.is_rotated(key), key if key in self.adapter else None)

    def read(
        self, key: str, n_ranks: int, rank: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A rank's part of a tensor: mapped if it needs no conversion, else copied in chunks, so
        that only the result stays in memory. On CUDA devices it is complete after ``finish``."""
        pieces = self.pieces(key, n_ranks, rank)
        first = pieces[0][0]
        is_stored = not self.is_rotated(key) and key not in self.adapter
        as_it_is = is_stored and first.dtype == dtype and device.type == "cpu"
        if len(pieces) == 1 and as_it_is and first.is_contiguous():
            return first
        part = local_slices(self.specs[key], n_ranks, rank)
        result = torch.empty([b - a for a, b in part], dtype=dtype, device=device)
        if needs_staging(device):
            self._copier = self._copier or DeviceCopier()
            for source, _ in pieces:
                will_read_in_order(source)
            for where, chunk in self.read_chunks(key, n_ranks, rank, BUFFER_BYTES):
                self._copier.copy(narrow(result, where), chunk)
            return result
        for where, chunk in self.read_chunks(key, n_ranks, rank):
            narrow(result, where).copy_(chunk)
        return result

    def read_quantized(
        self, key: str, n_ranks: int, rank: int, device: torch.device
    ) -> QuantizedWeight:
        """A rank's part of a quantized tensor: mapped if it needs no conversion.

        Raises:
            ValueError: a scale isn't finite.
        """
        stored, spec = self.quantized[key], self.specs[key]
        head_dim = self.args.head_dim if self.is_rotated(key) else None
        return read_part(stored, spec, local_slices(spec, n_ranks, rank), head_dim).to(device)

    def quantize(
        self, key: str, n_ranks: int, rank: int, bits: Bits, device: torch.device
    ) -> QuantizedWeight:
        """A rank's part of a linear layer's weight, quantized in chunks on ``device``, so that
        only the result stays in memory.

        Raises:
            ValueError: a value isn't finite.
        """
        (row, end_row), (column, end_column) = local_slices(self.specs[key], n_ranks, rank)
        n, k = end_row - row, end_column - column
        n_groups = -(-k // GROUP)
        packed = torch.empty(n, n_groups * bits, dtype=torch.int32, device=device)
        scale = torch.empty(n, n_groups, dtype=torch.bfloat16, device=device)
        for start, chunk in self._whole_rows(key, n_ranks, rank):
            # infinities and NaN stay in a sum
            if not chunk.sum(dtype=torch.float32).isfinite() and not chunk.isfinite().all():
                raise ValueError(
                    f"{self.stored_key(key)} in {str(self.ckpt.folder)!r} holds values that aren't "
                    "finite, which can't be quantized: download it again"
                )
            part = kernels.quantize(chunk.to(device), bits)
            packed[start : start + len(chunk)] = part.packed
            scale[start : start + len(chunk)] = part.scale
        return QuantizedWeight(bits, (n, k), packed, scale)

    def _whole_rows(self, key: str, n_ranks: int, rank: int) -> Iterator[tuple[int, Tensor]]:
        """Chunks of a rank's part of a matrix, of all its columns, and their first rows."""
        pieces = self.pieces(key, n_ranks, rank)
        (_, _), (column, end_column) = local_slices(self.specs[key], n_ranks, rank)
        if all(where[1] == (0, end_column - column) for _, where in pieces):
            for where, chunk in self.read_chunks(key, n_ranks, rank, _QUANTIZE_BYTES):
                yield where[0][0], chunk
            return
        # a group may be in two shards
        dtype = torch.float32 if key in self.adapter else pieces[0][0].dtype
        whole = self.read(key, n_ranks, rank, dtype, torch.device("cpu"))
        for start, stop in chunks(whole, _QUANTIZE_BYTES):
            yield start, whole[start:stop]

    def finish(self) -> None:
        """Wait until the tensors that were read are complete."""
        if self._copier is not None:
            self._copier.finish()

    def read_chunks(
        self, key: str, n_ranks: int, rank: int, chunk_bytes: int | None = None
    ) -> Iterator[tuple[Slices, Tensor]]:
        """Chunks of a rank's part of a tensor, in native order and with the adapter's update, and
        their slices. A chunk's mapped pages are released when the next one is asked for."""
        part = local_slices(self.specs[key], n_ranks, rank)
        low_rank = self.adapter.get(key)
        head_dim = self.args.head_dim if self.is_rotated(key) else None
        for source, ((row, _), *columns) in self.pieces(key, n_ranks, rank):
            if head_dim is not None:
                source = huggingface.halves_as_pairs(source, head_dim)
            for start, stop in chunks(source, chunk_bytes):
                stored = source[start:stop]
                chunk = stored if head_dim is None else stored.flatten(0, 2)
                n_rows = head_dim or 1
                where = ((row + start * n_rows, row + stop * n_rows), *columns)
                if low_rank is not None:
                    chunk = low_rank.merged(chunk, _shifted(where, part))
                yield where, chunk
                self.release(stored)

    def is_rotated(self, key: str) -> bool:
        """Whether the rows of a tensor are stored in Hugging Face's order."""
        return self.ckpt.layout == "hf" and huggingface.is_rotated(key)

    def stored_key(self, key: str) -> str:
        """A tensor's name in the files, for messages."""
        return huggingface.huggingface_key(key) if self.ckpt.layout == "hf" else key

    def release(self, source: Tensor) -> None:
        """Release the pages of a mapped piece, unless another tensor shares its storage."""
        if self._users[source.untyped_storage().data_ptr()] == 1:
            release_pages(source)

    def _specs_of(self, tensors: Mapping[str, Any]) -> dict[str, ShardSpec]:
        """How the files are split: Llama 2 splits the embedding on axis 1, Llama 3 on axis 0."""
        key = "tok_embeddings.weight"
        stored = dict(self.specs)
        tensor = tensors.get(key)
        by_columns = ShardSpec(self.specs[key].sizes, axis=1)
        columns = tuple(b - a for a, b in local_slices(by_columns, self.ckpt.n_shards, 0))
        if self.ckpt.n_shards > 1 and isinstance(tensor, Tensor) and tensor.shape == columns:
            stored[key] = by_columns
        return stored

    def _faults(self, name: str, tensors: Mapping[str, Any], shard: int) -> Iterator[str]:
        """All faults of a shard."""
        assert self._stored_specs is not None
        wanted = self._stored_specs
        if missing := wanted.keys() - tensors.keys():
            keys = listed(map(self.stored_key, sorted(missing)))
            yield f"{name!r} lacks {keys}: is {self._config_name} of another model?"
        if unknown := tensors.keys() - wanted.keys() - IGNORED_KEYS:
            keys = listed(map(self.stored_key, sorted(unknown)))
            what = f"{name!r} has the unknown key(s) {keys}"
            yield f"{what}: is {self._config_name} of another model?"
        output = tensors.get("output.weight")
        if isinstance(output, Tensor) and output.shape[1:] == (self.args.dim,):
            n_weights = len(output) * self.ckpt.n_shards
            if n_weights != self.args.vocab_size:
                given = self.ckpt.params.get("vocab_size", -1)
                if given == -1:
                    yield wrong_tokenizer(self.ckpt.folder, n_weights, self.args.vocab_size)
                else:
                    yield (
                        f"{self.stored_key('output.weight')} in {name!r} has {n_weights} rows, but "
                        f"{self._config_name} gives the vocab_size {given}: files of another model?"
                    )
                return
        for key, spec in wanted.items():
            if key not in tensors:
                continue
            tensor, shown = tensors[key], self.stored_key(key)
            if isinstance(tensor, StoredWeight):
                yield from tensor.faults(spec, name)
                continue
            if not is_plain(tensor):
                yield f"{shown} in {name!r} isn't a dense tensor: {type(tensor).__name__}"
                continue
            if (other := self._dtypes.setdefault(key, tensor.dtype)) != tensor.dtype:
                yield f"{shown} in {name!r} is {tensor.dtype}, but {other} in another shard"
            if tensor.dtype not in FLOAT_DTYPES:
                yield (
                    f"{shown} in {name!r} is {tensor.dtype}, expected bfloat16, float16, float32 "
                    "or float64: quantized weights are read only with a quantization_config"
                )
            shape = tuple(b - a for a, b in local_slices(spec, self.ckpt.n_shards, shard))
            if tensor.shape != shape:
                yield (
                    f"{shown} in {name!r} has the shape {tuple(tensor.shape)}, expected {shape}: "
                    f"is {self._config_name} of another model?"
                )

    @property
    def _config_name(self) -> str:
        return "params.json" if self.ckpt.layout == "native" else "config.json"


def load(
    ckpt: Checkpoint,
    args: ModelArgs,
    n_ranks: int,
    rank: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool,
    norm_dtype: torch.dtype | None = None,
    adapter: str | None = None,
    quantize: Bits | None = None,
    form: Callable[[QuantizedWeight], Any] = lambda weight: weight,
) -> dict[str, Any]:
    """One rank's tensors by key, on ``device``; those that aren't quantized with ``dtype``.

    A tensor that is stored once for two keys (Llama 3.2's embedding is its output layer) is loaded
    once, unless the output layer is quantized.

    Args:
        progress: show a progress bar on stderr if loading takes more than a second.
        norm_dtype: of the norms; default ``dtype``.
        adapter: the folder of a LoRA adapter to merge.
        quantize: quantize the linear layers after the rank's cut; those that are quantized in the
            folder stay as they are.
        form: converts each quantized weight after it is read, so that only one is in memory twice.

    Raises:
        FileNotFoundError: ``adapter`` or a file in it is missing.
        ValueError: a file can't be read or doesn't match ``args``; the message names it. The folder
            is quantized, and ``quantize`` gives other bits, an adapter is to be merged, or
            ``n_ranks`` would split a group.
    """
    check_quantize(ckpt, quantize, adapter)
    updates = None if adapter is None else read_adapter(expanded(adapter), args)
    weights = Weights(ckpt, args, updates)
    if weights.quantized and n_ranks not in weights.valid_tp_sizes:
        raise ValueError(
            f"{str(ckpt.folder)!r} is quantized ({ckpt.quantization}), and {n_ranks} ranks would "
            f"split groups of {GROUP} columns (possible: {listed(weights.valid_tp_sizes)})"
        )
    bits = quantized_bits(weights.specs, quantize)
    loaded: dict[str, Any] = {}
    same: dict[Any, str] = {}  # key by identity of the stored data
    with tqdm(
        total=sum(n_bytes(spec, n_ranks, dtype) for spec in weights.specs.values()),
        desc=f"Loading {ckpt.folder.name}",
        unit="B",
        unit_scale=True,
        delay=1,
        disable=not progress,
    ) as bar:
        for key, spec in weights.specs.items():
            if key in weights.quantized:
                loaded[key] = form(weights.read_quantized(key, n_ranks, rank, device))
                weights.quantized[key].release()
            elif key in bits:
                loaded[key] = form(weights.quantize(key, n_ranks, rank, bits[key], device))
            elif (twin := same.setdefault(weights.place(key, n_ranks, rank), key)) == key:
                wanted = norm_dtype if spec.axis is None and norm_dtype else dtype
                loaded[key] = weights.read(key, n_ranks, rank, wanted, device)
            else:
                loaded[key] = loaded[twin]
            if key in weights.quantized or key in bits:
                # the intermediate forms: as holes in the heap, they would add half of the weights
                release_freed_memory()
            bar.update(n_bytes(spec, n_ranks, dtype))
    weights.finish()
    weights.check_same_model()
    return loaded


def _shifted(inner: Slices, outer: Slices) -> Slices:
    """Slices of a part of a tensor, as slices of the tensor."""
    return tuple((a + c, b + c) for (a, b), (c, _) in zip(inner, outer, strict=True))


def chunks(tensor: Tensor, chunk_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """Split the first axis into chunks that span about ``chunk_bytes`` (16 MiB) of the file."""
    step = max(1, (chunk_bytes or _CHUNK_BYTES) // max(1, tensor.stride(0) * tensor.element_size()))
    for start in range(0, len(tensor), step):
        yield start, min(start + step, len(tensor))
