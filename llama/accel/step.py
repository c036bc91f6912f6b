"""The layers of a decoding step in one call of the C kernels.

The weights of each product replace everything in the processor's cache, so that the Python code and
the small operators between two products run slowly: they took a fifth of a step of a 1B model in 4
bits.
"""

import ctypes
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
_METHODS = {cls: {name: getattr(cls, name) for name in _NAMES[cls].split()} for cls in _NAMES}
C_KERNELS = "C kernels"  # in ``Ways.decode``
_FUNCTIONS = (attention, kernels.decode_attention, project, rotate, swiglu)
# Their objects may differ by instance.
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    Attention: ("attend", "project", "rotate", "cache"),
    FeedForward: ("compute",),
    ColumnParallelLinear: ("linear",),
    RowParallelLinear: ("linear",),
}
_LIKE = torch.empty(0, dtype=torch.float32, device="cpu")


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
    or mixed formats, the modules run instead of the kernel.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._modules: list[nn.Module] = []
        self._seen: object = None
        self._layers: Any = None
        self._sizes = _Sizes()
        self._held: list[object] = []

    def __call__(self, tokens: Tensor, batch: Decode) -> Tensor:
        model, sizes = self._model, self._sizes
        if torch.is_grad_enabled() or not self._is_ready() or not self._use_caches():
            return type(model).decode(model, tokens, batch)
        n_rows, positions = len(batch.positions), batch.positions.long().contiguous()
        x = model.tok_embeddings(tokens).to(torch.float32, copy=True).view(n_rows, sizes.dim)
        rotations = torch.view_as_real(model.freqs_cis)[positions].float().contiguous()
        kernels.run(
            "decode_layers",
            *(self._layers, len(self._layers), ctypes.byref(sizes), x, n_rows),
            rotations.view(n_rows, sizes.head_dim),
            *(batch.slots.contiguous(), positions, batch.seqlens_k.int().contiguous()),
        )
        return model.logits(model.norm(x))

    def _is_ready(self) -> bool:
        """Whether the kernel can replace the layers as they are now."""
        state = self._state()
        if state is not None and state != self._seen:
            self._layers = self._describe()
            state = self._seen = self._state()
        return state is not None and self._layers is not None

    def _state(self) -> object:
        """Differs after a change of what ``_describe`` reads; None if methods were replaced, or
        have hooks."""
        model = self._model
        for cls, methods in _METHODS.items():
            own = type(model) if cls is Transformer else cls
            if any(getattr(own, name) is not method for name, method in methods.items()):
                return None
        if "hidden" in vars(model) or _has_any_global_hook():
            return None
        found: list[object] = [id(model.layers)]
        for module in self._modules:
            values = vars(module)
            if values["_forward_hooks"] or values["_forward_pre_hooks"] or "forward" in values:
                return None
            found += (type(module), values.get("eps"))
            found += map(id, values["_modules"].values())
            found += [id(values.get(name)) for name in _ATTRIBUTES.get(type(module), ())]
            for p in values["_parameters"].values():
                if p is not None:
                    found += (p.data_ptr(), p.dtype, p.shape, p.stride())
            if isinstance(linear := values.get("linear"), kernels.TiledLinear):
                found += [None if x is None else x.data_ptr() for x in linear.parts]
            if (cache := values.get("cache")) is not None:
                patched = "as_pass" in values or "update_cache" in values
                if patched or "allocate" in vars(cache) or "update" in vars(cache):
                    return None
        return found

    def _describe(self) -> Any:
        """An array of ``_Layer`` without caches; None if the kernel can't compute the layers."""
        model, args = self._model, self._model.params
        blocks: list[Any] = list(model.layers)
        inner = [module for block in blocks for module in block.modules()]
        self._modules, self._held = [model.layers, *inner], []
        if not all(type(module) in _METHODS for module in inner):
            return None
        layers, formats, eps = (_Layer * len(blocks))(), set(), set()
        dim, ffn_dim = args.dim, args.ffn_hidden_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_local_kv_heads(1) * args.head_dim
        for layer, block in zip(layers, blocks, strict=True):
            attn, ffn = block.attention, block.feed_forward
            if (type(block), type(attn), type(ffn)) != (TransformerBlock, Attention, FeedForward):
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
                weight = linear.weight if linear.linear is kernels.linear else linear.linear
                if type(weight) is kernels.TiledLinear:
                    form: kernels.Form | None = weight.form
                    matrix = weight.matrix
                    self._held += [x.detach() for x in weight.parts if x is not None]
                elif isinstance(weight, Tensor):
                    form, matrix = kernels.half_form(weight), kernels.Matrix.of(weight)
                else:
                    return None
                if form is None or [*weight.shape] != shape:
                    return None
                formats.add(form)
                setattr(layer, name, matrix)
                self._held.append(weight.detach() if isinstance(weight, Tensor) else weight)
            for name in ("attention_norm", "ffn_norm"):
                norm = getattr(block, name)
                weight = norm.weight.detach()
                is_dense = weight.dtype == torch.float32 and weight.is_contiguous()
                if not is_dense or weight.shape != (dim,):
                    return None
                setattr(layer, name, weight.data_ptr())
                eps.add(norm.eps)
                self._held.append(weight)
            forms = attn.attend, attn.project, attn.rotate, ffn.compute
            if any(form not in _FUNCTIONS for form in forms) or type(attn.cache) is not KVCache:
                return None
        if len(formats) != 1 or len(eps) != 1 or None in eps:
            return None
        sizes = self._sizes
        sizes.dim, sizes.ffn_dim, sizes.head_dim = dim, ffn_dim, args.head_dim
        sizes.n_heads, sizes.n_kv_heads = args.n_heads, args.n_local_kv_heads(1)
        (sizes.bits, sizes.kind), (sizes.eps,) = formats.pop(), eps
        return layers

    def _use_caches(self) -> bool:
        """Give the kernel the caches, which may have been freed or replaced."""
        sizes, blocks = self._sizes, list[Any](self._model.layers)
        tensors: list[Tensor] = []
        for layer, block in zip(self._layers, blocks, strict=True):
            cache = block.attention.cache
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
