"""Models in fairscale process groups that the caller has initialized."""

import os
import sys

import fairscale.nn.model_parallel.initialize as fairscale_groups
import torch
import torch.distributed as dist

from llama import Llama, ModelArgs, Tokenizer, Transformer

folder = sys.argv[1]
tokenizer = Tokenizer(folder + "/tokenizer.model")
args = ModelArgs(dim=64, n_layers=1, n_heads=4, vocab_size=1024, max_seq_len=32, max_batch_size=2)


def model():
    made = Transformer(args)
    for parameter in made.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    return made


def tokens(llm):
    return llm.generate([[1, 2], [7], [5]], 4, temperature=0)[0]


dist.init_process_group("gloo")
fairscale_groups.initialize_model_parallel(1)
replica = tokens(Llama(model(), tokenizer))
fairscale_groups.destroy_model_parallel()
fairscale_groups.initialize_model_parallel(2)
split = tokens(Llama(model(), tokenizer))
assert len(replica) == len(split) == 3
assert [len(row) for row in replica] == [len(row) for row in split] == [4] * 3

# a new process group after the first is destroyed, with its own prefix in torchrun's store
built = Llama.build(folder, None, 64, dtype="float32", device="cpu")
before = tokens(built)
dist.destroy_process_group()
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", store=dist.PrefixStore("new", store), rank=rank, world_size=size)
assert tokens(Llama.build(folder, None, 64, dtype="float32", device="cpu")) == before
os.write(1, b"finished\n")
