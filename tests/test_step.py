"""A decoding step by the kernel ``decode_step``: its results, and that it never runs in place of
modules that compute something else. The kernel itself is tested in csrc/check_kernels.c."""

import contextlib
import copy
import dataclasses
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, new_model, random_weights
from reference import relative_error
from torch import Tensor, nn

from llama import Llama, ModelArgs, Transformer, accel
from llama.accel import kernels, step
from llama.accel.features import cpu_features
from llama.cache import Batch, Decode, KVCache
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.model import (
    Attention,
    FeedForward,
    RMSNorm,
    TransformerBlock,
    precompute_freqs_cis,
)
from llama.sampling import SamplingParams

SETS = [name for name, needed in kernels.INSTRUCTION_SETS.items() if needed <= cpu_features()]
pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))
CPU = torch.device("cpu")
FORMS: list[tuple[str, str | None]] = [("bfloat16", None), ("float16", None)]
FORMS += [(dtype, bits) for dtype in ("bfloat16", "float32") for bits in ("int8", "int4")]
# Entries of the cache are rounded to float16, and x to 8 bits for integers and to bfloat16 by
# AVX512-BF16: an error of float32 may turn a rounding. LIMIT is for models without any.
ROUNDED_LIMIT, LIMIT = 2e-3, 1e-5
PROMPTS = [[1, 5, 9, 30, 7], [400], list(range(30, 55)), [7, 20, 300]]
TOKENS = torch.tensor([400, 7, 30, 9])
POSITIONS = torch.tensor([5, 39, 0, 17])


def build(**options: Any) -> Llama:
    """With 40 tokens in each of the 4 slots."""
    sizes: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 4, "dtype": "float16"}
    llm = Llama.build(str(DEMO), device="cpu", **(sizes | options))
    llm.tokenizer.stop_tokens = set()
    llm.model(torch.arange(160).view(4, 40) + 100, 0)
    return llm


def build_exact() -> Transformer:
    """Nothing is rounded: weights in float16, the cache in float32."""
    model = build().model
    for cache in model.cache:
        cache.dtype = torch.float32
        cache.k, cache.v = cache.k.float(), cache.v.float()
    return model


@torch.inference_mode()
def decode(model: Transformer, positions: Tensor = POSITIONS) -> Tensor:
    """Logits of a step. It overwrites its positions in the cache, so that steps are independent."""
    batch = Decode(positions, int(positions.max()) + 1, ragged=True)
    return model.decode(TOKENS[: len(positions)], batch)


@torch.inference_mode()
def eagerly(model: Transformer) -> Tensor:
    batch = Decode(POSITIONS, int(POSITIONS.max()) + 1, ragged=True)
    return type(model).decode(model, TOKENS, batch)


class Calls:
    """The number of steps whose layers, and whose logits, the kernel has computed."""

    n = n_heads = 0

    def check(
        self, model: Transformer, *, by_kernel: bool = True, has_head: bool | None = None
    ) -> Tensor:
        """Whether the kernel computes the layers of a step, and the logits (``has_head``, default:
        as the layers); its logits are those of the modules."""
        before = self.n, self.n_heads
        logits = decode(model)
        assert self.n - before[0] == by_kernel
        assert self.n_heads - before[1] == (by_kernel if has_head is None else has_head)
        assert relative_error(logits, eagerly(model)) < LIMIT
        return logits


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls, run = Calls(), kernels.run

    def counted(name: str, *arguments: Any) -> None:
        if name == "decode_step":
            calls.n += 1
            calls.n_heads += arguments[2] is not None
        run(name, *arguments)

    monkeypatch.setattr(kernels, "run", counted)
    return calls


# --- Which models, and their results ------------------------------------------------------------


@pytest.fixture(params=SETS)
def each_instruction_set(
    request: pytest.FixtureRequest, use_processor: Callable[[str], None]
) -> None:
    use_processor(request.param)


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize(("dtype", "quantize"), FORMS)
def test_logits_are_those_of_the_modules(dtype: str, quantize: str | None, calls: Calls) -> None:
    llm = build(dtype=dtype, quantize=quantize)
    assert llm.ways.decode == "C kernels"
    assert "decode" not in llm.ways.reasons
    logits, wanted = decode(llm.model), eagerly(llm.model)
    assert calls.n == 1
    assert (logits.shape, logits.dtype) == (wanted.shape, wanted.dtype)
    assert relative_error(logits, wanted) < ROUNDED_LIMIT


