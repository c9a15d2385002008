"""A closer look at steps: figures against plain arithmetic, the trace as JSON, the operation that makes a NaN."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nanoft import TrainingFailed
from nanoft.config import Config
from nanoft.tracking import profiler
from nanoft.tracking.profiler import Profiler, gradients_by_module, module_type
from nanoft.tracking.run import NullRun


def make(directory: Path, **changes: Any) -> tuple[Profiler, list[tuple[Any, ...]], list[str]]:
    logged: list[tuple[Any, ...]] = []
    said: list[str] = []
    config = Config().override({name.replace("__", "."): value for name, value in changes.items()})
    run: Any = SimpleNamespace(directory=directory, log=lambda *a, **k: logged.append((*a, k)), print=said.append)
    return Profiler(config, run), logged, said


def test_one_of_several_processes_writes_the_profile(tmp_path: Path) -> None:
    config = Config().override({"system.profile": True})
    with Profiler(config, NullRun(tmp_path)) as watching:
        for step in range(8):
            watching.step(step, [], 1.0)
    assert list(tmp_path.iterdir()) == []


def trained() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    names = [f"layers.{n}.self_attn.q_proj.lora_{part}" for n in (0, 1) for part in "AB"]
    found = [(name, nn.Parameter(torch.zeros(3, 4))) for name in [*names, "layers.0.mlp.down_proj.weight"]]
    for _, parameter in found[:4]:
        parameter.grad = torch.randn(3, 4).relu()
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.lora_A", "q_proj.lora_A"),
        ("model.layers.3.mlp.down_proj.weight", "down_proj"),
        ("model.layers.3.self_attn.k_proj.bias", "k_proj.bias"),
        ("model.embed_tokens.weight", "embed_tokens"),
    ],
)
def test_the_type_of_a_module(name: str, kind: str) -> None:
    assert module_type(name) == kind


def test_gradients_by_module_are_those_of_all_their_entries_together() -> None:
    parameters = trained()
    found = gradients_by_module(parameters, scale=3.0)
    assert found.keys() == {"q_proj.lora_A", "q_proj.lora_B", "down_proj"}
    for part in "AB":
        entries = torch.cat(
            [p.grad.flatten() for n, p in parameters if n.endswith(part) and p.grad is not None]
        ).double()
        figures = found[f"q_proj.lora_{part}"]
        assert figures["norm"] == pytest.approx(3 * float(entries.square().sum().sqrt()), rel=1e-6)
        assert figures["max"] == pytest.approx(3 * float(entries.abs().max()), rel=1e-6)
        assert figures["zeros"] == pytest.approx(float((entries == 0).double().mean()))
    assert found["down_proj"] == {"norm": 0.0, "max": 0.0, "zeros": 1.0}


def test_gradients_are_told_every_so_many_steps_as_before_clipping(tmp_path: Path) -> None:
    looking, logged, _ = make(tmp_path, logging__gradient_steps=2, training__max_grad_norm=0.5)
    parameters = trained()
    before = gradients_by_module(parameters)
    norm = float(nn.utils.clip_grad_norm_([p for _, p in parameters], 0.5))
    assert norm > 0.5
    with looking:
        for step in (1, 2, 3, 4):
            looking.step(step, parameters, norm)
    assert [(event, step) for event, step, _ in logged] == [("gradients", 2), ("gradients", 4)]
    for name, figures in logged[0][2]["modules"].items():
        assert figures == pytest.approx(before[name], rel=1e-5)


def test_a_profile_is_json_with_the_operators_of_its_steps(tmp_path: Path) -> None:
    looking, _, said = make(tmp_path, system__profile=True)
    with looking:
        for step in range(1, 9):
            torch.mm(torch.ones(8, 8), torch.ones(8, 8))
            looking.step(step, [], 1.0)
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("aten::mm") == profiler.ACTIVE
    steps = {name for name in names if str(name).startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{n}" for n in (3, 4, 5)}
    assert "aten::mm" in "\n".join(said)


def test_a_run_too_short_for_a_profile_says_so(tmp_path: Path) -> None:
    looking, _, said = make(tmp_path, system__profile=True)
    with looking:
        looking.step(1, [], 1.0)
    assert said == ["profile   empty: recording starts after 3 steps, but the run had fewer"]


def test_a_profile_that_the_disk_refuses_is_an_event(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    looking, logged, _ = make(tmp_path, system__profile=True)
    with looking:
        for step in range(1, 9):
            looking.step(step, [], 1.0)
    assert [(event, values["what"]) for event, _, values in logged] == [("warning", "profile failed")]


def test_the_operation_whose_gradient_is_nan_is_named_with_its_traceback(tmp_path: Path) -> None:
    def root_of(x: torch.Tensor) -> torch.Tensor:
        return x.sqrt()

    x = torch.zeros(2, requires_grad=True)
    looking, _, _ = make(tmp_path, system__debug=True)
    with (
        pytest.warns(UserWarning, match=r"(?s)Error detected in SqrtBackward0.*test_profiler.py.*in root_of"),
        pytest.raises(TrainingFailed, match=r"^system\.debug: Function 'SqrtBackward0' returned nan values"),
        looking,
    ):
        (root_of(x) * 0).sum().backward()  # 0 * (1 / (2 sqrt 0)) = 0 * inf
    assert not torch.is_anomaly_enabled()
    with pytest.raises(RuntimeError, match="something else"), make(tmp_path, system__debug=True)[0]:
        raise RuntimeError("something else")


def test_nothing_is_done_unless_asked(tmp_path: Path) -> None:
    looking, logged, said = make(tmp_path)
    with looking:
        assert not torch.is_anomaly_enabled()
        for step in range(1, 9):
            looking.step(step, trained(), 1.0)
    assert (logged, said, list(tmp_path.iterdir())) == ([], [], [])
