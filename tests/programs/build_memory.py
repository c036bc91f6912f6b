"""Peak memory of Llama.build above the baseline, as a multiple of the weights' size."""

import sys
import threading
import time
from pathlib import Path

import torch

from llama import Llama


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


torch.ones(8) @ torch.ones(8)
Llama.build(sys.argv[2], max_seq_len=8, dtype="float32", device="cpu")  # warm-up: imports
peak, done, before = 0, False, rss()


def watch():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.001)


thread = threading.Thread(target=watch)
thread.start()
llm = Llama.build(sys.argv[1], max_seq_len=8192, dtype=sys.argv[3], device="cpu")
peak = max(peak, rss())
done = True
thread.join()
weights = sum(p.nbytes for p in llm.model.parameters())
for p in llm.model.parameters():
    p.sum()
print((peak - before) / weights, weights, (rss() - before) / weights)
