"""Calls whose arguments differ between ranks; each rank prints its errors."""

import os
import sys

import torch

from llama import Llama

rank = int(os.environ["RANK"])


def failing(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def build(**arguments):
    arguments |= {"dtype": "float32", "device": "cpu", "quiet_ranks": False}
    return Llama.build(sys.argv[1], None, **arguments)


said = [
    failing(lambda: build(model_parallel_size=1 + rank)),
    failing(lambda: build(max_seq_len=64 + rank)),
    failing(lambda: build(adapter=f"adapter{rank}")),
]
llm = build(max_seq_len=64, max_batch_size=4)
for arguments in (
    {"prompt_tokens": [[1, 2 + rank]]},
    {"prompt_tokens": [[1]] * (1 + rank)},
    {"max_gen_len": 3 + rank},
    {"temperature": 0.5 + rank},
    {"echo": bool(rank)},
):
    arguments = {"prompt_tokens": [[1, 2]], "max_gen_len": 3, **arguments}
    said.append(failing(lambda arguments=arguments: llm.generate(**arguments)))
said.append(failing(lambda: llm.score([([1] * (1 + rank), [1] * (3 - rank))])))
said.append(failing(lambda: llm.score([([1, 2], [3 + rank])])))
pairs = [([1], [1]), ([2], [2])]
said.append(failing(lambda: llm.score(pairs[:: 1 - 2 * rank])))  # in another order
said.append(failing(lambda: llm.model.forward(torch.tensor([[1, 2 + rank]]), 0)))
said.append(failing(lambda: llm.model.forward(torch.tensor([[1] * (1 + rank)]), 0)))
os.write(1, f"{said}\n".encode())  # a single write
os.write(1, f"and then {llm.generate([[1, 2]], 3, temperature=0)[0]}\n".encode())
