"""Objectives on pairs and labels: published values of their losses, and gradients by plain autograd on all logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preferences import ON_PREFERENCES, VOCAB, random_samples
from torch import Tensor

from nanoft.batches import Sample, TokenDataset, Window, collate
from nanoft.blocks.trained import Adapter
from nanoft.config import Config, LoRAConfig
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.weights import add_score, load_model
from nanoft.objectives import OBJECTIVES, build_objective, trains_score
from nanoft.objectives.kto import answers_to_others, kto_loss
from nanoft.objectives.preference import (
    Answers,
    ipo_loss,
    log1mexp,
    orpo_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from tiny_models import make_reference

# --- losses of two pairs, as published formulas give them


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


POLICY = Answers(doubles(-12, -20), doubles(-15, -18), doubles(6, 10), doubles(5, 9))
REFERENCE = Answers(doubles(-13, -19.5), doubles(-14, -19), doubles(6, 10), doubles(5, 9))
GAIN = POLICY.gained_over(REFERENCE)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (sigmoid_loss(GAIN, 0.1, 0.0), (0.5981388694, 0.7709570478)),
        (sigmoid_loss(GAIN, 0.1, 0.1), (0.6181388694, 0.7559570478)),
        (robust_loss(GAIN, 0.1, 0.1), (0.5731388694, 0.7897070478)),
        (ipo_loss(GAIN, 0.1, 0.0), (21.4677777778, 26.6370679012)),
        (orpo_loss(POLICY, 0.1) + POLICY.per_token()[0], (0.0288750784, 0.0693147181)),
        (simpo_loss(POLICY, 2.0, 0.5), (0.2014132780, 0.9740769842)),
        (kto_loss(GAIN.chosen, torch.tensor([True, True]), 0.7, 0.1, (1.0, 1.0)), (0.4925005624, 0.5299640518)),
        (kto_loss(GAIN.rejected, torch.tensor([False, False]), 0.7, 0.1, (1.0, 1.0)), (0.4576020592, 0.5074994376)),
        (kto_loss(GAIN.chosen, torch.tensor([True, False]), 0.7, 0.1, (2.0, 3.0)), (0.9850011248, 1.4101078446)),
    ],
    ids=["sigmoid", "cDPO", "robust", "ipo", "orpo", "simpo", "kto good", "kto bad", "kto weights"],
)
def test_the_loss_of_a_pair_is_the_published_one(found: Tensor, expected: tuple[float, float]) -> None:
    torch.testing.assert_close(found, doubles(*expected), rtol=0, atol=1e-8)


def test_without_wrong_labels_robust_dpo_is_dpo() -> None:
    torch.testing.assert_close(robust_loss(GAIN, 0.1, 0.0), sigmoid_loss(GAIN, 0.1, 0.0), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_odds_are_exact_for_small_and_large_probabilities(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e-6, -1e-3, -0.5, -0.7, -3.0, -50.0], dtype=dtype)
    exact = doubles(*(math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()))
    torch.testing.assert_close(log1mexp(x).double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-30)
    edges = torch.tensor([0.0, -200.0], dtype=dtype, requires_grad=True)
    log1mexp(edges).sum().backward()
    assert edges.grad is not None
    assert log1mexp(edges).isfinite().all()
    assert edges.grad.isfinite().all()


# --- whole objectives


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    make_reference("mistral", directory, vocab_size=VOCAB)
    return directory


def base_model(directory: Path) -> Decoder:
    return load_model(directory, torch.device("cpu"), torch.float32).double()


def policy_model(
    directory: Path, dtype: torch.dtype = torch.float64, **lora: Any
) -> tuple[Decoder, dict[str, Adapter]]:
    """The base with adapters that are still fresh."""
    model = load_model(directory, torch.device("cpu"), torch.float32)
    adapters = inject_lora(model, LoRAConfig(rank=4, alpha=8.0, **lora), 0)
    return model.to(dtype), adapters


@torch.no_grad()
def move(adapters: dict[str, Adapter], size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters.values():
        for p in adapter.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=generator).to(p)


def window(samples: TokenDataset, size: int, packed: bool = False) -> Window:
    """All samples; each micro-batch has `size` units, in rows of their own or in one row."""
    units = samples.members(np.arange(len(samples) // samples.unit_size)).reshape(-1, samples.unit_size)
    pieces = [list(units[at : at + size]) for at in range(0, len(units), size)]
    return Window([collate(samples, [np.concatenate(p)] if packed else p, 0) for p in pieces], [0, 0], [0, 1])


def logp(model: Decoder, sample: Sample) -> Tensor:
    """log p of the answer, from the logits of all tokens of this sample alone."""
    ids = torch.from_numpy(sample.ids).long()
    logits = model(ids[None])[0, :-1] @ model.head.T
    token_logps = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return token_logps[torch.from_numpy(sample.is_target[1:])].sum()


def minus_log_sigmoid(x: Tensor) -> Tensor:
    return (1 + (-x).exp()).log()


def of_pair(name: str, c: Tensor, r: Tensor, plus: Tensor, minus: Tensor, settings: dict[str, Any]) -> Tensor:
    """The textbook's loss; c, r: log-ratios; plus, minus: log-probabilities per token."""
    beta, e = settings.get("beta", 2.0 if name == "simpo" else 0.1), settings.get("label_smoothing", 0.0)
    sft = settings.get("sft_weight", 0.0) * -plus
    if name == "orpo":
        odds_plus, odds_minus = (a.exp() / (1 - a.exp()) for a in (plus, minus))
        return -plus + beta * minus_log_sigmoid((odds_plus / odds_minus).log())
    if name == "simpo":
        return minus_log_sigmoid(beta * (plus - minus) - settings.get("gamma", 0.5)) + sft
    better, worse = minus_log_sigmoid(beta * (c - r)), minus_log_sigmoid(-beta * (c - r))
    if settings.get("loss") == "robust":
        return ((1 - e) * better - e * worse) / (1 - 2 * e) + sft
    return (1 - e) * better + e * worse + sft


