"""Models of the Hugging Face hub by id, as in "meta-llama/Llama-3.2-1B-Instruct".

Downloads, the cache and the token are the library huggingface_hub's.
"""

import os
import re
from pathlib import Path
from types import ModuleType

from llama.checkpoint import huggingface
from llama.files import summary

# The hub's own rule, so that other names are never asked for.
_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
_ALWAYS = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
# In order of preference; a repository may hold the same weights as both.
_WEIGHTS = (
    ["*.safetensors", huggingface.INDEX],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
)


def local_folder(ckpt_dir: str) -> str:
    """``ckpt_dir`` itself or, if nothing is there and it is a hub id, the folder of the model in
    the hub's cache, which is downloaded if needed.

    Raises:
        FileNotFoundError: the hub has no such model, it has no weights in Hugging Face's layout, or
            it isn't in the cache and the hub can't be reached.
        ImportError: the package huggingface_hub is missing.
        OSError: the download failed.
        PermissionError: the model is gated.
    """
    model_id = os.fspath(ckpt_dir)
    if os.path.lexists(model_id) or not _ID.fullmatch(model_id):
        return ckpt_dir
    hub = _import_hub(model_id)
    for weights in _WEIGHTS:
        # Asking twice, instead of listing the files first, also works from the cache alone. Native
        # files in original/ would double the download, and in a pattern * includes slashes.
        patterns = {"allow_patterns": [*_ALWAYS, *weights], "ignore_patterns": ["*/*"]}
        try:
            folder = hub.snapshot_download(model_id, **patterns)
        except Exception as error:
            # without the cause: httpx quotes headers that it rejects, with the token
            raise _explained(model_id, error, hub) from None
        if any(Path(folder).glob(weights[0])):
            return folder
    raise FileNotFoundError(
        f"the hub's {model_id!r} has neither {_WEIGHTS[0][0]} nor {_WEIGHTS[1][0]} at its top "
        "level (offline: the cache has neither). For Meta's native files, give a folder: "
        f"hf download {model_id} --local-dir {model_id.partition('/')[2]}"
    )


def _import_hub(model_id: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"there is no folder {model_id!r}, and to download the hub's model of this id, the "
            "package huggingface_hub is needed: pip install safetensors tokenizers huggingface_hub"
        ) from error
    return huggingface_hub


def _explained(model_id: str, error: Exception, hub: ModuleType) -> OSError:
    """The error as one that has the remedy on its only line."""
    page = f"{hub.constants.ENDPOINT}/{model_id}"
    answers = [e for e in (error, error.__cause__) if isinstance(e, hub.errors.HfHubHTTPError)]
    if not answers and isinstance(error, hub.errors.LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else "the hub is unreachable"
        return FileNotFoundError(
            f"there is no folder {model_id!r}, the cache lacks files of the hub's model of this "
            f"id, and {why}: where there is a connection, run "
            f'HF_HUB_OFFLINE=0 hf download {model_id} --exclude "original/*"'
        )
    if not answers:  # for example: the disk is full
        reason = summary(error) if isinstance(error, OSError) else type(error).__name__
        return OSError(
            f"{page} couldn't be downloaded ({reason}): check the connection and HF_TOKEN, and run "
            "it again"
        )
    status = answers[0].response.status_code
    is_gated = isinstance(answers[0], hub.errors.GatedRepoError)
    if isinstance(answers[0], hub.errors.RepositoryNotFoundError) and not is_gated:
        return FileNotFoundError(
            f"there is no folder {model_id!r}, and the hub has no model of this id, or it is "
            "private: check the spelling, or log in with hf auth login"
        )
    if status == 401:
        return PermissionError(
            f"{page} needs a valid login: accept the license on that page, then run hf auth login, "
            "or set HF_TOKEN"
        )
    if status == 403:
        return PermissionError(
            f"{page} is gated, and your account or token has no access: ask for it on that page "
            "(a fine-grained token also needs the permission to read gated repositories)"
        )
    return OSError(f"{page} couldn't be downloaded (HTTP status {status}): try again later")
