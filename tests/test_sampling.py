"""Top-p (nucleus) sampling, token for token equal to the published sampler."""

import pytest
import torch
from torch import Tensor

from llama import sampling
from llama.generation import sample_top_p
from llama.sampling import sample


def direct(logits: Tensor, temperature: float, p: float) -> Tensor:
    """The published rule written out row by row, with torch's global generator."""
    probs = torch.softmax(logits / temperature, dim=-1)
    rows, orders = [], []
    for row in probs:
        values = [-v for v in row.tolist()]
        order = [i for _, i in sorted(zip(values, range(len(values)), strict=True))]
        ranked = row[order]
        total = torch.cumsum(ranked, dim=-1)
        kept = [float(v) if float(t - v) <= p else 0.0 for t, v in zip(total, ranked, strict=True)]
        nucleus = torch.tensor(kept)
        rows.append(nucleus / nucleus.sum())
        orders.append(order)
    drawn = torch.multinomial(torch.stack(rows), num_samples=1)[:, 0].tolist()
    return torch.tensor([order[i] for order, i in zip(orders, drawn, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_draws_equal_the_published_rule(dtype: torch.dtype, n_rows: int) -> None:
    """20 seeds of 10 steps each; bfloat16 logits tie often."""
    for seed in range(20):
        source = torch.Generator().manual_seed(1000 + seed)
        steps = 2 * torch.randn(10, n_rows, 500, generator=source)
        steps = steps.to(dtype).float()
        ours = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        for logits in steps:
            expected = direct(logits, temperature=0.8, p=0.9)
            assert torch.equal(sample(logits, 0.8, 0.9, ours), expected)


def full_sort(probs: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The published rule over the whole vocabulary: the distribution and its ids."""
    ranked, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    nucleus = ranked.masked_fill(torch.cumsum(ranked, dim=-1) - ranked > p, 0.0)
    return nucleus / nucleus.sum(dim=-1, keepdim=True), ids


@pytest.mark.slow
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_of_a_large_vocabulary_draws_the_same_tokens_as_a_full_sort(
    n_rows: int, dtype: torch.dtype
) -> None:
    """At temperature 1.0 the nucleus is within the top 1024 tokens, at 4.0 it isn't."""
    source = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(n_rows, 128256, generator=source)).to(dtype).float()
    for temperature, headed in ((1.0, True), (4.0, False)):
        probs = torch.softmax(logits / temperature, dim=-1)
        assert (sampling._ranked_head(probs, 0.9) is not None) == headed
        nucleus, ids = full_sort(probs, 0.9)
        for seed in range(100 if headed else 10):
            generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
            ours = sample_top_p(probs, 0.9, generator=generators[0])
            drawn = torch.multinomial(nucleus, 1, generator=generators[1])
            assert torch.equal(ours, ids.gather(-1, drawn))
            assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("can_skip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_the_head_is_that_of_the_vocabulary(
    can_skip: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it can be drawn alone, as with the tested version of torch on x86, and elsewhere."""
    if can_skip and not sampling._can_skip(dtype):
        pytest.skip("not with this build of torch")
    monkeypatch.setattr(sampling, "_can_skip", lambda _: can_skip)
    probs = torch.softmax(8 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)), -1)
    nucleus, ids = full_sort(probs.to(dtype), 0.9)
    assert sampling._ranked_head(probs.to(dtype), 0.9) is not None
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    for _ in range(50):
        ours = sample_top_p(probs.to(dtype), 0.9, generator=generators[0])
        drawn = torch.multinomial(nucleus, 1, generator=generators[1])
        assert torch.equal(ours, ids.gather(-1, drawn))
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_a_build_that_draws_differently_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling._can_skip.cache_clear()
    noise_of_head = sampling._noise_of_head
    for change in (lambda x, _: x + 1, lambda x, generator: (x, generator.seed())[0]):
        monkeypatch.setattr(
            sampling,
            "_noise_of_head",
            lambda *args, change=change: change(noise_of_head(*args), args[-1]),
        )
        assert not sampling._can_skip(torch.float32)
        sampling._can_skip.cache_clear()


def test_ties_at_the_end_of_the_topk() -> None:
    """topk may return any of the tied tokens, so the nucleus must not include them."""
    probs = torch.full((1, 4096), 0.5 / 4095)
    probs[0, 7] = 0.5
    assert sampling._ranked_head(probs, 0.4) is not None
    assert sampling._ranked_head(probs, 0.5) is None
    drawn = {int(sample_top_p(probs, 0.5001)) for _ in range(100)}
    assert drawn <= {7, 0, 1}
    assert 7 in drawn


def test_ties_keep_ascending_ids() -> None:
    probs = torch.full((1, 4), 0.25)
    drawn = {int(sample_top_p(probs, 0.3)) for _ in range(200)}
    assert drawn == {0, 1}  # 0.25 <= 0.3 keeps the second token, 0.5 > 0.3 drops the third


def test_the_nucleus() -> None:
    probs = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
    for p, ids in (
        (0.1, {1}),
        (0.5, {1, 3}),
        (0.79, {1, 3}),
        (0.9, {1, 2, 3}),
        (1.0, {0, 1, 2, 3}),
    ):
        assert {int(sample_top_p(probs, p)) for _ in range(300)} == ids
    assert torch.equal(probs, torch.tensor([[0.05, 0.5, 0.15, 0.3]]))
    assert sample_top_p(probs.expand(3, 4), 0.5).shape == (3, 1)


def test_frequencies_follow_the_renormalised_nucleus() -> None:
    probs = torch.tensor([0.05, 0.5, 0.15, 0.3]).expand(20000, 4)
    drawn = sample_top_p(probs, 0.79, generator=torch.Generator().manual_seed(1))
    counts = torch.bincount(drawn[:, 0], minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0, 0.625, 0, 0.375]), atol=0.015, rtol=0)


def test_temperature_zero_takes_the_likeliest_and_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert sample(torch.tensor([[0.1, 3.0, 2.0]]), 0, 0.9, generator).tolist() == [1]
    assert torch.equal(generator.get_state(), before)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    sample(torch.randn(2, 50, generator=torch.Generator()), 1.0, 0.9, torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