PAIR_CASES: list[tuple[str, dict[str, Any]]] = [
    ("dpo", {}),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.5}),
    ("dpo", {"loss": "robust", "label_smoothing": 0.2, "sft_weight": 0.2}),
    ("dpo", {"loss": "ipo", "sft_weight": 0.3}),
    ("orpo", {}),
    ("orpo", {"beta": 0.5}),
    ("simpo", {}),
    ("simpo", {"beta": 1.5, "gamma": 1.0, "sft_weight": 0.1}),
]


def settings_of(name: str, preference: dict[str, Any]) -> Config:
    return Config().override({"training.objective": name, **{f"preference.{k}": v for k, v in preference.items()}})


def agree(model: Decoder, found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Values and gradients, in float64."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs: Any = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True)
    assert all((a - b).norm() <= 10 * rtol * b.norm() for a, b in pairs)


def loss_of(objective: Any, model: Decoder, pieces: Window) -> Tensor:
    objective.prepare(model, pieces)
    return torch.stack([objective.loss(model, batch) for batch in pieces]).sum() / objective.count(pieces)


@pytest.mark.parametrize(("size", "packed"), [(1, False), (4, False), (3, True)])
@pytest.mark.parametrize(("name", "settings"), PAIR_CASES)
def test_on_pairs_loss_and_gradient_are_those_of_the_formula(
    name: str, settings: dict[str, Any], size: int, packed: bool, directory: Path
) -> None:
    (model, adapters), base, samples = policy_model(directory), base_model(directory), random_samples("pairs")
    move(adapters)
    objective = build_objective(settings_of(name, settings), adapters)
    expected = []
    for at in range(0, len(samples), 2):
        chosen, rejected = samples[at], samples[at + 1]
        plus, minus = logp(model, chosen), logp(model, rejected)
        lengths = int(chosen.is_target.sum()), int(rejected.is_target.sum())
        with torch.no_grad():
            c, r = plus - logp(base, chosen), minus - logp(base, rejected)
        c, r = (now - now.detach() + gain for now, gain in ((plus, c), (minus, r)))  # only the policy has a gradient
        if settings.get("loss") == "ipo":
            ipo = (c / lengths[0] - r / lengths[1] - 5.0) ** 2  # 1 / (2 beta) = 5
            expected.append(ipo - settings["sft_weight"] * plus / lengths[0])
        else:
            expected.append(of_pair(name, c, r, plus / lengths[0], minus / lengths[1], settings))
    agree(model, loss_of(objective, model, window(samples, size, packed)), torch.stack(expected).mean())


def by_hand_kl(model: Decoder, base: Decoder, samples: TokenDataset, chosen: list[int]) -> float:
    """Of a step with the chosen samples; answers rotated by one, in the order of the data."""
    total = 0.0
    for at in chosen:
        prompt, other = samples[at].ids[~samples[at].is_target], samples[at - 1]
        ids = np.concatenate([prompt, other.ids[other.is_target]])
        ids = ids[: max(int(samples.lengths.max()), len(prompt) + 1)]  # no longer than the longest sample
        sample = Sample(ids, np.arange(len(ids)) >= len(prompt), 0)
        total += (logp(model, sample) - logp(base, sample)).item()
    return max(0.0, total / len(chosen))


@pytest.mark.parametrize("seed", [-1, 1])  # the divergence is above 0, and below, where it is clamped
@pytest.mark.parametrize(("size", "packed"), [(1, False), (4, False), (3, True)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_kto_is_the_formula_with_its_divergence_by_brute_force(
    method: str, size: int, packed: bool, seed: int, directory: Path
) -> None:
    """Two steps of a data set; the reference by hand is a second model."""
    base, samples = base_model(directory), random_samples("labels", 12)
    model, adapters = policy_model(directory) if method == "lora" else (base_model(directory), {})
    weights = {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    objective: Any = build_objective(settings_of("kto", weights), adapters)
    objective.begin(model, [samples], None, 4)
    move(adapters or {"all": model}, (0.05 if method == "lora" else 0.01) * seed)
    kls = []
    for chosen in (np.arange(6), np.array([11, 6, 8, 7, 10, 9])):
        with torch.no_grad():
            kl = by_hand_kl(model, base, samples, np.sort(chosen).tolist())
        expected = []
        for sample in samples[chosen]:
            now = logp(model, sample)
            above = 0.2 * (now - logp(base, sample).detach() - kl)
            expected.append(1.3 * (1 - above.sigmoid()) if sample.label > 0 else 0.8 * (1 - (-above).sigmoid()))
        found = loss_of(objective, model, window(samples[chosen], size, packed))
        agree(model, found, torch.stack(expected).mean(), 1e-10 if adapters else 1e-6)  # the reference is in float32
        assert objective.kl == pytest.approx(kl, rel=1e-10 if adapters else 1e-5)
        kls.append(kl)
    assert (kls[0] > 0) == (seed == -1)


def test_an_answer_to_another_prompt_is_that_of_the_last_one_before_it() -> None:
    prompts = [[1], [2, 3], [2, 3], [2, 3], [4], [1]]
    samples = [Sample(np.array([*p, 9], np.int32), np.arange(len(p) + 1) == len(p), 0) for p in prompts]
    assert answers_to_others(TokenDataset.of(samples)).tolist() == [4, 0, 0, 0, 3, 4]
    assert answers_to_others(TokenDataset.of(samples[1:4])).tolist() == [-1, 0, 1]  # there is no other prompt


@pytest.mark.parametrize("name", ON_PREFERENCES)
def test_figures_are_those_of_the_definition(name: str, directory: Path) -> None:
    """Means of what the window measured, evaluated the same; accuracy is the share of positive margins."""
    samples = random_samples(OBJECTIVES[name].learns)
    config = settings_of(name, {})
    model, adapters = policy_model(directory)
    if trains_score(config):
        add_score(model)
    move(adapters)
    objective = build_objective(config, adapters)
    objective.begin(model, [samples], None, 2)
    loss = loss_of(objective, model.train(), window(samples, 2))
    figures, evaluated = objective.figures(), objective.evaluate(model, window(samples, 4))
    assert model.training
    assert evaluated.pop("loss") == pytest.approx(loss.item(), rel=1e-5)
    evaluated.pop("kl_per_token", None)  # of held-out answers only
    assert evaluated == pytest.approx(figures, rel=1e-5)
    preferred = np.arange(len(samples)) % 2 == 0 if samples.unit_size == 2 else samples.labels > 0
    if model.score is None:
        logps = np.array([logp(model, sample).item() for sample in samples])
        assert figures["logps/chosen"] == pytest.approx(np.mean(logps[preferred]), rel=1e-5)
        assert figures["logps/rejected"] == pytest.approx(np.mean(logps[~preferred]), rel=1e-5)
    if samples.unit_size == 2:
        assert figures["rewards/margins"] == pytest.approx(
            figures["rewards/chosen"] - figures["rewards/rejected"], rel=1e-5, abs=1e-6
        )
    assert 0 <= figures["rewards/accuracies"] <= 1


# --- the reference


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "bias": {"bias": "lora_only"},
    "copies": {"modules_to_save": ("lm_head",)},
}
WITH_REFERENCE = [name for name in ON_PREFERENCES if OBJECTIVES[name].uses_reference]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_reference_of_a_fresh_adapter_is_the_base(name: str, variant: str, directory: Path) -> None:
    samples = random_samples(OBJECTIVES[name].learns)
    (model, adapters), base = policy_model(directory, torch.float32, **VARIANTS[variant]), base_model(directory)
    objective: Any = build_objective(settings_of(name, {}), adapters)
    objective.begin(model, [samples], None, 2)
    loss_of(objective, model.train(), window(samples, 2))
    for figures in (objective.figures(), objective.evaluate(model, window(samples, 3))):
        rewards = {key: value for key, value in figures.items() if key.startswith("rewards/")}
        if samples.unit_size == 1:
            del rewards["rewards/accuracies"]
        assert rewards == dict.fromkeys(rewards, 0.0)
    move(adapters)
    for batch in window(samples, 3):
        expected = torch.stack([logp(base, sample) for sample in batch.samples])
        found = objective.reference.logps(model, batch).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_the_reference_of_a_continued_adapter_is_its_start(name: str, variant: str, directory: Path) -> None:
    """In training and in evaluation, and the policy is what it was afterwards."""
    samples = random_samples(OBJECTIVES[name].learns)
    model, adapters = policy_model(directory, **VARIANTS[variant])
    move(adapters)
    objective: Any = build_objective(settings_of(name, {}).override({"lora.start_from": "adapter"}), adapters)
    whole = window(samples, len(samples)).micro_batches[0]
    with torch.no_grad():
        start = torch.stack([logp(model, sample) for sample in samples])
    move(adapters)
    trained = [p for p in model.parameters() if p.requires_grad]
    for mode in (True, False):
        model.train(mode)
        before = [p.clone() for p in trained]
        with torch.no_grad():
            policy = torch.stack([logp(model, sample) for sample in samples])
            torch.testing.assert_close(objective.reference.logps(model, whole), start, rtol=1e-10, atol=0)
            again = torch.stack([logp(model, sample) for sample in samples])
        assert torch.equal(policy, again)
        assert not torch.allclose(policy, start)
        assert all(map(torch.equal, before, trained))


def test_the_reference_of_full_training_is_computed_once_and_read_again(directory: Path, tmp_path: Path) -> None:
    samples = random_samples("pairs")
    sides = [samples.units(slice(0, 4)), samples.units(slice(4, 6))]
    config = settings_of("dpo", {}).override({"training.method": "full"})
    model = base_model(directory)
    first: Any = build_objective(config, {})
    first.begin(model, sides, tmp_path, 2)
    with torch.no_grad():
        expected = torch.stack([logp(model, sample) for sample in sides[1]])
        for p in model.parameters():
            p.mul_(1.1)
    second: Any = build_objective(config, {})
    second.begin(model, sides, tmp_path, 1)
    for objective in (first, second):
        found = objective.reference.logps(model, window(sides[1], 2).micro_batches[0])
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
