"""Faster implementations of parts of the model, chosen once by device and dtype.

| device and dtype                       | linear layers     | attention | a decoding step       |
|----------------------------------------|-------------------|-----------|-----------------------|
| CPU with AMX, bfloat16                 | weight on the left| SDPA      | eager                 |
| other CPUs, bfloat16, float16          | C kernels         | C kernels | C kernels             |
| CPU in float32, MPS                    | F.linear          | SDPA      | eager                 |
| CUDA from Ampere on, bfloat16, float16 | q, k, v in one    | flash     | CUDA graph            |
| CUDA otherwise, ROCm                   | q, k, v in one    | SDPA      | CUDA graph per length |

``cuda.why_not_flash`` has all conditions of flash attention. It, each CUDA graph and the rotation
of ``projection`` are checked on the device (``selfcheck``); if that fails, the plain form runs.
``compile=True`` adds torch.compile to the decoding step. Measurements: benchmarks/README.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from llama.accel import kernels, step
from llama.accel.compile import compiled_decode
from llama.accel.cpu import (
    activation_dtype,
    choose_linear,
    keep_freed_memory,
    linear_form,
    use_float32_activations,
)
from llama.accel.cuda import CudaCapture, GraphedStep, flash_attention, why_not_flash
from llama.accel.projection import JOINT, check_rotation, join_projections
from llama.accel.selfcheck import agree, check_attention, warn
from llama.accel.tinygemm import use_tinygemm
from llama.accel.ways import Ways, why_off
from llama.config import ModelArgs
from llama.distributed import collectives
from llama.model import Attention, Transformer
from llama.pages import use_huge_pages
from llama.quantize import Bits, QuantizedLinear, QuantizedWeight

__all__ = ["Ways", "accelerate", "choose", "quantized_form", "warn_missing_kernels"]
__all__ += ["ways", "why_off"]


def choose(
    args: ModelArgs,
    n_ranks: int,
    dtype: torch.dtype,
    device: torch.device,
    bits: Bits | None = None,
) -> tuple[Ways, str | None]:
    """The forms for a model, without its weights; and why FlashAttention failed its self-check, if
    it did. ``bits``: of its quantized layers."""
    chosen = Ways(decode="CUDA graph" if device.type == "cuda" else "eager")
    chosen.linear, reason = linear_form(device, dtype)
    if bits is not None and device.type == "cpu":
        chosen.linear = f"int{bits}, {kernels.form() or 'dequantized in every call'}"
        reason = kernels.why_not()
    if reason:
        chosen.reasons["linear"] = reason
    if device.type == "cuda":
        fault = check_rotation(args.head_dim, dtype, device)
        if fault is None:
            chosen.linear = JOINT
        else:
            chosen.reasons["linear"] = f"the joint rotation failed its self-check: {fault}"
    activations = activation_dtype(device, dtype)
    is_in_kernels = activations != dtype or (bits is not None and dtype == torch.float32)
    if device.type == "cpu" and is_in_kernels and kernels.instruction_set() is not None:
        reason = step.why_not(args, n_ranks)
        if reason:
            chosen.reasons["decode"] = reason
        else:
            chosen.decode = step.C_KERNELS
    if activations != dtype:
        chosen.activations = "float32"
        if kernels.can_attend(args.head_dim):
            chosen.attention = "SDPA, C kernels in decoding steps"
            return chosen, None
    fault = None
    reason = why_not_flash(args.head_dim, dtype, device)
    if reason is None:
        fault = check_attention(flash_attention, args, n_ranks, dtype, device)
        reason = fault and f"FlashAttention failed its self-check: {fault}"
    if reason is None:
        chosen.attention = "FlashAttention"
    else:
        chosen.reasons["attention"] = reason
    return chosen, fault


_warned: set[str] = set()


def warn_missing_kernels(model: Transformer) -> None:
    """Warn once per process, on the first rank, if there are no kernels for this CPU."""
    reason = None if kernels.is_switched_off() else kernels.why_not()
    if reason is not None and reason not in _warned:
        _warned.add(reason)
        warn(f"{reason}. Slower forms run: {ways(model)}", collectives.world)


def is_quantized(layer: Any) -> bool:
    """Whether a module is a linear layer that holds a quantized weight."""
    return getattr(layer, "weight", layer) is None


def quantized_form(device: torch.device, off: str | None) -> Callable[[QuantizedWeight], Any]:
    """The form in which a quantized linear layer keeps its weight."""
    is_tiled = device.type == "cpu" and off is None and kernels.instruction_set() is not None
    return kernels.TiledLinear.of if is_tiled else QuantizedLinear


def accelerate(model: Transformer, *, compile: bool = False, off: str | None = None) -> None:
    """Replace linear layers, attention and ``decode`` of a model whose weights are loaded. All
    ranks call it together.

    Args:
        compile: compile the decoding step with torch.compile; the first takes up to a minute.
        off: the reason why nothing is replaced, if so.
    """
    if off is not None:
        vars(model)["ways"] = Ways.plain(off)
        return
    device = model.device
    with collectives.raise_on_all_ranks():
        modules: list[Any] = list(model.modules())
        bits = min((x.linear.bits for x in modules if is_quantized(x)), default=None)
        dtype = model.tok_embeddings.weight.dtype
        chosen, fault = choose(model.params, model.groups.size, dtype, device, bits)
        if device.type == "cpu":
            keep_freed_memory()
            for parameter in model.parameters():
                use_huge_pages(parameter)
            choose_linear(model)
            if chosen.activations:
                use_float32_activations(model)
    reason = agree(chosen.reasons.get("attention"), collectives.world)
    fault = agree(fault, collectives.world)
    if reason is not None:
        chosen.attention, chosen.reasons["attention"] = "SDPA", reason
    if fault is not None:
        warn(
            f"FlashAttention failed its self-check ({fault}): SDPA runs instead", collectives.world
        )
    flash = chosen.attention == "FlashAttention"
    if flash:
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.attend = flash_attention
    if chosen.linear == JOINT:
        join_projections(model)
    if device.type != "cpu" and (reason := use_tinygemm(model)):
        chosen.reasons["linear"] = reason
    if compile:
        model.decode = compiled_decode(model)  # type: ignore[method-assign, assignment]
        chosen.decode = "compiled"
    elif chosen.decode == step.C_KERNELS:
        model.decode = step.KernelStep(model)  # type: ignore[method-assign]
    else:
        chosen.decode = "eager"
    if device.type == "cuda" and model.groups.size > 1 and model.groups.control is None:
        # ranks couldn't agree on a failed capture
        chosen.reasons["decode"] = "CUDA graphs need process groups that Llama.build made"
    elif device.type == "cuda":
        model.decode = GraphedStep(  # type: ignore[method-assign]
            model, model.decode, any_length=flash, capture=CudaCapture(device), ways=chosen
        )
    vars(model)["ways"] = chosen


def ways(model: Transformer) -> Ways:
    """The forms that run in ``model``. Forward hooks and patches replace them by the plain ones."""
    chosen: Ways = vars(model).get("ways") or Ways()
    # copies of a model don't have its decode, see Transformer.__getstate__
    return chosen if "decode" in vars(model) else dataclasses.replace(chosen, decode="eager")
