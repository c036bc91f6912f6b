"""Many calls of mixed sizes in one process: is memory flat, and the output the same at the end?

    PYTHONPATH=. python tests/soak.py [--calls 2000] [--ckpt_dir demo/model]

Prints one JSON line: the growth of resident memory in bytes per call (the slope of a line fitted
through the second half of the calls, and its standard error), and whether the first call's output
is reproduced after all the others.
"""

import json
import random
from pathlib import Path
from typing import Any

import fire

from llama import Llama

ROOT = Path(__file__).resolve().parents[1]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def slope(values: list[int]) -> tuple[float, float]:
    """Slope of the least-squares line over 0, 1, 2, ..., and its standard error."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = sum((i - middle) ** 2 for i in range(n))
    rise = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread
    rest = sum((v - mean - rise * (i - middle)) ** 2 for i, v in enumerate(values))
    return rise, (rest / (n - 2) / spread) ** 0.5


def one_call(llm: Llama, draw: random.Random) -> None:
    """A random kind of call with random prompts; some are abandoned or raise."""
    n_prompts, length = draw.randint(1, 9), draw.choice([1, 5, 20, 100, 200])
    prompts = [
        [draw.randrange(1000) for _ in range(draw.randint(1, length))] for _ in range(n_prompts)
    ]
    options: dict[str, Any] = {
        "temperature": draw.choice([0, 0.6, 1.5]),
        "top_p": draw.choice([0.1, 0.9, 1]),
        "logprobs": draw.random() < 0.5,
    }
    kind = draw.randrange(5)
    if kind == 0:
        llm.generate(prompts, draw.randint(0, 8), echo=draw.random() < 0.5, **options)
    elif kind == 1:
        llm.text_completion(["Once upon a time" * n_prompts], max_gen_len=8, **options)
    elif kind == 2:
        llm.chat_completion([[{"role": "user", "content": "Hi"}]], max_gen_len=8, **options)
    elif kind == 3:
        for step, _ in enumerate(llm.stream(prompts, 8, **options)):
            if step == 3:
                break
    else:
        try:
            llm.generate([[1], []], 8, **options)
        except ValueError:
            return
        raise AssertionError("an empty prompt passed")


def soak(calls: int = 2000, ckpt_dir: str = str(ROOT / "demo" / "model")) -> dict[str, Any]:
    llm = Llama.build(ckpt_dir, max_seq_len=256, max_batch_size=4, device="cpu")
    dialog: Any = [[{"role": "user", "content": "Tell me a story."}]] * 3

    def same() -> Any:
        return llm.chat_completion(dialog, max_gen_len=24, logprobs=True, seed=7)

    first, draw, resident = same(), random.Random(1), []
    for _ in range(calls):
        one_call(llm, draw)
        resident.append(resident_bytes())
    half = resident[calls // 2 :]
    rise, error = slope(half)
    return {
        "calls": calls,
        "bytes_per_call": round(rise, 1),
        "standard_error": round(error, 1),
        "resident_mib": [round(resident[i] / 2**20, 1) for i in (0, calls // 2, calls - 1)],
        "same_output": same() == first,
    }


if __name__ == "__main__":
    print(json.dumps(fire.Fire(soak, serialize=lambda _: None)))
