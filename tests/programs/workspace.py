"""Peak memory of generation, as a fraction of the planned cache and workspace."""

import sys
import threading
import time
from pathlib import Path

import torch

from llama import Llama, ModelArgs, Tokenizer, Transformer, accel, memory


def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


args = ModelArgs(
    dim=1024,
    n_layers=2,
    n_heads=16,
    n_kv_heads=4,
    vocab_size=1024,
    max_batch_size=4,
    max_seq_len=int(sys.argv[2]),
)
dtype = getattr(torch, sys.argv[1])
model = Transformer(args)
for p in model.parameters():
    p.fill_(0.01)
model = model.to(dtype)
if sys.argv[3] == "kept":
    accel.accelerate(model)
llm = Llama(model, Tokenizer(sys.argv[4]))
prompts = torch.randint(0, 1000, (4, args.max_seq_len - 8)).tolist()
llm.generate([[1]], 4)
peak, done, before = 0, False, rss()


def watch():
    global peak
    while not done:
        peak = max(peak, rss())
        time.sleep(0.001)


thread = threading.Thread(target=watch)
thread.start()
llm.generate(prompts, 4, temperature=0.5, logprobs=True, echo=sys.argv[5] == "scored")
done = True
thread.join()
plan = memory.plan(args, 1, dtype, model.device if sys.argv[3] == "kept" else None)
print((peak - before) / (plan.cache + plan.workspace))
