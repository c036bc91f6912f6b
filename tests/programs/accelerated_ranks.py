"""Each rank's tokens and ways, with stand-ins for CUDA's kernel and capture. In the given case,
something is wrong on rank 1 only."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_fast import PROMPTS, documented_kernel

from llama import Llama, accel
from llama.accel import cuda
from llama.distributed import groups

folder, case = sys.argv[1:]
is_wrong = os.environ["RANK"] == "1"


def kernel(*args: Any, **kwargs: Any) -> Tensor:
    y = documented_kernel(*args, **kwargs)
    return 2 * y if is_wrong and case == "wrong kernel" else y


class Capture:
    """A replay runs the function again. As on CUDA, a capture doesn't run its collectives."""

    was_reset = False

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        self.logits = run()
        return self.logits

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        if is_wrong and case == "failed capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        output = torch.empty_like(self.logits)

        def replay() -> None:
            logits = run()
            output.copy_(2 * logits if is_wrong and case == "wrong replay" else logits)

        return replay, output

    def reset(self) -> None:
        self.was_reset = True


accel.why_not_flash = lambda *_: None
cuda._flash_kernel = kernel
llm = Llama.build(
    folder, max_seq_len=64, max_batch_size=4, dtype="float32", device="cpu", quiet_ranks=False
)
model: Any = llm.model
capture = Capture()
groups.reset_before_leaving(capture)
model.decode = cuda.GraphedStep(
    model, model.decode, any_length=False, capture=capture, ways=llm.ways
)
tokens = llm.generate(PROMPTS, 10, temperature=0)[0]
ways = {"attention": llm.ways.attention, "decode": llm.ways.decode}
capture.was_reset = False
destroy = dist.destroy_process_group


def show_and_destroy() -> None:
    """At exit, while the model is still in a global variable."""
    result = {"tokens": tokens, "was_reset": capture.was_reset, **ways}
    sys.stdout.write(json.dumps({"rank": int(os.environ["RANK"]), **result}) + "\n")
    destroy()


dist.destroy_process_group = show_and_destroy
