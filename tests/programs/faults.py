"""FOLDER VICTIM PLACE ACTION: rank VICTIM performs ACTION at PLACE.

Actions: kill, stop, raise; hide raises and catches it; nowhere gives the rank another folder; loop
runs until all ranks are ended.
"""

import os
import signal
import sys
import time

from llama import Llama, build
from llama.model import Transformer

folder, victim, place, action = sys.argv[1:]
if action == "nowhere" and os.environ["RANK"] == victim:
    folder = "nowhere"
passes, hidden, load = 0, Transformer.hidden, build.load


def reach(*names):
    if os.environ["RANK"] == victim and place in names:
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise KeyError("the fault")


def loading(*args, **kwargs):
    reach("load")
    return load(*args, **kwargs)


def passing(*args, **options):
    global passes
    passes += 1
    reach({1: "prefill", 5: "decode"}.get(passes))
    return hidden(*args, **options)


build.load, Transformer.hidden = loading, passing
os.write(1, f"process {os.getpid()}\n".encode())  # a single write
llm = Llama.build(folder, None, 64, 4, dtype="float32", device="cpu", rank_timeout=3)
reach("between")
try:
    llm.generate([[1, 2, 3], [4]], 20, temperature=0)
except KeyError:
    if action != "hide":
        raise
    time.sleep(100)
while action == "loop":
    print("running", flush=True)
    llm.generate([[1, 2, 3], [4]], 20, temperature=0)
print("finished")
