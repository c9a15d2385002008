"""The reference of a preference objective: its KL divergence from the policy, by hand on all logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanoft.batches import Sample, TokenDataset, collate
from nanoft.blocks.trained import Adapter
from nanoft.config import Config
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from nanoft.objectives import reference
from nanoft.objectives.reference import Reference
from tiny_models import make_reference

VOCAB = 32
TARGETS = {"all-linear": {}, "with a copy of the head": {"lora.modules_to_save": ("lm_head",)}}


def samples() -> TokenDataset:
    chance = np.random.default_rng(0)
    lengths = (5, 9, 7)
    made = [Sample(chance.integers(1, VOCAB, n, np.int32), np.arange(n) > 2, i) for i, n in enumerate(lengths)]
    return TokenDataset.of(made)


def change(adapters: dict[str, Adapter], seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters.values():
            for p in (p for p in adapter.parameters() if p.requires_grad):
                p.add_(torch.randn_like(p) * 0.1)


def log_probabilities(model: Decoder) -> torch.Tensor:
    """Of the next token before each target, sample by sample, (targets, vocab)."""
    found = []
    for sample in samples():
        logits = model.logits(model(torch.from_numpy(sample.ids).long()[None]))[0, :-1]
        found.append(logits[torch.from_numpy(sample.is_target[1:])].float().log_softmax(-1))
    return torch.cat(found)


@pytest.mark.parametrize("start", ["", "an adapter"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("cap", [None, 0.5])
def test_the_divergence_is_that_of_all_logits(
    start: str, targets: str, cap: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "compared_rows", lambda *_: 5)  # several chunks
    make_reference("mistral", tmp_path, vocab_size=VOCAB)
    model = load_model(tmp_path, torch.device("cpu"), torch.float32)
    model.config = replace(model.config, logit_cap=cap)
    config = Config().override({"lora.rank": 2, "lora.start_from": start, **TARGETS[targets]})
    adapters = inject_lora(model, config.lora, seed=0)
    if start:
        change(adapters, 1)
    own = Reference(config, adapters)
    batch = collate(samples(), list(np.arange(3)[:, None]), 0)
    with torch.no_grad():
        before = log_probabilities(model)
        assert own.kl_divergence(model, batch).abs().max() < 1e-6
        change(adapters, 2)
        now = log_probabilities(model)
        found = own.kl_divergence(model, batch)
        expected = F.kl_div(before, now, reduction="none", log_target=True).sum(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert found.mean() > 0.001
        with own.weights():
            torch.testing.assert_close(log_probabilities(model), before)
        torch.testing.assert_close(log_probabilities(model), now)  # and back


@pytest.mark.parametrize("session", ["first", "later"])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])  # qwen2: the embeddings are the head
def test_if_every_parameter_is_trained_the_divergence_is_that_of_all_logits(
    family: str, session: str, tmp_path: Path
) -> None:
    make_reference(family, tmp_path, vocab_size=VOCAB)
    model = load_model(tmp_path, torch.device("cpu"), torch.float32)
    own = Reference(Config(), {})
    own.precompute(model, [samples()[:0], samples()], tmp_path, 2, {"logps": lambda data: data})
    batch = collate(samples(), list(np.array([[2], [0], [1]])), 0)
    with torch.no_grad():
        before = log_probabilities(model)
        assert own.kl_divergence(model, batch).abs().max() < 1e-6
        torch.manual_seed(1)
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        now = log_probabilities(model)
        if session == "later":
            own = Reference(Config(), {})
            own.precompute(model, [samples()[:0], samples()], tmp_path, 2, {"logps": lambda data: data})
        found = own.kl_divergence(model, batch)
    expected = F.kl_div(before, now, reduction="none", log_target=True).sum(-1).split([2, 6, 4])
    torch.testing.assert_close(found, torch.cat([expected[i] for i in (2, 0, 1)]), rtol=1e-4, atol=1e-6)
    assert found.mean() > 0.001
