"""FOLDER OUT: each rank writes the error of Llama.build to a file."""

import os
import sys
from pathlib import Path

from llama import Llama

try:
    Llama.build(sys.argv[1], device="cpu", quiet_ranks=False)
except Exception as error:
    Path(sys.argv[2], os.environ["RANK"]).write_text(str(error))
