"""The balance loss of experts in training: adapters, whole runs, and where it is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import EXACT, close, run
from runs import Capture, Patch, events, gradients, in_the_loop, losses, nan_in, quick, refused, result
from tiny_families import make_family

import train
from nanoft import kernels
from nanoft.batches import Batch, Sample, TokenDataset, Window, collate
from nanoft.blocks.moe import Experts
from nanoft.config import Config, LoRAConfig
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from nanoft.objectives import build_objective
from nanoft.training.self_test import perturb_adapters
from tiny_models import write_records

CPU = torch.device("cpu")
LORA = LoRAConfig(rank=2, alpha=4.0, target_modules=("all-linear", "router"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("balance")
    make_family("qwen3_moe", root / "base")
    write_records(root / "records.jsonl")
    return root


def with_balance(alpha: float) -> Any:
    return build_objective(Config().override({"training.balance_loss": alpha}), {})


def batches(packed: bool) -> Batch:
    chance, rows = np.random.default_rng(0), [np.arange(6)] if packed else list(np.arange(6)[:, None])
    made = [Sample(chance.integers(3, 99, n, np.int32), chance.random(n) < 0.5, n) for n in (5, 9, 3, 12, 7, 8)]
    return collate(TokenDataset.of(made), rows, 0)


def step(root: Path, fast: bool, keep: Any = "all", form: Any = None) -> dict[str, torch.Tensor]:
    """The gradients of adapters of all linears and of the router, which are away from zero."""
    torch.manual_seed(0)
    model = load_model(root / "base", CPU, torch.float32, form)
    adapters = inject_lora(model, LORA, 0)
    perturb_adapters(adapters)
    if fast:
        assert kernels.apply(model, LORA) == ""
    model.train().activation_policy = [keep] * 3
    with_balance(3.0).loss(model, batches(True)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", [None, ("nf4", True)], ids=["lora", "qlora"])
def test_kernels_and_recomputation_change_no_gradient_of_adapters(root: Path, form: Any) -> None:
    plain, fast = step(root, False, form=form), step(root, True, form=form)
    assert any(".router." in name for name in plain)
    assert plain.keys() == fast.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-5)
    for keep in ("input", "offloaded"):
        again = step(root, True, keep, form)
        assert all(torch.equal(again[name], gradient) for name, gradient in fast.items())


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_padding_adds_nothing(root: Path, packed: bool) -> None:
    """As a process has it that gets one micro-batch less than the others."""
    model, none = load_model(root / "base", CPU, torch.float32).train(), torch.empty(0, dtype=torch.int64)
    batch, parts = batches(packed), dict.fromkeys(("target_positions", "targets", "sequence"), none)
    objective = with_balance(1.0)
    loss = objective.loss(model, dataclasses.replace(batch, **parts, tokens=0, samples=batch.samples[:0]))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert objective.figures() == {}


def test_evaluation_is_without_it(root: Path) -> None:
    model: Decoder = load_model(root / "base", CPU, torch.float32).train()
    window = Window([batches(True)], [0, 0], [0, 1])
    assert with_balance(5.0).evaluate(model, window) == with_balance(0.0).evaluate(model, window)
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    assert len(layers) == 3
    assert all(layer.balance is None for layer in layers)


def arguments(root: Path, directory: Path, **changes: Any) -> dict[str, Any]:
    named = {"model__name": root / "base", "data__train_file": root / "records.jsonl"}
    return {**named, "training__balance_loss": 0.5, "evaluation__prompts": 0, **changes}


def test_the_loop_has_one_gradient_for_every_split(root: Path, tmp_path: Path) -> None:
    whole, *others = (
        gradients(tmp_path / str(number), rows, steps, torch.float64, **arguments(root, tmp_path, **changes))
        for number, (rows, steps, changes) in enumerate(
            [(8, 1, {}), (1, 8, {}), (4, 2, {"training__checkpointing": "full", "system__kernels": "plain"})]
        )
    )
    for other in others:
        for name, gradient in whole.items():
            assert (other[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_it_is_the_same_on_several_ranks(sharding: str, root: Path, tmp_path: Path) -> None:
    """The last window of an epoch has five micro-batches, so one process gets one without targets."""
    changes = {**arguments(root, tmp_path), **EXACT, "training__micro_batch_size": 2, "training__checkpointing": "full"}
    assert train.main(quick(tmp_path / "alone", **{**changes, "training__gradient_accumulation_steps": 6})) == 0
    changes |= {"training__gradient_accumulation_steps": 3, "training__sharding": sharding}
    assert run(2, tmp_path / "run", **changes)[1].count("Error") == 0
    close(result(tmp_path / "run"), result(tmp_path / "alone"), 1e-3)
    logged = [[event["balance_loss"] for event in events(tmp_path / name, "train")] for name in ("run", "alone")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_a_run_logs_it_and_validates_without_it(root: Path, tmp_path: Path) -> None:
    for name, alpha in (("with", 0.5), ("without", 0.0)):
        changes = arguments(root, tmp_path, training__balance_loss=alpha, evaluation__on_start=True)
        assert train.main(quick(tmp_path / name, **changes)) == 0
    (_, first), (_, plain) = (losses(tmp_path / name)[0] for name in ("with", "without"))
    logged = [event["balance_loss"] for event in events(tmp_path / "with", "train")]
    assert first == pytest.approx(plain + 0.5 * logged[0], abs=1e-4)
    assert all(1 < value < 3 for value in logged)  # 6 experts, of which 2 are chosen
    assert losses(tmp_path / "with", "eval")[0] == losses(tmp_path / "without", "eval")[0]
    assert not any("balance_loss" in event for event in events(tmp_path / "without", "train"))


def test_the_self_test_passes(root: Path, tmp_path: Path, capsys: Capture) -> None:
    assert train.main([*quick(tmp_path / "run", **arguments(root, tmp_path)), "--selftest"]) == 0, capsys.readouterr()


def test_a_run_that_diverges_says_where(root: Path, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """After the last step, the model computes once more, without a balance loss."""
    in_the_loop(monkeypatch, "accumulate", nan_in(*range(1, 9)))
    changes = arguments(root, tmp_path, guard__max_rollbacks=0, guard__max_skips=1)
    assert train.main(quick(tmp_path / "run", **changes)) == 3
    assert "weights and activations are finite" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--plan", "--preflight"])
def test_models_without_experts_are_refused(option: str, tmp_path: Path, capsys: Capture) -> None:
    fragments = ["training.balance_loss: 0.1: ", "has no experts: remove it"]
    refused([*quick(tmp_path / "run", training__balance_loss=0.1), option], fragments, capsys)
