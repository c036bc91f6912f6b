"""Faster implementations of parts of the model, chosen once by device and dtype.

| device and dtype                       | linear layers     | attention | a decoding step       |
|----------------------------------------|-------------------|-----------|-----------------------|
| CPU with AMX, bfloat16                 | weight on the left| SDPA      | eager                 |
| CPU with AVX512-BF16 only, bfloat16    | packed weights    | SDPA      | eager                 |
| other CPUs and dtypes, MPS             | F.linear          | SDPA      | eager                 |
| CUDA from Ampere on, bfloat16, float16 | F.linear          | flash     | CUDA graph            |
| CUDA otherwise                         | F.linear          | SDPA      | CUDA graph per length |

``compile=True`` adds torch.compile to the decoding step. Measurements: benchmarks/README.md.
"""

import torch

from llama.accel.compile import compiled_decode
from llama.accel.cpu import choose_linear, keep_freed_memory
from llama.accel.cuda import GraphedStep, cuda_graph, flash_attention
from llama.accel.projection import join_projections
from llama.model import Attention, Transformer
from llama.pages import use_huge_pages


def accelerate(model: Transformer, *, compile: bool = False) -> None:
    """Replace linear layers, attention and ``decode`` of a model whose weights are loaded.

    Args:
        compile: compile the decoding step with torch.compile; the first takes up to a minute.
    """
    device = model.device
    if device.type == "cpu":
        keep_freed_memory()
        for parameter in model.parameters():
            use_huge_pages(parameter)
        choose_linear(model)
    flash = device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    flash = flash and torch.cuda.get_device_capability(device) >= (8, 0)
    if flash:
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.attend = flash_attention
    if device.type == "cuda":
        join_projections(model)
    if compile:
        model.decode = compiled_decode(model)  # type: ignore[method-assign, assignment]
    if device.type == "cuda":
        graphed = GraphedStep(model, model.decode, any_length=flash, capture=cuda_graph)
        model.decode = graphed  # type: ignore[method-assign]
