"""The program of each rank in test_distributed.py; writes its results to a file.

torchrun --nproc_per_node N tests/worker.py CKPT_DIR OUT_DIR DTYPE
"""

import json
import os
import sys
from pathlib import Path

import torch

from llama import Llama

PROMPTS = [[7, 20, 300, 41, 5], [9], [500, 2, 600, 13, 14, 15, 88, 1], [3, 4, 3, 4]]


def results(llm: Llama) -> dict[str, object]:
    tokens, logprobs = llm.generate(PROMPTS, 12, temperature=0, logprobs=True, echo=True)
    batch = torch.tensor([PROMPTS[0], PROMPTS[2][:5]])
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "sampled": llm.generate(PROMPTS * 2, 12, temperature=1.0, top_p=0.9)[0],
        "text": llm.text_completion(["Once upon a time", "né"], temperature=0, max_gen_len=8),
        "logits": llm.model.forward(batch, 0)[:, -1].tolist(),
        "step": llm.model.forward(batch[:, :1], 5)[:, -1].tolist(),
    }


def main() -> None:
    folder, out, dtype = sys.argv[1:]
    print("started")
    rank = int(os.environ.get("RANK", "0"))
    # a different seed on each rank: only the first rank's may matter
    llm = Llama.build(folder, None, 64, 4, seed=1 + rank, dtype=dtype, device="cpu")
    print("built")
    before = results(llm)
    again = Llama.build(folder, None, 64, 4, seed=1 + 2 * rank, dtype=dtype, device="cpu")
    assert json.dumps(results(again)) == json.dumps(before), "a second build differs"
    assert torch.get_default_dtype() == torch.float32
    Path(out, f"rank{rank}.json").write_text(json.dumps(before))
    print("done")


if __name__ == "__main__":
    main()
