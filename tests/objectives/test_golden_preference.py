"""Losses and two optimizer steps of each objective, against TRL's (golden_preference.py wrote them)."""

from __future__ import annotations

from pathlib import Path

import golden_preference as golden
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanoft.batches import Sample, TokenDataset, Window, collate
from nanoft.config import Config
from nanoft.lora import inject_lora
from nanoft.models.adapter_files import adapter_tensors
from nanoft.models.weights import load_model
from nanoft.objectives import build_objective
from nanoft.optim import build_optimizer


def sample(prompt: list[int], answer: list[int], record: int, label: float = 1.0) -> Sample:
    ids = np.array([*prompt, *answer], np.int32)
    return Sample(ids, np.arange(len(ids)) >= len(prompt), record, label=label)


def windows(objective: str) -> list[Window]:
    """Two steps: of two pairs each, alone in their micro-batches; KTO: of four answers."""
    if objective == "kto":
        rows = TokenDataset.of([sample(p, a, n, float(good)) for n, (p, a, good) in enumerate(golden.answers())])
        return [
            Window([collate(rows, list(np.arange(at, at + 4)[:, None]), golden.PAD)], [0, 0], [0, 1]) for at in (0, 4)
        ]
    made = [sample(p, answer, n) for n, (p, *both) in enumerate(golden.pairs()) for answer in both]
    rows = TokenDataset.of(made, 2)
    batches = [collate(rows, [np.arange(at, at + 2)], golden.PAD) for at in range(0, len(rows), 2)]
    return [Window(batches[at : at + golden.PER_STEP], [0, 0], [0, 1]) for at in (0, golden.PER_STEP)]


@pytest.mark.parametrize("case", golden.CASES)
def test_losses_and_two_steps_are_those_of_trl(case: str, tmp_path: Path) -> None:
    name, settings, *_ = golden.CASES[case]
    changes = {
        "training.objective": name,
        "training.weight_decay": 0.0,
        "training.learning_rate": golden.LEARNING_RATE,
        "lora.rank": golden.RANK,
        "lora.alpha": golden.ALPHA,
        "lora.target_modules": golden.TARGETS,
        **{f"preference.{key}": value for key, value in settings.items()},
    }
    config = Config().override(changes)
    golden.make_base(tmp_path)
    model = load_model(tmp_path, torch.device("cpu"), torch.float32)
    adapters = inject_lora(model, config.lora, 0)
    with torch.no_grad():
        for key, tensor in adapter_tensors(adapters).items():
            tensor.copy_(golden.random_weight(key, tensor.shape))
    objective = build_objective(config, adapters)
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, config.training)
    for group in optimizer.param_groups:
        group["lr"] = golden.LEARNING_RATE
    expected, losses = load_file(golden.FILE), []
    objective.begin(model, [window.samples for window in windows(name)], None, 4)  # TRL rotates the answers of a step
    for window in windows(name):
        objective.prepare(model, window)
        loss = torch.stack([objective.loss(model, batch) for batch in window]).sum() / objective.count(window)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), expected[f"{case}.losses"], rtol=1e-5, atol=1e-6)
    found = {f"{case}.{key.removeprefix('base_model.model.')}": p for key, p in adapter_tensors(adapters).items()}
    assert found.keys() == {key for key in expected if key.startswith(f"{case}.model")}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=2e-6, msg=key)