@pytest.mark.usefixtures("each_instruction_set")
@pytest.mark.parametrize(("dtype", "quantize"), FORMS[:2] + FORMS[-1:])
def test_a_prompt_has_the_same_tokens_and_logits_alone_and_in_a_batch(
    dtype: str, quantize: str | None, calls: Calls
) -> None:
    llm = build(dtype=dtype, quantize=quantize)
    together = llm.generate(PROMPTS, 10, temperature=0)[0]
    assert calls.n == 9
    assert [llm.generate([prompt], 10, temperature=0)[0][0] for prompt in PROMPTS] == together
    llm = build(dtype=dtype, quantize=quantize)
    assert torch.equal(decode(llm.model)[:1], decode(llm.model, POSITIONS[:1]))


def test_other_models_run_eagerly() -> None:
    llm = build(dtype="float32")
    assert (llm.ways.decode, "decode" in llm.ways.reasons) == ("eager", False)
    llm = build(accelerate=False)
    assert (llm.ways.decode, llm.ways.reasons["decode"]) == ("eager", "accelerate is False")


@pytest.mark.parametrize(
    ("head_dim", "n_ranks", "reason"),
    [
        (16, 2, "ranks sum their results in every layer"),
        (18, 1, "the kernels don't support heads of size 18"),
        (272, 1, "the kernels don't support heads of size 272"),
        (256, 1, None),
    ],
)
def test_why_a_step_is_not_one_call(head_dim: int, n_ranks: int, reason: str | None) -> None:
    args = ModelArgs(**PARAMS | {"dim": 16 * head_dim})
    forms: Any = ((torch.bfloat16, None), (torch.float16, 8), (torch.float32, 4))
    for dtype, bits in forms:
        ways = accel.choose(args, n_ranks, dtype, CPU, bits)[0]
        assert ways.decode == ("C kernels" if reason is None else "eager")
        assert ways.reasons.get("decode") == reason


def test_a_compiled_step_stays(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    llm = build(compile=True)
    assert llm.ways.decode == "compiled"
    calls.check(llm.model, by_kernel=False)


def test_heads_of_another_size_run_eagerly(calls: Calls) -> None:
    params = PARAMS | {"dim": 16 * 18, "n_layers": 1}
    half = {key: x.half() for key, x in random_weights(params).items()}
    model = new_model(params, half, max_batch_size=4, max_seq_len=64)
    accel.accelerate(model)
    assert accel.ways(model).decode == "eager"
    calls.check(model, by_kernel=False)


def test_copies_of_a_model_run_eagerly(calls: Calls) -> None:
    for quantize in (None, "int4"):
        llm = build(quantize=quantize)
        wanted = decode(llm.model)
        for model in (copy.deepcopy(llm.model), pickle.loads(pickle.dumps(llm.model))):
            assert accel.ways(model).decode == "eager"
            assert not isinstance(model.decode, step.KernelStep)
            before = calls.n
            assert relative_error(decode(model), wanted) < ROUNDED_LIMIT
            assert calls.n == before
        assert llm.ways.decode == "C kernels"
        assert torch.equal(decode(llm.model), wanted)


def test_gradients_run_eagerly(calls: Calls) -> None:
    llm = build()
    with torch.no_grad():
        llm.model.decode(TOKENS, Decode(POSITIONS, 40, ragged=True))
    assert calls.n == 1
    weight = llm.model.get_parameter("layers.0.ffn_norm.weight").requires_grad_()
    llm.model.decode(TOKENS, Decode(POSITIONS, 40, ragged=True)).sum().backward()
    assert calls.n == 1
    assert weight.grad is not None
    assert weight.grad.any()


# --- Changes of the model -----------------------------------------------------------------------

INNER = ["layers.1", "layers.1.attention", "layers.1.feed_forward.w1", "layers.1.ffn_norm"]


def halve_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5


def halve_input(_module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] * 0.5, *inputs[1:])


