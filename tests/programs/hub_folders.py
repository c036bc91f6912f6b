"""ID...: the files of each model's local folder, or its error, as a line of JSON."""

import json
import os
import sys

from llama.checkpoint import hub

for model_id in sys.argv[1:]:
    try:
        print(json.dumps(sorted(os.listdir(hub.local_folder(model_id)))))
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
