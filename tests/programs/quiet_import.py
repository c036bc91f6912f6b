"""Importing the package starts nothing, and imports no package of an extra."""

import sys

import torch

import llama

assert not torch.distributed.is_initialized()
assert "llama.serving" not in sys.modules

import llama.serving.structured  # noqa: E402
import llama.serving.tools  # noqa: E402, F401

extras = {
    *("transformers", "sentencepiece", "safetensors", "tokenizers", "huggingface_hub", "lm_eval"),
    *("fastapi", "uvicorn", "pydantic", "llguidance", "prompt_toolkit", "matplotlib"),
}
assert not extras & set(sys.modules), extras & set(sys.modules)
