"""A rank's peak memory in Llama.build, as a multiple of its shard's size."""

import os
import sys
import threading
import time
from pathlib import Path

from llama import Llama


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


folder, warm, dtype, out = sys.argv[1:]
Llama.build(warm, max_seq_len=8, dtype=dtype, device="cpu", quiet_ranks=False)
peak, done, before = 0, False, rss()


def watch():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.001)


thread = threading.Thread(target=watch)
thread.start()
llm = Llama.build(folder, warm + "/tokenizer.model", max_seq_len=8, dtype=dtype, device="cpu")
peak = max(peak, rss())
done = True
thread.join()
weights = sum(p.nbytes for p in llm.model.parameters())
Path(out, os.environ["RANK"]).write_text(f"{(peak - before) / weights} {weights}")
