"""Load each folder, and print the error, time and peak memory."""

import json
import resource
import sys
import time

from llama import Llama

for folder in sys.argv[1:]:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        Llama.build(folder, max_seq_len=16, max_batch_size=1, device="cpu")
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    seconds = time.perf_counter() - start
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([seconds, kib, message]), flush=True)
