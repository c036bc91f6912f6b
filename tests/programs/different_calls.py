"""Rank 1 abandons a stream and begins the next call."""

import os
import sys

from llama import Llama

os.write(1, f"process {os.getpid()}\n".encode())  # a single write
llm = Llama.build(sys.argv[1], None, 64, dtype="float32", device="cpu", rank_timeout=2)
for step, _ in enumerate(llm.stream([[1, 2]], 20)):
    if os.environ["RANK"] == "1" and step == 3:
        break
llm.generate([[1, 2]], 20)
print("finished")
