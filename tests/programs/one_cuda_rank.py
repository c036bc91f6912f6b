"""FOLDER: the device of the weights, and greedy tokens."""

import json
import sys

from llama import Llama

llm = Llama.build(sys.argv[1], max_seq_len=64, dtype="float32")
tokens = llm.generate([[7, 20]], 8, temperature=0)[0]
print(json.dumps([str(llm.model.output.weight.device), tokens]))
