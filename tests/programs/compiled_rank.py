"""Greedy tokens of a rank, with and without torch.compile."""

import json
import sys

from llama import Llama

results = []
for compile in (False, True):
    llm = Llama.build(sys.argv[1], max_seq_len=64, dtype="float32", device="cpu", compile=compile)
    results.append(llm.generate([[7, 20, 300], [9]], 10, temperature=0)[0])
print(json.dumps(results))
