"""A decoding step, from the first layer to the logits, in one call of the C kernels.

The weights of each product replace everything in the processor's cache, so that the Python code and
the small operators between two products run slowly: they took a fifth of a step of a 1B model in 4
bits.
"""

import ctypes
from collections.abc import Callable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.module import _has_any_global_hook

from llama.accel import kernels
from llama.attention import attention
from llama.cache import Decode, KVCache
from llama.config import ModelArgs
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.hooks import is_unmodified
from llama.model import (
    Attention,
    FeedForward,
    RMSNorm,
    Transformer,
    TransformerBlock,
    project,
    rotate,
    swiglu,
)


class _Layer(ctypes.Structure):
    """``layer`` of csrc/types.h."""

    _fields_ = [
        *((name, kernels.Matrix) for name in "q k v o gate up down".split()),
        *((name, ctypes.c_void_p) for name in "attention_norm ffn_norm cache_k cache_v".split()),
    ]


class _Head(ctypes.Structure):
    """``head`` of csrc/types.h."""

    _fields_ = [
        *(("norm", ctypes.c_void_p), ("output", kernels.Matrix)),
        *(("bits", ctypes.c_int64), ("kind", ctypes.c_int64)),
    ]


class _Sizes(ctypes.Structure):
    """``sizes`` of csrc/types.h."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "dim n_heads n_kv_heads head_dim ffn_dim n_slots max_length bits kind cache_kind"
            ).split()
        ),
        ("eps", ctypes.c_double),
    ]


# The methods that the kernel replaces, and the functions that a module may have in their places.
_NAMES: dict[type, str] = {
    TransformerBlock: "forward",
    Attention: "forward as_pass update_cache project rotate attend",
    FeedForward: "forward compute",
    RMSNorm: "forward",
    ColumnParallelLinear: "forward",
    RowParallelLinear: "forward",
    KVCache: "allocate update",
    Transformer: "decode hidden",
}
_METHODS = [(cls, name) for cls, names in _NAMES.items() for name in names.split()]
_LOGITS = Transformer.logits
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")  # of a module's attributes
C_KERNELS = "C kernels"  # in ``Ways.decode``
_FUNCTIONS = (attention, kernels.decode_attention, project, rotate, swiglu)
# What may differ by instance, apart from parameters and modules.
_ATTRIBUTES: dict[type, Callable[[Any], object]] = {
    Attention: attrgetter("attend", "project", "rotate", "cache"),
    FeedForward: attrgetter("compute"),
    RMSNorm: attrgetter("eps"),
    ColumnParallelLinear: attrgetter("linear"),
    RowParallelLinear: attrgetter("linear"),
}
_LINEAR = ColumnParallelLinear, RowParallelLinear
_LIKE = torch.empty(0, dtype=torch.float32, device="cpu")


def _methods(model_class: type[Transformer]) -> list[object]:
    """The functions that the classes have as ``_METHODS`` now."""
    return [getattr(model_class if cls is Transformer else cls, name) for cls, name in _METHODS]


_REPLACED = _methods(Transformer)


def why_not(args: ModelArgs, n_ranks: int) -> str | None:
    """Why steps aren't one call, or None."""
    if n_ranks > 1:
        return "ranks sum their results in every layer"
    if not kernels.can_attend(args.head_dim):
        return f"the kernels don't support heads of size {args.head_dim}"
    return None


