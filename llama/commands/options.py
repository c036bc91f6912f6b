"""The options that all commands which run a model share."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from llama.generation import Llama


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The arguments of ``Llama.build`` that commands take as options.

    Args:
        ckpt_dir: checkpoint folder, or hub id (owner/name).
        tokenizer_path: tokenizer file; default: the one in the folder.
        max_seq_len: maximum length of prompt plus generation, in tokens; default, if none is shown:
            2048, or the model's context if that is shorter.
        max_batch_size: maximum number of sequences in a batch.
        model_parallel_size: ranks per copy of the weights; default: all.
        dtype: bfloat16, float16 or float32; the default depends on the device.
        device: cuda, mps or cpu; default: the first that is available.
        seed: seed for sampling.
        adapter: folder of a LoRA adapter to merge into the weights.
        quantize: int8 or int4: quantize the linear layers; default: as stored.
    """

    ckpt_dir: str
    tokenizer_path: str | None = None
    max_seq_len: int | None = 512
    max_batch_size: int = 4
    model_parallel_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    seed: int = 1
    adapter: str | None = None
    quantize: str | None = None

    def build(self) -> Llama:
        return Llama.build(**dataclasses.asdict(self))


def runs_model(**defaults: int | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command, whose first argument is a ModelOptions, take its fields as options instead.

    Args:
        defaults: of options, where they differ from ModelOptions'.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command).parameters.values()
        fields = dataclasses.fields(ModelOptions)
        folder, *shared = (
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(field.name, field.default),
                annotation=field.type,
            )
            for field in fields
        )
        folder = folder.replace(
            kind=inspect.Parameter.POSITIONAL_OR_KEYWORD, default=inspect.Parameter.empty
        )
        signature = inspect.Signature([folder, *own, *shared])

        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            options = ModelOptions(**{field.name: given.pop(field.name) for field in fields})
            command(options, **given)

        vars(run)["__signature__"] = signature
        run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        text, _, arguments = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:\n")
        model_arguments = inspect.cleandoc(ModelOptions.__doc__ or "").partition("\n\nArgs:\n")[2]
        run.__doc__ = f"{text}\n\nArgs:\n{arguments}\n{model_arguments}".replace("\n\n\n", "\n\n")
        return run

    return decorate
