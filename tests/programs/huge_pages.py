"""Whether transparent huge pages are requested for the loaded weights."""

import sys
from pathlib import Path

from llama import Llama

llm = Llama.build(sys.argv[1], device="cpu", dtype="bfloat16")
address = llm.model.output.weight.data_ptr()
inside = False
for line in Path("/proc/self/smaps").read_text().splitlines():
    word = line.split()[0]
    if "-" in word and not word.endswith(":"):
        start, stop = (int(x, 16) for x in word.split("-"))
        inside = start <= address < stop
    elif inside and word == "VmFlags:":
        print("hg" in line.split())
