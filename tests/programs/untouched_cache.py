"""Memory that a KV cache takes before it is filled, and its isolation in a fork."""

import os
from pathlib import Path

import torch

from llama import ModelArgs, Transformer


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


torch.set_num_threads(1)  # threads do not survive a fork
args = ModelArgs(
    dim=128,
    n_layers=2,
    n_heads=16,
    n_kv_heads=8,
    vocab_size=64,
    multiple_of=64,
    max_batch_size=64,
    max_seq_len=8192,
)
model = Transformer(args)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
tokens = torch.tensor([[1, 2, 3]])
Transformer(ModelArgs(**{**vars(args), "max_batch_size": 1, "max_seq_len": 8}))(tokens, 0)
before = rss()
first = model(tokens, 0)
size = sum(cache.k.nbytes + cache.v.nbytes for cache in model.cache)
print((rss() - before) / size, size)
if os.fork() == 0:  # the child has its own cache
    for cache in model.cache:
        cache.k[0, :, :4] = 7
    os._exit(0)
os.wait()
print(bool((first[:, 2:] - model(tokens[:, 2:], 2)).abs().max() < 1e-5))
