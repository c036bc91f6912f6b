"""Greedy tokens of CUDA ranks, with the model in a global variable until the process has ended."""

import json
import sys

from llama import Llama

llm = Llama.build(sys.argv[1], max_seq_len=64, dtype="float32", device="cuda")
tokens = llm.generate([[7, 20], [9]], 8, temperature=0)[0]
print(json.dumps([llm.ways.decode, tokens]))
