"""Sampling against transformers' logits processors, and samples against the resulting probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanoft.generation import sampling
from nanoft.generation.sampling import (
    BELOW_ONE,
    NotFinite,
    Sampler,
    Sampling,
    completion_noise,
    log_probs,
    penalize,
    sample,
    warp,
)
from nanoft.runtime.device import doubling_sum

CPU = torch.device("cpu")
VOCAB, DRAWS = 60, 40_000


def logits(rows: int = 16, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)) * spread


def seen_and_prompts(rows: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = torch.randint(0, VOCAB, (rows, 12), generator=torch.Generator().manual_seed(1))
    return torch.zeros(rows, VOCAB, dtype=torch.bool).scatter(1, prompts, True), prompts


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    seen, prompts = seen_and_prompts()
    assert torch.equal(penalize(logits(), seen, penalty), RepetitionPenaltyLogitsProcessor(penalty)(prompts, logits()))


ONE: list[tuple[dict[str, Any], Callable[[], Any]]] = [
    ({"temperature": 0.3}, lambda: TemperatureLogitsWarper(0.3)),
    ({"temperature": 2.5}, lambda: TemperatureLogitsWarper(2.5)),
    *[({"top_k": k}, lambda k=k: TopKLogitsWarper(k)) for k in (1, 2, 10, VOCAB, VOCAB + 1)],
    *[({"top_p": p}, lambda p=p: TopPLogitsWarper(p)) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)],
    *[({"min_p": p}, lambda p=p: MinPLogitsWarper(p)) for p in (1e-4, 0.05, 0.5, 1.0)],
]


@pytest.mark.parametrize(("setting", "theirs"), ONE, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_each_setting_is_its_processor(setting: dict[str, float], theirs: Callable[[], Any]) -> None:
    for spread in (0.3, 3.0, 30.0):
        found = warp(logits(spread=spread), Sampling(**{"temperature": 1.0, **setting}))
        assert torch.equal(found, theirs()(None, logits(spread=spread)))
        assert found.isfinite().any(-1).all()


def test_equal_logits_at_the_border_all_stay_as_in_transformers() -> None:
    tied = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert torch.equal(warp(tied, Sampling(1.0, top_k=2)), TopKLogitsWarper(2)(None, tied))
    assert torch.equal(warp(tied, Sampling(1.0, min_p=0.3)), MinPLogitsWarper(0.3)(None, tied))


ALL = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4}


@pytest.mark.parametrize("left_out", [None, *ALL])
def test_all_together_are_what_transformers_builds_for_generate(left_out: str | None) -> None:
    """Its own order: taken from the list that its `generate` would apply."""
    settings: dict[str, Any] = {name: value for name, value in ALL.items() if name != left_out}
    settings = {"temperature": 1.0, **settings}
    theirs = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    wanted = GenerationConfig(do_sample=True, **{"top_k": 0, "top_p": 1.0, **settings})
    chain = theirs._get_logits_processor(wanted, input_ids_seq_length=12, logits_processor=LogitsProcessorList())
    seen, prompts = seen_and_prompts()
    own = warp(penalize(logits(), seen, settings.get("repetition_penalty", 1.0)), Sampling(**settings))
    assert len(chain) == len(ALL) - (left_out is not None)
    assert torch.equal(own, chain(prompts, logits()))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5, "top_p": 0.9},
        {"temperature": 2.0, "top_k": 7},
        {"temperature": 1.0, "min_p": 0.1, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_draws_have_the_probabilities_that_transformers_leaves(settings: dict[str, Any]) -> None:
    """Pearson's chi-square over the tokens that may be said; the 99.99 % quantile by Wilson and Hilferty (1931)."""
    row = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    prompt = [3, 5, 8]
    chain: list[Any] = []
    if "repetition_penalty" in settings:
        chain.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    chain.append(TemperatureLogitsWarper(settings["temperature"]))
    for name, kind in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            chain.append(kind(settings[name]))
    expected = LogitsProcessorList(chain)(torch.tensor([prompt]), row).softmax(-1)[0].double() * DRAWS

    sampler = Sampler(Sampling(**settings), [prompt] * DRAWS, VOCAB, 1, CPU, noise_of(DRAWS, 1))
    sampler.join(range(DRAWS))
    counts = sampler.choose(row.expand(DRAWS, -1)).bincount(minlength=VOCAB).double()
    may = expected > 0
    assert not counts[~may].any()
    often = expected > 5  # rarer ones are counted as one
    pairs = [(counts[often], expected[often]), (counts[may & ~often].sum()[None], expected[may & ~often].sum()[None])]
    found, wanted = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    chi_square, freedom = float(((found - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < quantile


def test_the_largest_noise_still_draws_what_may_be_said() -> None:
    largest = torch.full((1,), (1 - 2**-24) * BELOW_ONE)
    for seed in range(200):
        row = torch.randn(1, 1000, generator=torch.Generator().manual_seed(seed)) * 3
        row[0, 900:] = -torch.inf
        assert int(sample(row, largest)) < 900
        assert int(sample(row, torch.zeros(1))) == 0
    row[0, :7] = -torch.inf
    assert int(sample(row, torch.zeros(1))) == 7


def noise_of(answers: int, steps: int, seed: int = 0) -> Tensor:
    return completion_noise([[seed, number] for number in range(answers)], steps)


def all_of(sampling: Sampling, prompts: list[list[int]], vocab: int, steps: int, seed: int = 0) -> Sampler:
    """A sampler with every prompt in its batch."""
    sampler = Sampler(sampling, prompts, vocab, steps, CPU, noise_of(len(prompts), steps, seed))
    sampler.join(range(len(prompts)))
    return sampler


def test_without_a_temperature_the_likeliest_is_taken_after_the_penalty() -> None:
    row = torch.tensor([[1.0, 3.0, 2.9, -1.0]])
    plain = all_of(Sampling(), [[1]], 4, 9)
    assert [int(plain.choose(row)) for _ in range(3)] == [1, 1, 1]
    wary = all_of(Sampling(repetition_penalty=1.5), [[1]], 4, 9)  # 3 / 1.5 = 2, then 2.9 / 1.5 = 1.93
    assert [int(wary.choose(row)) for _ in range(3)] == [2, 1, 1]


def test_what_a_row_draws_does_not_depend_on_rows_that_come_and_go() -> None:
    settings = Sampling(temperature=1.0, repetition_penalty=1.2)
    prompts = [[1, 2], [3], [4, 5, 6]]
    steps = [logits(3).roll(step, dims=0) for step in range(6)]
    whole = all_of(settings, prompts, VOCAB, 6, seed=5)
    expected = [whole.choose(step) for step in steps]

    some = Sampler(settings, prompts, VOCAB, 6, CPU, noise_of(3, 6, seed=5))
    some.join([2, 0])
    for number in range(2):
        assert torch.equal(some.choose(steps[number][[2, 0]]), expected[number][[2, 0]])
    some.keep(torch.tensor([1]))
    some.join([1])  # which begins now
    for number in range(4):
        at = torch.stack((steps[number + 2][0], steps[number][1]))
        assert some.choose(at).tolist() == [expected[number + 2][0], expected[number][1]]


def test_a_seed_repeats_and_another_differs() -> None:
    def drawn(seed: int) -> list[int]:
        return all_of(Sampling(1.0), [[0]] * 16, VOCAB, 1, seed).choose(logits()).tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_noise_of_completions_depends_on_their_seeds_alone() -> None:
    noise = completion_noise([[1, 2, 3], [1, 2, 4], [1, 2, 3]], 5000)
    assert (noise.shape, noise.dtype) == ((3, 5000), torch.float32)
    assert torch.equal(noise[0], noise[2])
    assert not (noise[0] == noise[1]).any()
    assert torch.equal(completion_noise([[1, 2, 4]], 7)[0], noise[1, :7])
    assert ((noise >= 0) & (noise < 1)).all()
    assert abs(noise[:2].mean() - 0.5) < 5 / (12 * noise[:2].numel()) ** 0.5  # five standard errors
    assert completion_noise([], 4).shape == (0, 4)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_log_probs_are_those_of_the_whole_vocabulary(temperature: float) -> None:
    tokens = torch.arange(16) * 3
    expected = (logits().double() / (temperature or 1)).log_softmax(-1)[torch.arange(16), tokens]
    torch.testing.assert_close(log_probs(logits(), tokens, temperature).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [Sampling(), Sampling(0.7, repetition_penalty=1.1)])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(odd: float, settings: Sampling) -> None:
    broken = logits()
    broken[3, 5] = odd
    with pytest.raises(NotFinite, match=rf"^model: its logits are {odd}: the weights are damaged, or activations"):
        all_of(settings, [[0]] * 16, VOCAB, 1).choose(broken)
    broken[3, 5] = -torch.inf  # only this token is impossible
    all_of(settings, [[0]] * 16, VOCAB, 1).choose(broken)


def test_sampling_needs_no_cumsum_where_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA with deterministic algorithms."""

    def sampled() -> tuple[Tensor, Tensor]:
        warped = warp(logits(512).double(), Sampling(temperature=0.7, top_p=0.9))
        return warped, sample(warped, torch.linspace(0, BELOW_ONE, 512).double())

    expected = sampled()
    monkeypatch.setattr(sampling, "running_sum", doubling_sum)
    monkeypatch.setattr(Tensor, "cumsum", None)
    for one, other in zip(sampled(), expected, strict=True):
        assert torch.equal(one, other)