class KernelStep:
    """``Transformer.decode`` of a model on one rank, with activations in float32.

    Each step compares the modules with those of the step before. With hooks, patches, other classes
    or mixed formats, the modules run instead of the kernel: all of them, or only the last norm and
    the output layer if the kernel can compute the layers.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._seen: object = None
        self._layers: Any = None
        self._head: _Head | None = None
        self._sizes = _Sizes()
        self._watch()

    def __call__(self, tokens: Tensor, batch: Decode) -> Tensor:
        model, sizes = self._model, self._sizes
        if torch.is_grad_enabled() or not self._is_ready() or not self._use_caches():
            return type(model).decode(model, tokens, batch)
        head, n_rows = self._head, len(batch.positions)
        positions = batch.positions.long().contiguous()
        x = model.tok_embeddings(tokens).to(torch.float32, copy=True).view(n_rows, sizes.dim)
        rotations = torch.view_as_real(model.freqs_cis)[positions].float().contiguous()
        logits = x.new_empty(n_rows, head.output.n if head else 0)
        kernels.run(
            "decode_step",
            *(self._layers, len(self._layers), head and ctypes.byref(head), ctypes.byref(sizes)),
            *(x, n_rows, rotations.view(n_rows, sizes.head_dim), batch.slots.contiguous()),
            *(positions, batch.seqlens_k.int().contiguous(), logits),
        )
        return logits if head else model.logits(model.norm(x))

    def _is_ready(self) -> bool:
        """Whether the kernel can replace the layers as they are now."""
        if self._state() != self._seen:
            self._watch()
            self._layers = self._describe()
            self._seen = self._state()
        return self._layers is not None

    def _watch(self) -> None:
        """List what ``_state`` compares. The weights have just replaced everything in the
        processor's cache, so it should visit few objects."""
        model = self._model
        inner = [module for block in model.layers for module in block.modules()]
        last = [getattr(model, name, None) for name in ("norm", "output")]
        modules = [model, model.layers, *inner, *(x for x in last if isinstance(x, nn.Module))]
        self._modules: list[nn.Module] = modules
        self._attributes = [
            (get, [x for x in modules if type(x) is cls]) for cls, get in _ATTRIBUTES.items()
        ]
        self._children = [x._modules for x in modules if x._modules]
        self._parameters = [x._parameters for x in modules if x._parameters]
        self._vars = list(map(vars, modules))
        self._cache_vars = [vars(x.cache) for x in inner if type(x) is Attention]

    def _state(self) -> object:
        """Differs after a change of what ``_describe`` reads. A patched method is noticed by the
        number of a module's attributes."""
        own = type(self._model)
        parameters = chain.from_iterable(map(dict.values, self._parameters))
        return (
            bool(_has_any_global_hook()),
            own.logits,
            _methods(own),
            list(map(type, self._modules)),
            list(map(len, self._vars)),
            list(map(len, self._cache_vars)),
            list(map(len, chain.from_iterable(map(_HOOKS, self._vars)))),
            list(chain.from_iterable(map(dict.values, self._children))),
            [list(map(get, modules)) for get, modules in self._attributes],
            [(p.data_ptr(), p.dtype, p.shape, p.stride()) for p in parameters if p is not None],
        )

    def _describe(self) -> Any:
        """An array of ``_Layer`` without caches; None if the kernel can't compute the layers."""
        model, args = self._model, self._model.params
        blocks: list[Any] = list(model.layers)
        self._held: list[object] = []  # their memory is read
        self._caches: list[KVCache] = []
        if _methods(type(model)) != _REPLACED or _has_any_global_hook() or "hidden" in vars(model):
            return None
        layers, formats, eps = (_Layer * len(blocks))(), set(), set()
        dim, ffn_dim = args.dim, args.ffn_hidden_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_local_kv_heads(1) * args.head_dim
        for layer, block in zip(layers, blocks, strict=True):
            if type(block) is not TransformerBlock or not is_unmodified(block):
                return None
            attn, ffn = block.attention, block.feed_forward
            if (type(attn), type(ffn)) != (Attention, FeedForward):
                return None
            if "as_pass" in vars(attn) or "update_cache" in vars(attn):
                return None
            matrices: dict[str, tuple[Any, int, int]] = {
                "q": (attn.wq, q_dim, dim),
                "k": (attn.wk, kv_dim, dim),
                "v": (attn.wv, kv_dim, dim),
                "o": (attn.wo, dim, q_dim),
                "gate": (ffn.w1, ffn_dim, dim),
                "up": (ffn.w3, ffn_dim, dim),
                "down": (ffn.w2, dim, ffn_dim),
            }
            for name, (linear, *shape) in matrices.items():
                found = self._matrix(linear, shape)
                if found is None:
                    return None
                formats.add(found[0])
                setattr(layer, name, found[1])
            for name in ("attention_norm", "ffn_norm"):
                norm = getattr(block, name)
                if (address := self._norm(norm)) is None:
                    return None
                setattr(layer, name, address)
                eps.add(norm.eps)
            forms = attn.attend, attn.project, attn.rotate, ffn.compute
            if any(form not in _FUNCTIONS for form in forms) or type(attn.cache) is not KVCache:
                return None
            if "allocate" in vars(attn.cache) or "update" in vars(attn.cache):
                return None
            self._caches.append(attn.cache)
        if len(formats) != 1 or len(eps) != 1 or None in eps:
            return None
        sizes = self._sizes
        sizes.dim, sizes.ffn_dim, sizes.head_dim = dim, ffn_dim, args.head_dim
        sizes.n_heads, sizes.n_kv_heads = args.n_heads, args.n_local_kv_heads(1)
        (sizes.bits, sizes.kind), (sizes.eps,) = formats.pop(), eps
        self._head = self._describe_head()
        return layers

    def _describe_head(self) -> _Head | None:
        """The last norm and the output layer; None if the kernel can't compute them."""
        model, args = self._model, self._model.params
        norm: Any = getattr(model, "norm", None)
        output: Any = getattr(model, "output", None)
        if type(model).logits is not _LOGITS or "logits" in vars(model):
            return None
        if not all(isinstance(x, nn.Module) and is_unmodified(x) for x in (norm, output)):
            return None
        address, found = self._norm(norm), self._matrix(output, [args.vocab_size, args.dim])
        if address is None or found is None or norm.eps != self._sizes.eps:
            return None
        return _Head(address, found[1], *found[0])

    def _matrix(self, linear: Any, shape: list[int]) -> tuple[kernels.Form, kernels.Matrix] | None:
        """The weight of a linear layer; None if the kernel can't read it."""
        if type(linear) not in _LINEAR:
            return None
        weight = linear.weight if linear.linear is kernels.linear else linear.linear
        form: kernels.Form | None
        if type(weight) is kernels.TiledLinear:
            form, matrix = weight.form, weight.matrix
            self._held += [x.detach() for x in weight.parts if x is not None]
        elif isinstance(weight, nn.Parameter):
            form, matrix = kernels.half_form(weight), kernels.Matrix.of(weight)
            self._held.append(weight.detach())
        else:
            return None
        return None if form is None or [*weight.shape] != shape else (form, matrix)

    def _norm(self, norm: Any) -> int | None:
        """The address of an RMSNorm's weight; None if the kernel can't read it."""
        if type(norm) is not RMSNorm or not isinstance(norm.weight, nn.Parameter):
            return None
        weight = norm.weight.detach()
        is_dense = weight.dtype == torch.float32 and weight.is_contiguous() and weight.is_cpu
        if not is_dense or weight.shape != (self._model.params.dim,):
            return None
        self._held.append(weight)
        return weight.data_ptr()

    def _use_caches(self) -> bool:
        """Give the kernel the caches, which may have been freed or replaced."""
        sizes = self._sizes
        tensors: list[Tensor] = []
        for layer, cache in zip(self._layers, self._caches, strict=True):
            cache.allocate(_LIKE)  # the kernel's x is float32
            layer.cache_k, layer.cache_v = cache.k.data_ptr(), cache.v.data_ptr()
            tensors += cache.k, cache.v
        (shape, dtype, is_dense), *others = {(x.shape, x.dtype, x.is_contiguous()) for x in tensors}
        n_slots, n_kv_heads, max_length, head_dim = shape
        fits = (n_kv_heads, head_dim) == (sizes.n_kv_heads, sizes.head_dim)
        if others or not is_dense or not fits or dtype not in kernels.KINDS:
            return False
        sizes.n_slots, sizes.max_length = n_slots, max_length
        sizes.cache_kind = kernels.KINDS[dtype]
        increment_version(tensors)  # as if torch had written
        return True
