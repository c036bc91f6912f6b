"""FOLDER TOKENIZER SIZE OUT: rank 1 lacks one of the paths; each rank writes its error."""

import os
import sys
from pathlib import Path

from llama import Llama

*paths, size, out = sys.argv[1:]
rank = int(os.environ["RANK"])
for missing in range(2):
    mine = [path if rank == 0 or i != missing else "nowhere" for i, path in enumerate(paths)]
    try:
        Llama.build(*mine, model_parallel_size=int(size), device="cpu")
    except Exception as error:
        Path(out, f"{missing}.{rank}").write_text(str(error))
