"""Greedy tokens and log-probabilities of a rank with quantized weights, in 8 and in 4 bits."""

import json
import sys

from llama import Llama

sizes = {"max_seq_len": 64, "max_batch_size": 4, "dtype": "float32", "device": "cpu"}
found = {}
for quantize in ("int8", "int4"):
    llm = Llama.build(sys.argv[1], **sizes, quantize=quantize)
    found[quantize] = llm.generate([[7, 20, 300, 5], [9]], 10, temperature=0, logprobs=True)
print(json.dumps(found))
