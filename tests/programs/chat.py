"""python -m llama chat, changed: chat.py CHANGES FOLDER ...; CHANGES are separated by commas.

endless: answers are "word word word ..." and end at max_seq_len; a step takes 10 ms.
dies: the second rank is killed in its tenth step.
plain: prompt_toolkit isn't installed.
"""

import os
import signal
import sys
import time

import torch

from llama import Llama, __main__, engine

changes, *arguments = sys.argv[1:]
if "plain" in changes:
    sys.modules["prompt_toolkit"] = None
if "endless" in changes:
    build = Llama.build

    def endless(*args, **kwargs):
        llm = build(*args, **kwargs)
        word = llm.tokenizer.encode(" word", bos=False, eos=False)[0]

        def sample(logits, temperature, top_p, generator):
            time.sleep(0.01)
            return torch.full(logits.shape[:1], word)

        llm.sample = sample
        return llm

    Llama.build = endless
if "dies" in changes and os.environ["RANK"] == "1":
    step, steps = engine.Engine.step, iter(range(10))

    def dying(self):
        if next(steps) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    engine.Engine.step = dying
sys.argv[1:] = ["chat", *arguments]
__main__.main()
