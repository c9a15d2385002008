"""Objectives against the textbook: the sum over target tokens on all logits, for every split of a window."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from preferences import VOCAB, random_samples
from rollouts import Taught, given, random_rollouts

from nanoft.batches import Sample, TokenDataset, Window, collate
from nanoft.config import Config, LoRAConfig
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.weights import add_score, load_model
from nanoft.objectives import OBJECTIVES, build_objective, trains_score
from tiny_models import make_reference

PAD = 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory: Path = tmp_path_factory.mktemp("model")
    make_reference("mistral", directory, vocab_size=32)
    return load_model(directory, torch.device("cpu"), torch.float32)


def samples() -> TokenDataset:
    chance = np.random.default_rng(0)
    lengths = (5, 9, 3, 12, 7, 8)
    made = [Sample(chance.integers(1, 32, n, np.int32), chance.random(n) < 0.5, i) for i, n in enumerate(lengths)]
    return TokenDataset.of(made)


def window(size: int) -> Window:
    pieces = [list(np.arange(at, min(at + size, 6))[:, None]) for at in range(0, 6, size)]
    return Window([collate(samples(), rows, PAD) for rows in pieces], [0, 0], [0, 1])


def by_hand(model: Decoder, smoothing: float = 0.0) -> torch.Tensor:
    """The sum over the target tokens of each sample alone, from the logits of all its tokens."""
    total = torch.zeros(())
    for sample in samples():
        ids = torch.from_numpy(sample.ids).long()
        logits = model.logits(model(ids[None]))[0, :-1]
        nll = F.cross_entropy(logits, ids[1:], reduction="none", label_smoothing=smoothing)
        total = total + nll[torch.from_numpy(sample.is_target[1:])].sum()
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_the_loss_of_a_window_is_the_mean_over_its_target_tokens(model: Decoder, size: int, smoothing: float) -> None:
    objective = build_objective(Config().override({"training.label_smoothing": smoothing}), {})
    pieces = window(size)
    units = objective.count(pieces)
    assert units == sum(int(sample.is_target[1:].sum()) for sample in samples())
    found = torch.stack([objective.loss(model, batch) / units for batch in pieces]).sum()
    expected = by_hand(model, smoothing) / units
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    parameters = list(model.parameters())
    pairs: Any = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True)
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in pairs)


def test_evaluation_is_the_same_loss_without_smoothing(model: Decoder) -> None:
    objective = build_objective(Config().override({"training.label_smoothing": 0.1, "training.z_loss": 0.01}), {})
    figures = objective.evaluate(model.train(), window(4))
    assert model.training
    assert figures["loss"] == pytest.approx((by_hand(model) / figures["target_tokens"]).item(), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(np.exp(figures["loss"]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_what_the_loop_asks_for(name: str, model: Decoder, tmp_path: Path) -> None:
    """On the data that it learns from; it may begin with adapters, or must."""
    data = random_samples(OBJECTIVES[name].learns)
    pieces = Window([collate(data, list(data.members(np.arange(6)).reshape(6, -1)), PAD)], [0, 0], [0, 1])
    config = Config().override({"training.objective": name})
    model, adapters = copy.deepcopy(model), {}
    if trains_score(config):
        add_score(model)
    if OBJECTIVES[name].learns != "turns":
        adapters = inject_lora(model, LoRAConfig(rank=2), 0)
    answers = random_rollouts(vocab=VOCAB)
    if OBJECTIVES[name].section == "distill":
        objective = Taught(config, adapters, answers, copy.deepcopy(model))
    elif OBJECTIVES[name].learns == "prompts":
        objective = given(config, adapters, answers)
    else:
        objective = build_objective(config, adapters)
    assert objective.unit
    objective.begin(model, [data], tmp_path, 2)
    (pieces,) = objective.windows(model, pieces, 2)
    objective.prepare(model, pieces)
    loss = objective.loss(model, pieces.micro_batches[0])
    assert loss.shape == ()
    assert loss.requires_grad
    assert objective.count(pieces) > 0
    assert "loss" in objective.evaluate(model, pieces)
    assert all(np.isfinite(value) for value in objective.figures().values())
