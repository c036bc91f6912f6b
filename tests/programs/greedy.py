"""Greedy tokens and logits, with the number of threads of the environment."""

import json
import sys

import torch

from llama import Llama

llm = Llama.build(sys.argv[1], max_seq_len=128, dtype=sys.argv[2], device="cpu")
tokens = llm.generate([[1, 2, 3, 4, 5], [9], [7, 20, 300, 11]], 100, temperature=0)[0]
logits = llm.model.forward(torch.arange(40)[None], 0)
print(json.dumps([torch.get_num_threads(), tokens, logits.flatten().tolist()]))
