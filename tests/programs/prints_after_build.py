"""FOLDER: build twice, and print a character outside ASCII after each."""

import sys

from llama import Llama

for _ in range(2):
    Llama.build(sys.argv[1], model_parallel_size=1, device="cpu")
    print("after build", chr(0x2603))
