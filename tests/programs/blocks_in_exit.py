"""Rank 1 ends without the call that rank 0 makes, and blocks in its exit with open connections, as
NCCL does."""

import os
import sys
import time

from llama import Llama
from llama.distributed import collectives

os.write(1, f"process {os.getpid()}\n".encode())  # a single write
llm = Llama.build(sys.argv[1], None, 64, dtype="float32", device="cpu", rank_timeout=2)
if os.environ["RANK"] == "0":
    llm.generate([[1, 2]], 20)
    print("finished")
else:
    collectives.watchdog.stop()
    time.sleep(120)
