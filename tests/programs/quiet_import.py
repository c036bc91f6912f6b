"""Importing the package starts and imports nothing else."""

import sys

import torch

import llama  # noqa: F401

assert not torch.distributed.is_initialized()
assert not {"transformers", "sentencepiece", "safetensors"} & set(sys.modules)
