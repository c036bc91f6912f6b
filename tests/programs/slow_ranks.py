"""Loading, and pauses between and within calls, longer than the timeout."""

import os
import sys
import time

from llama import Llama, build

assert sys.stdin is None
rank, load = int(os.environ["RANK"]), build.load


def loading(*args, **kwargs):
    time.sleep(4 * rank)
    return load(*args, **kwargs)


build.load = loading
llm = Llama.build(sys.argv[1], None, 64, dtype="float32", device="cpu", rank_timeout=2)
time.sleep(4 * (1 - rank))
for step, _ in enumerate(llm.stream([[1, 2]], 5, temperature=0)):
    time.sleep(4 * rank * (step == 2))
print("finished")