@pytest.mark.parametrize("name", INNER)
def test_hooks_take_effect(name: str, calls: Calls) -> None:
    model = build_exact()
    module = model.get_submodule(name)
    plain = calls.check(model)
    with module.register_forward_hook(halve_output):
        assert relative_error(calls.check(model, by_kernel=False), plain) > 1e-2
    assert torch.equal(calls.check(model), plain)
    with module.register_forward_pre_hook(halve_input):
        changed = calls.check(model, by_kernel=False)
        if not name.endswith("norm"):  # whose result doesn't depend on its input's size
            assert relative_error(changed, plain) > 1e-2
    assert torch.equal(calls.check(model), plain)


@pytest.mark.parametrize("name", ["tok_embeddings", "norm", "output"])
def test_hooks_outside_of_the_layers_take_effect(name: str, calls: Calls) -> None:
    model = build_exact()
    plain = calls.check(model)
    with model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: (inputs[0].flip(0),)
    ):
        changed = calls.check(model, has_head=name == "tok_embeddings")
        assert relative_error(changed, plain) > 1e-2
    assert torch.equal(calls.check(model), plain)


def test_hooks_of_all_modules_see_the_layers(calls: Calls) -> None:
    model = build_exact()
    calls.check(model)
    seen: list[type] = []
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        with register(lambda module, *_: seen.append(type(module))):
            decode(model)
        assert seen.count(TransformerBlock) == len(model.layers)
        seen.clear()
    calls.check(model)


