"""A random schedule of engine requests, run in process and by every rank in test_engine.py.

torchrun --nproc_per_node N tests/schedule.py CKPT_DIR OUT_DIR SEEDS
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from llama import Llama
from llama.request import Request
from llama.sampling import SamplingParams

SIZES: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 3, "max_prefill_tokens": 24}


def schedule(llm: Llama, seed: int) -> list[tuple[list[int], int, list[int], str | None]]:
    """Requests that join while others decode, some with a common prefix, some cancelled, more of
    them than slots.

    Returns:
        For each its prompt, max_gen_len, tokens and finish reason.
    """
    rng = random.Random(seed)
    engine = llm.engine
    prefixes = [[rng.randrange(768) for _ in range(n)] for n in (0, 12, 30)]
    requests: list[Request] = []
    n_left = 14
    while n_left or engine.is_busy:
        if n_left and rng.random() < 0.35:
            prompt = [*rng.choice(prefixes), *rng.choices(range(768), k=rng.randint(1, 40))]
            params = SamplingParams(max_gen_len=rng.randint(0, 25), temperature=0)
            request = engine.request(prompt, params, len(requests))
            engine.add([request])
            requests.append(request)
            n_left -= 1
        running = [request for request in requests if request.finish_reason is None]
        if running and rng.random() < 0.08:
            engine.cancel(rng.choice(running))
        engine.step()
    assert engine.slots.n_free == llm.model.params.max_batch_size
    return [(r.prompt, r.params.max_gen_len or 0, r.tokens, r.finish_reason) for r in requests]


def main() -> None:
    folder, out, seeds = sys.argv[1:]
    llm = Llama.build(folder, device="cpu", dtype="float32", **SIZES)
    results = [schedule(llm, seed) for seed in json.loads(seeds)]
    Path(out, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
