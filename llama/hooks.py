"""Forward hooks: detect them and other changes that users make to a model, and use them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_unmodified(module: nn.Module) -> bool:
    """Whether a module and its submodules run their classes' forward without hooks. Only then may
    an equivalent implementation replace them."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules()
    )


def fingerprint(model: nn.Module) -> int | None:
    """A hash that changes when weights, submodules or their attributes are replaced, or weights
    are changed in place; None if the model has hooks.

    Changes through ``parameter.data`` aren't detected: they bypass the version counter.
    """
    if not is_unmodified(model):
        return None
    parts: list[object] = []
    for module in model.modules():
        if module is not model:  # whose attributes include the cache
            parts += map(id, vars(module).values())
    for parameter in model.parameters():
        parts += (id(parameter), parameter.data_ptr(), version(parameter))
    return hash(tuple(parts))


def version(tensor: Tensor) -> int:
    """Counts in-place changes; inference tensors have no counter."""
    return 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def hidden_states(model: Any, tokens: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
    """See ``Llama.hidden_states``."""
    modules = [model.tok_embeddings, *list(model.layers)[:-1], model.norm]
    if layers is None:
        layers = range(len(modules))
    for layer in layers:
        if not 0 <= layer < len(modules):
            raise ValueError(f"layers has {layer}, expected 0 to {len(modules) - 1}")
    outputs: dict[int, Tensor] = {}
    handles = [
        modules[layer].register_forward_hook(
            lambda _module, _input, output, layer=layer: outputs.update({layer: output})
        )
        for layer in set(layers)
    ]
    try:
        model(tokens, 0)
    finally:
        for handle in handles:
            handle.remove()
    # copies: a probe can't be trained on the inference tensors of the pass
    return [outputs[layer].clone() for layer in layers]