class Doubled(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Negative(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Halved(ColumnParallelLinear):
    def forward(self, input_: Tensor) -> Tensor:
        return 0.5 * super().forward(input_)


class DoubledValues(KVCache):
    def update(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        super().update(k, 2 * v, batch)


class Reversed(Transformer):
    def hidden(self, *args: Any) -> Tensor:
        return super().hidden(*args).flip(0)


def parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def times(factor: float) -> Callable[[Any], Any]:
    """Of a function: one whose result is multiplied."""
    return lambda function: lambda *args: factor * function(*args)


def of_double(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of ``update``: values are doubled; of ``update_cache``: keys."""
    return lambda *args: function(*args[:-2], 2 * args[-2], args[-1])


def as_class(cls: type) -> Callable[[Any], Any]:
    def changed(part: Any) -> Any:
        other = copy.copy(part)
        other.__class__ = cls
        return other

    return changed


# An attribute of a class, or of the part of a model with this name, and its new value from the old.
Change = tuple[type | str, str, Callable[[Any], Any]]

OTHER_METHODS: list[Change] = [
    (TransformerBlock, "forward", times(0.5)),
    (Attention, "forward", times(0.5)),
    (Attention, "update_cache", of_double),
    (Attention, "as_pass", lambda as_pass: lambda *args: (*as_pass(*args)[:2], lambda q, *_: -q)),
    (FeedForward, "forward", times(0.5)),
    (RMSNorm, "forward", times(0.5)),
    (ColumnParallelLinear, "forward", times(0.5)),
    (RowParallelLinear, "forward", times(0.5)),
    (KVCache, "update", of_double),
    (Transformer, "hidden", times(0.5)),
    (Transformer, "decode", times(0.5)),
    (Attention, "project", times(3)),
    (Attention, "rotate", times(3)),
    (FeedForward, "compute", times(0.5)),
    ("layers.1", "forward", times(0.5)),
    ("layers.1.attention", "forward", times(0.5)),
    ("layers.1.attention", "update_cache", of_double),
    ("layers.1.attention.cache", "update", of_double),
    ("layers.1.feed_forward.w1", "forward", times(0.5)),
    ("layers.1.ffn_norm", "forward", times(0.5)),
    ("", "hidden", times(0.5)),
    ("layers.1.attention", "attend", times(0.5)),
    ("layers.1.attention", "project", times(3)),
    ("layers.1.attention", "rotate", times(3)),
    ("layers.1.feed_forward", "compute", times(0.5)),
    ("layers.1.feed_forward.w1", "linear", times(0.5)),
    ("layers.1.ffn_norm", "__class__", lambda _: Doubled),
    ("", "__class__", lambda _: Reversed),
]
OTHER_PARTS: dict[str, Change] = {
    "norm of a subclass": ("layers.1", "ffn_norm", as_class(Doubled)),
    "feed-forward of a subclass": ("layers.1", "feed_forward", as_class(Negative)),
    "no norm": ("layers.1", "ffn_norm", lambda _: nn.Identity()),
    "norm as feed-forward": ("layers.1", "feed_forward", lambda _: RMSNorm(128)),
    "eps of one norm": ("layers.1.ffn_norm", "eps", lambda _: 10.0),
    "float32 weight": ("layers.1.feed_forward.w2", "weight", lambda w: parameter(-w.float())),
    "bfloat16 weight": ("layers.1.feed_forward.w2", "weight", lambda w: parameter(-w.bfloat16())),
    "strided weight": ("layers.1.attention.wq", "weight", lambda w: parameter(w.t())),
    # at the same address
    "strided data": ("layers.1.attention.wq.weight", "data", lambda w: w.t()),
    "data of another dtype": (
        *("layers.1.feed_forward.w2.weight", "data"),
        lambda w: w.view(torch.bfloat16),
    ),
    "cache of another dtype": (
        *("layers.1.attention", "cache"),
        lambda cache: with_values(cache, cache.v.half().flip(0)),
    ),
    "cache of a subclass": ("layers.1.attention", "cache", as_class(DoubledValues)),
    "strided cache": (
        *("layers.1.attention", "cache"),
        lambda cache: with_values(cache, cache.v.flip(0).mT.contiguous().mT),
    ),
}
# The kernel computes the layers before these.
OTHER_HEADS: dict[str, Change] = {
    "logits of the class": (Transformer, "logits", times(0.5)),
    "logits": ("", "logits", times(0.5)),
    "last norm's eps": ("norm", "eps", lambda _: 10.0),
    "last norm's method": ("norm", "forward", times(0.5)),
    "last norm of a subclass": ("", "norm", as_class(Doubled)),
    "output's float32 weight": ("output", "weight", lambda w: parameter(-w.float())),
    "output's function": ("output", "linear", times(0.5)),
    "output's method": ("output", "forward", times(0.5)),
    "output of a subclass": ("", "output", as_class(Halved)),
    "no last norm": ("", "norm", lambda _: nn.Identity()),
}
# What the kernel computes too.
SAME_PARTS: dict[str, Change] = {
    "weight": ("layers.1.feed_forward.w2", "weight", lambda w: parameter(-w)),
    "data": ("layers.1.feed_forward.w2.weight", "data", lambda w: -w),
    "norm's weight": ("layers.1.ffn_norm", "weight", lambda w: parameter(2 * w)),
    "norm": ("layers.1", "ffn_norm", lambda norm: RMSNorm(128, norm.eps)),
    "last norm's weight": ("norm", "weight", lambda w: parameter(2 * w)),
    "output's weight": ("output", "weight", lambda w: parameter(-w)),
    "output's data": ("output.weight", "data", lambda w: -w),
    "output's bfloat16 weight": ("output", "weight", lambda w: parameter(-w.bfloat16())),
    "layers": ("", "layers", lambda layers: nn.ModuleList([layers[i] for i in (1, 0, 2)])),
    "freqs_cis": ("", "freqs_cis", lambda _: precompute_freqs_cis(16, 64, 10.0)),
    "freqs_cis in float64": ("", "freqs_cis", lambda x: x.to(torch.complex128).flip(0)),
    "cache": (
        *("layers.1.attention", "cache"),
        lambda cache: with_values(cache, cache.v.flip(0)),
    ),
}


def with_values(cache: KVCache, v: Tensor) -> KVCache:
    other = copy.copy(cache)
    other.v = v
    return other


def part_of(model: Transformer, name: str) -> Any:
    part: Any = model
    for key in name.split(".") if name else []:
        part = part[int(key)] if key.isdigit() else getattr(part, key)
    return part


@contextlib.contextmanager
def change(model: Transformer, changed: Change) -> Iterator[None]:
    target, name, value = changed
    part = part_of(model, target) if isinstance(target, str) else target
    old = getattr(part, name)
    new = value(old)
    if isinstance(part, type) or isinstance(old, FunctionType | MethodType):
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(part, type):
                is_static = isinstance(vars(part).get(name), staticmethod)
                patch.setattr(part, name, staticmethod(new) if is_static else new)
            else:
                patch.setitem(vars(part), name, new)  # undone without a trace
            yield
        return
    setattr(part, name, new)
    yield
    setattr(part, name, old)


def check_change(
    calls: Calls, changed: Change, *, by_kernel: bool, has_head: bool | None = None
) -> None:
    """A change takes effect in the next step, and is gone after it is undone."""
    model = build_exact()
    plain = calls.check(model)
    with change(model, changed):
        for _ in range(2):
            logits = calls.check(model, by_kernel=by_kernel, has_head=has_head)
            assert relative_error(logits, plain) > 1e-2
    assert torch.equal(calls.check(model), plain)


@pytest.mark.parametrize(
    "changed", OTHER_METHODS, ids=lambda x: ".".join((getattr(x[0], "__name__", x[0]), x[1]))
)
def test_other_methods_and_functions_take_effect(changed: Change, calls: Calls) -> None:
    check_change(calls, changed, by_kernel=False)


@pytest.mark.parametrize("what", OTHER_PARTS)
def test_parts_that_the_kernel_does_not_compute_take_effect(what: str, calls: Calls) -> None:
    check_change(calls, OTHER_PARTS[what], by_kernel=False)


@pytest.mark.parametrize("what", OTHER_HEADS)
def test_last_parts_that_the_kernel_does_not_compute_take_effect(what: str, calls: Calls) -> None:
    check_change(calls, OTHER_HEADS[what], by_kernel=True, has_head=False)


@pytest.mark.parametrize("what", SAME_PARTS)
def test_parts_of_the_same_form_take_effect(what: str, calls: Calls) -> None:
    check_change(calls, SAME_PARTS[what], by_kernel=True)


@pytest.mark.parametrize("name", ["packed", "scale"])
def test_parts_of_a_quantized_weight_change_in_place_only(name: str, calls: Calls) -> None:
    model = build(quantize="int4").model
    layer: Any = part_of(model, "layers.1.feed_forward.w2")
    plain, tiled = decode(model), layer.linear
    part = getattr(tiled, name)

    def check() -> Tensor:
        logits = decode(model)
        assert relative_error(logits, eagerly(model)) < ROUNDED_LIMIT
        return logits

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(tiled, name, part.flip(0))
    layer.linear = dataclasses.replace(tiled, **{name: part.flip(0)})
    assert relative_error(check(), plain) > 1e-2
    layer.linear = tiled
    assert torch.equal(check(), plain)
    part.copy_(part.flip(0))
    assert relative_error(check(), plain) > 1e-2
    assert calls.n == 4


def test_weights_changed_in_place_take_effect(calls: Calls) -> None:
    model = build_exact()
    plain = calls.check(model)
    for name in ("attention.wq.weight", "feed_forward.w2.weight", "ffn_norm.weight"):
        weight = model.get_parameter(f"layers.1.{name}")
        for x in (weight, weight.data):
            x.mul_(-1)
            assert relative_error(calls.check(model), plain) > 1e-3
            x.mul_(-1)
            assert torch.equal(calls.check(model), plain)


def test_eps_takes_effect(calls: Calls) -> None:
    model = build_exact()
    norms: list[Any] = [m for m in model.modules() if isinstance(m, RMSNorm)]
    plain = calls.check(model)

    def set_all(eps: float | None) -> None:
        for norm in norms:
            norm.eps = eps

    set_all(float("0.5"))
    changed = calls.check(model)
    assert relative_error(changed, plain) > 1e-2
    address = id(norms[0].eps)
    set_all(None)
    numbers = [8.5 + i for i in range(1000)]  # one may have the first's address
    set_all(next((x for x in numbers if id(x) == address), numbers[0]))
    assert relative_error(calls.check(model), changed) > 1e-2
    set_all(None)  # the smallest of float32, for torch
    assert relative_error(calls.check(model, by_kernel=False), changed) > 1e-2


def test_blocks_may_be_added_removed_and_swapped(calls: Calls) -> None:
    model = build_exact()
    layers: Any = model.layers
    plain = calls.check(model)
    removed = layers[5]
    del layers[5]
    assert relative_error(calls.check(model), plain) > 1e-2
    layers.append(removed)
    assert torch.equal(calls.check(model), plain)
    layers[1], layers[2] = layers[2], layers[1]
    assert relative_error(calls.check(model), plain) > 1e-2
    layers[1], layers[2] = layers[2], layers[1]
    assert torch.equal(calls.check(model), plain)
    layers.append(copy.deepcopy(removed))
    assert relative_error(calls.check(model), plain) > 1e-2
    layers.append(nn.Identity())
    with pytest.raises(TypeError):  # as without the kernel
        decode(model)
    del layers[6:]
    assert torch.equal(calls.check(model), plain)


def test_a_subclass_runs_its_own_methods(calls: Calls) -> None:
    half = {key: x.half() for key, x in random_weights(PARAMS).items()}
    model = new_model(PARAMS, half, max_batch_size=4, max_seq_len=64)
    model.__class__ = Reversed
    accel.accelerate(model)
    calls.check(model, by_kernel=False)


@pytest.mark.parametrize("name", ["norm", "output"])
def test_a_model_without_its_last_parts(name: str, calls: Calls) -> None:
    """Only its own ``logits`` needs them."""
    model: Any = build_exact()
    model.logits = lambda hidden: hidden
    part = getattr(model, name)
    for change in (lambda: setattr(model, name, None), lambda: delattr(model, name)):
        change()
        if name == "output":
            calls.check(model, has_head=False)
        else:
            with pytest.raises((TypeError, AttributeError)):  # as without the kernel
                decode(model)
    setattr(model, name, part)
    del model.logits
    calls.check(model)
    delattr(model, name)
    setattr(model, name, lambda x: 2 * part(x))
    calls.check(model, has_head=False)


def test_hooks_in_a_new_dict_take_effect(calls: Calls) -> None:
    """Which clears earlier ones."""
    model = build_exact()
    plain = calls.check(model)
    module = model.get_submodule("layers.1.feed_forward")
    module._forward_hooks = OrderedDict()
    assert torch.equal(calls.check(model), plain)
    with module.register_forward_hook(halve_output):
        assert relative_error(calls.check(model, by_kernel=False), plain) > 1e-2
    assert torch.equal(calls.check(model), plain)


def test_tensors_in_place_of_parameters_take_effect(calls: Calls) -> None:
    """A step doesn't compare plain tensors, so the modules run."""
    model = build_exact()
    plain = calls.check(model)
    for name in ("layers.1.feed_forward.w2", "layers.1.ffn_norm"):
        module: Any = model.get_submodule(name)
        weight = module.weight
        del module.weight
        for x in (weight.data, 2 * weight.data):
            module.weight = x
            calls.check(model, by_kernel=False)
        del module.weight
        module.weight = weight
        assert torch.equal(calls.check(model), plain)


def test_modules_that_are_not_used_dont_matter(calls: Calls) -> None:
    model: Any = build_exact()
    model.layers[1].spare = model.layers[2].attention
    calls.check(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(dtype: torch.dtype, calls: Calls) -> None:
    llm = build()
    wanted, tokens = decode(llm.model), build().generate(PROMPTS, 4, temperature=0)[0]
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(decode(llm.model), wanted)
        assert relative_error(eagerly(llm.model), wanted) < ROUNDED_LIMIT
        assert llm.generate(PROMPTS, 4, temperature=0)[0] == tokens
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_model_of_another_dtype_runs_eagerly(calls: Calls) -> None:
    llm = build()
    calls.check(llm.model)
    llm.model.to(torch.float16)
    llm.model(torch.arange(160).view(4, 40) + 100, 0)
    calls.check(llm.model, by_kernel=False)


# --- The cache ----------------------------------------------------------------------------------


def test_a_freed_cache_is_allocated_again(calls: Calls) -> None:
    llm = build()
    plain = calls.check(llm.model)
    for cache in llm.model.cache:
        cache.free()
    freed = calls.check(llm.model)
    assert all(cache.k.numel() and cache.k[1, :, 40:].eq(0).all() for cache in llm.model.cache)
    assert relative_error(freed, plain) > 1e-2
    llm.model(torch.arange(160).view(4, 40) + 100, 0)
    assert relative_error(calls.check(llm.model), plain) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_of_another_dtype(dtype: torch.dtype, calls: Calls) -> None:
    llm = build()
    plain = calls.check(llm.model)
    for i, cache in enumerate(llm.model.cache):
        cache.dtype = dtype
        cache.k, cache.v = cache.k.to(dtype), cache.v.to(dtype)
        before = calls.n
        logits = decode(llm.model)
        assert calls.n - before == (i == 5)  # all layers have the same
        assert relative_error(logits, plain) < 0.05
    # an entry's rounding to bfloat16 may turn
    assert relative_error(logits, eagerly(llm.model)) < ROUNDED_LIMIT
    assert {cache.k.dtype for cache in llm.model.cache} == {dtype}


def test_strided_caches(calls: Calls) -> None:
    model = build_exact()
    plain = calls.check(model)
    for cache in model.cache:
        cache.k, cache.v = (x.mT.contiguous().mT for x in (cache.k, cache.v))
    assert relative_error(calls.check(model, by_kernel=False), plain) < LIMIT


def test_only_the_steps_positions_are_written(calls: Calls) -> None:
    llm = build()
    before = [(cache.k.clone(), cache.v.clone()) for cache in llm.model.cache]
    decode(llm.model)
    assert calls.n == 1
    is_written = torch.zeros(4, 64, dtype=torch.bool)
    is_written[range(4), POSITIONS] = True
    for cache, pair in zip(llm.model.cache, before, strict=True):
        for after, x in zip((cache.k, cache.v), pair, strict=True):
            assert torch.equal((after != x).any(-1).any(1), is_written)


def test_an_engine_notices_steps_that_are_not_its_own(calls: Calls) -> None:
    """Else it would reuse a prefix that they have overwritten."""
    llm = build()
    prompt = list(range(30, 55))
    wanted = llm.generate([prompt], 8, temperature=0)[0]
    n_writes = [cache.n_writes for cache in llm.model.cache]
    with llm.model.lock:
        before = calls.n
        decode(llm.model, POSITIONS)
        assert calls.n == before + 1
    assert all(c.n_writes > n for c, n in zip(llm.model.cache, n_writes, strict=True))
    assert llm.generate([prompt], 8, temperature=0)[0] == wanted
    llm.model(torch.tensor([[7]]), 3)
    assert llm.generate([prompt], 8, temperature=0)[0] == wanted


def test_a_running_stream_is_cancelled_by_other_steps(calls: Calls) -> None:
    llm = build()
    engine = llm.engine
    requests = [engine.request([1, 5, 9], SamplingParams(8, temperature=0))]
    engine.add(requests)
    for _ in range(3):
        engine.step()
    assert calls.n == 2
    decode(llm.model)
    with pytest.raises(RuntimeError, match="another generation has used this model"):
        list(engine.run(requests))


def test_positions_outside_of_the_cache_are_refused(calls: Calls) -> None:
    llm = build()
    model = llm.model
    before = [(cache.k.clone(), cache.v.clone()) for cache in model.cache]
    with pytest.raises(IndexError, match="index 64 is out of bounds"):
        decode(model, torch.tensor([3, 64]))
    assert calls.n == 0
    model.freqs_cis = precompute_freqs_cis(16, 128)
    five = torch.arange(5)
    for batch in (
        Decode(torch.tensor([3, 64]), 65, ragged=True),
        Decode(torch.tensor([3, -1]), 4, ragged=True),
        Decode(torch.tensor([3, 4]), 5, ragged=True, seqlens_k=torch.tensor([4, 65])),
        Decode(five, 5, ragged=True),  # of 4 slots
    ):
        with (
            torch.inference_mode(),
            pytest.raises(ValueError, match="a sequence is longer than the cache"),
        ):
            model.decode(five[: len(batch.positions)], batch)
    assert calls.n == 4
    for cache, (k, v) in zip(model.cache, before, strict=True):
        assert torch.equal(cache.k[2:], k[2:])
        assert torch.equal(cache.v[2:], v[2:])


def test_positions_of_any_layout(calls: Calls) -> None:
    model = build_exact()
    plain = calls.check(model)
    for positions in (POSITIONS.repeat(2, 1).t()[:, 1], POSITIONS.int()):
        assert torch.equal(decode(model, positions), plain)
    assert calls.n == 3


def test_slots_of_a_batch_in_any_order(calls: Calls) -> None:
    """Each row has the logits of its slot."""
    model = build_exact()
    plain, order = decode(model), [2, 0, 3, 1]
    batch = Decode(POSITIONS[order], 40, ragged=True)
    batch.slots = torch.tensor(order)
    with torch.inference_mode():
        assert torch.equal(model.decode(TOKENS[order], batch), plain[order])
    assert calls.n == 2
