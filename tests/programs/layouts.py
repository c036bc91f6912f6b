"""Build every folder in turn; the first rank writes the results of each to a file."""

import json
import os
import sys
from pathlib import Path

from llama import Llama

out, prompts, n_tokens, *folders = sys.argv[1:]
results = {}
for folder in folders:
    llm = Llama.build(folder, max_seq_len=128, max_batch_size=5, dtype="float32", device="cpu")
    texts = json.loads(prompts)
    tokens = [llm.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    dialogs = [[{"role": "user", "content": text}] for text in texts]
    answers = llm.chat_completion(dialogs, temperature=0) if "?" in prompts else []
    rows = llm.generate(tokens, int(n_tokens), temperature=0, echo=True)[0]
    results[folder] = {
        "tokens": rows,
        "texts": [llm.tokenizer.decode(row) for row in rows],
        "answers": [answer["generation"]["content"] for answer in answers],
    }
    print("one more", folder)
if os.environ.get("RANK", "0") == "0":
    Path(out).write_text(json.dumps(results))
