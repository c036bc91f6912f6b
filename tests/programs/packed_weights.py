"""Answers of the demo model with packed weights."""

import json
import sys

from llama import Llama
from llama.accel import cpu

cpu._MIN_WEIGHT_BYTES = 0
llm = Llama.build(sys.argv[1], max_seq_len=256, dtype="bfloat16", device="cpu")
print(
    json.dumps(
        [
            type(llm.model.output.linear).__name__,
            llm.chat_completion([[{"role": "user", "content": "What is 23 + 45?"}]], temperature=0)[
                0
            ]["generation"]["content"],
        ]
    )
)
