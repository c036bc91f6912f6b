"""Prompts distributed over replicas; each rank writes its results to a file."""

import json
import os
import sys
from pathlib import Path

from llama import Llama

folder, out, size = sys.argv[1:]
options = {"model_parallel_size": int(size), "dtype": "float32", "device": "cpu"}
llm = Llama.build(folder, max_batch_size=2, **options)
prompts = [[7, 20, 300], [9], [500, 2, 600, 13], [3, 4], [5, 5, 5, 5, 5]]
counted = []
hidden = llm.model.hidden


def counting(tokens, batch):
    counted.append(set(batch.slots.tolist()))
    return hidden(tokens, batch)


llm.model.hidden = counting
seen = llm.inspect([7, 20, 300])
results = {
    "inspected": [
        seen.hidden_states.tolist(),
        seen.attentions.tolist(),
        seen.logit_lens().tolist(),
    ],
    "greedy": [llm.generate(prompts[:n], 9, temperature=0) for n in range(6)],
    "scored": llm.generate(prompts, 4, temperature=0, logprobs=True, echo=True),
    "pairs": [
        [score.logprobs, score.ranks]
        for score in llm.score([(prompts[i % 5], [i, 7]) for i in range(9)], top_logprobs=1)
    ],
    "equal": llm.generate([[1, 2]] * 4, 12, temperature=1.5, top_p=1.0, seed=3)[0],
    "again": llm.generate([[1, 2]] * 4, 12, temperature=1.5, top_p=1.0, seed=3)[0],
    "streamed": [e.token for events in llm.stream(prompts, 5, temperature=0) for e in events],
}
counted.clear()
llm.generate(prompts[:2], 1, temperature=0)
results["rows"] = [len(rows) for rows in counted]
counted.clear()
llm.score([(prompt, [1]) for prompt in prompts])
results["n_scored"] = sum(map(len, counted))  # sequences in passes
try:
    llm.generate([[1], [2], [99999]], 3)
except ValueError as error:
    results["error"] = str(error)
Path(out, os.environ.get("RANK", "0")).write_text(json.dumps(results))
