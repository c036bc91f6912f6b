"""FOLDER [OPTIONS]: Llama.build on the CPU; OPTIONS are keyword arguments as JSON."""

import json
import sys

from llama import Llama

Llama.build(sys.argv[1], device="cpu", **json.loads((sys.argv[2:] or ["{}"])[0]))
print("after build")
print("imported", *({"safetensors", "transformers"} & set(sys.modules)))
