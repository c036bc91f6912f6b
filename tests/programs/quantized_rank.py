"""Greedy tokens and log-probabilities of a rank with quantized weights."""

import json
import sys

from llama import Llama

folder, quantize = sys.argv[1:]
llm = Llama.build(
    folder, max_seq_len=64, max_batch_size=4, dtype="float32", device="cpu", quantize=quantize
)
print(json.dumps(llm.generate([[7, 20, 300, 5], [9]], 10, temperature=0, logprobs=True)))
