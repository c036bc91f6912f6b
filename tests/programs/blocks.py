"""A rank that calls the blocks as the published code does, for Transformer.forward's logits."""

import sys

import torch

from llama import Llama

llm = Llama.build(sys.argv[1], None, 64, dtype="float32", device="cpu")
model = llm.model
tokens = torch.tensor([[7, 20, 300, 41, 5, 9], [500, 2, 600, 13, 14, 15]])


def logits(start, end, mask):
    h = model.tok_embeddings(tokens[:, start:end])
    for layer in model.layers:
        h = layer(h, start, model.freqs_cis[start:end], mask)
    return model.output(model.norm(h)).float()


causal = torch.full((4, 4), float("-inf")).triu(1)
ours = torch.cat([logits(0, 4, causal), logits(4, 5, None), logits(5, 6, None)], dim=1)
expected = model.forward(tokens, 0)
print(ours.shape == expected.shape, bool((ours - expected).abs().max() < 1e-4))
