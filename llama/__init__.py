"""The reference inference library for Llama.

Reading order: config.py, cache.py, attention.py, model.py, sampling.py, request.py, slots.py,
engine.py, generation.py; tokenizer.py, chat.py; distributed/, checkpoint/, accel/.
"""

from llama.config import ModelArgs
from llama.distributed.watchdog import RankError
from llama.generation import ChatPrediction, CompletionPrediction, Llama, TokenEvent
from llama.model import Transformer
from llama.score import Score
from llama.tokenizer import ChatFormat, Dialog, Message, Role, Tokenizer

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "Message",
    "ModelArgs",
    "RankError",
    "Role",
    "Score",
    "TokenEvent",
    "Tokenizer",
    "Transformer",
]
