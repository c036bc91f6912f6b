"""The reference inference library for Llama.

Reading order: model.py, parallel.py, generation.py, sampling.py, tokenizer.py, checkpoint.py.
"""

from llama.generation import ChatPrediction, CompletionPrediction, Llama, TokenEvent
from llama.model import ModelArgs, Transformer
from llama.tokenizer import ChatFormat, Dialog, Message, Role, Tokenizer
from llama.watch import RankError

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
    "TokenEvent",
    "Tokenizer",
    "Transformer",
]
