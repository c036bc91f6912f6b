"""The options that all commands which run a model share."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from llama.generation import Llama
from llama.sampling import SamplingParams


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


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The options of commands that generate text.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: sample from the most likely tokens with this total probability (the nucleus).
        max_gen_len: maximum number of tokens to generate; default: as many as fit.
    """

    temperature: float | None = 0.6
    top_p: float | None = 0.9
    max_gen_len: int | None = None

    def params(self) -> SamplingParams:
        return SamplingParams(**dataclasses.asdict(self))


def runs_model(**defaults: int | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command, whose first arguments are a ModelOptions and perhaps a SamplingOptions, take
    their fields as options instead.

    Args:
        defaults: of options, where they differ from those of the classes.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command).parameters.values()
        kinds: list[Any] = [
            p.annotation for p in parameters if dataclasses.is_dataclass(p.annotation)
        ]
        shared = {
            field.name: inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(field.name, field.default),
                annotation=field.type,
            )
            for kind in reversed(kinds)
            for field in dataclasses.fields(kind)
        }
        folder = shared.pop("ckpt_dir").replace(
            kind=inspect.Parameter.POSITIONAL_OR_KEYWORD, default=inspect.Parameter.empty
        )
        own = list(parameters)[len(kinds) :]
        signature = inspect.Signature([folder, *own, *shared.values()])

        @functools.wraps(command)
        def run(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            options = [
                kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
                for kind in kinds
            ]
            command(*options, **given)

        vars(run)["__signature__"] = signature
        run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
        described = [inspect.cleandoc(x.__doc__ or "") for x in (command, *reversed(kinds))]
        text = described[0].partition("\n\nArgs:\n")[0]
        arguments = [each.partition("\n\nArgs:\n")[2] for each in described]
        run.__doc__ = "\n".join([f"{text}\n\nArgs:", *filter(None, arguments)])
        return run

    return decorate
