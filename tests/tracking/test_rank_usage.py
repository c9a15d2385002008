"""Rank usage against numpy's SVD of the whole update, entropy by hand, gradients kept on the side, known spectra."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import train
from nanoft.config import LoRAConfig
from nanoft.lora import LoRALinear, PiSSALinear, inject_lora
from nanoft.nf4 import Linear4bit
from nanoft.tracking.rank_usage import (
    MIN_STEPS,
    Advice,
    GradientStats,
    RankUsage,
    advise,
    directions_for_energy,
    effective_rank,
    gradient_stats,
    measure_rank_usage,
    rank_report,
    singular_values,
    summarize,
    weight_norm,
)

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(sigma: list[float], out: int = 40, into: int = 30) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product has these singular values, mixed by a random r x r matrix."""
    r = len(sigma)
    u, v = (torch.linalg.qr(random(n, r, seed=n).double()).Q for n in (out, into))
    mix = random(r, r).double() + 3 * torch.eye(r)
    return torch.linalg.inv(mix) @ v.T, u @ torch.diag(torch.tensor(sigma).double()) @ mix


def usage(sigma: list[float], update: float = 0.01, rms: float | None = 1e-3) -> RankUsage:
    """A module with this spectrum, all figures by hand."""
    rank, total, energy = len(sigma), sum(sigma), sum(s * s for s in sigma)
    entropy = -sum(s / total * math.log(s / total) for s in sigma if s)
    cumulative = [sum(s * s for s in sigma[: k + 1]) for k in range(rank)]
    held = [next(k + 1 for k in range(rank) if cumulative[k] >= share * energy) for share in (0.9, 0.99)]
    moments = None if rms is None else GradientStats(rms, 0.5, 400)
    return RankUsage(rank, sigma, math.exp(entropy), energy / sigma[0] ** 2, *held, update, moments)


ZERO = RankUsage(16, [0.0] * 16, 0.0, 0.0, 0, 0, 0.0, GradientStats(1e-3, 0.5, 400))


# --- the spectrum


@pytest.mark.parametrize(("out", "into", "rank"), [(50, 30, 8), (30, 50, 1), (5, 40, 8), (40, 5, 8), (7, 7, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_those_of_the_whole_update(out: int, into: int, rank: int, dtype: torch.dtype) -> None:
    a, b = random(rank, into).to(dtype), random(out, rank, seed=1).to(dtype)
    whole = 0.5 * b.double().numpy() @ a.double().numpy()
    expected = np.linalg.svd(whole, compute_uv=False)[:rank]
    found = singular_values(a, b, 0.5).numpy()
    assert found[: len(expected)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.shape == (rank,)
    assert not found[len(expected) :].any()


@pytest.mark.parametrize("sigma", [[3.0, 2.0, 1.0, 0.5], [1.0] * 6, [5.0, 0.0, 0.0], [1.0, 1e-9]])
def test_a_known_spectrum_is_found(sigma: list[float]) -> None:
    assert singular_values(*factors(sigma), 1.0).tolist() == pytest.approx(sigma, abs=1e-13)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_orthogonal_directions_count_in_full(rank: int) -> None:
    sigma = singular_values(*factors([2.0] * rank), 1.0)
    assert effective_rank(sigma) == pytest.approx(rank)
    assert directions_for_energy(sigma, 0.99) == rank
    assert directions_for_energy(sigma, 0.47) == math.ceil(0.47 * rank)


def test_a_zero_update_has_no_directions_at_all() -> None:
    sigma = singular_values(random(4, 10), torch.zeros(12, 4), 2.0)
    assert sigma.tolist() == [0.0] * 4
    assert (effective_rank(sigma), directions_for_energy(sigma, 0.99)) == (0.0, 0)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=20).filter(lambda values: max(values) > 1e-3))
def test_entropy_and_energy_by_hand(values: list[float]) -> None:
    values.sort(reverse=True)
    sigma, total = torch.tensor(values, dtype=torch.float64), math.fsum(values)
    shares = [value / total for value in values]
    rank = effective_rank(sigma)
    assert rank == pytest.approx(math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0)))
    assert math.fsum(s * s for s in values) / values[0] ** 2 <= rank + 1e-9  # the stable rank is never larger
    for share in (0.5, 0.9, 0.99):
        held, energy = directions_for_energy(sigma, share), math.fsum(s * s for s in values)
        assert math.fsum(s * s for s in values[:held]) >= share * energy * (1 - 1e-12)
        assert math.fsum(s * s for s in values[: held - 1]) <= share * energy * (1 + 1e-12)


# --- the base


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "nf4"])
def test_the_norm_of_a_weight_is_that_of_float64(kind: str) -> None:
    weight = random(4096, 2048)  # summed in one go in float32, it is off by 2e-4
    linear: Any = nn.Linear(2048, 4096, bias=kind == "float32")
    linear.weight.data = weight if kind == "float32" else weight.bfloat16()
    if kind == "nf4":
        linear = Linear4bit(weight, None, "nf4", True, torch.bfloat16)
        weight = linear.dequantize()
    weight = weight if kind == "float32" else weight.bfloat16()
    assert weight_norm(linear) == pytest.approx(np.linalg.norm(weight.double().numpy()), rel=5e-5)


# --- the gradients


def trained(steps: int, kind: str = "AdamW", **settings: Any) -> tuple[Any, list[nn.Parameter], list[list[Tensor]]]:
    """An optimizer that has taken steps with random gradients, its two parameters, and those gradients."""
    parameters = [nn.Parameter(random(6, 40)), nn.Parameter(random(50, 6))]
    made = getattr(torch.optim, kind)(parameters, lr=1e-3, **settings)
    seen = []
    for step in range(steps):
        gradients = [random(*p.shape, seed=100 * step + i) * (1 + i) + 0.3 for i, p in enumerate(parameters)]
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        made.step()
        seen.append(gradients)
    return made, parameters, seen


@pytest.mark.parametrize("steps", [1, 7, 60])
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_the_weighted_means_of_those_seen(steps: int, fused: bool) -> None:
    beta1, beta2 = 0.8, 0.97
    optimizer, parameters, seen = trained(steps, betas=(beta1, beta2), weight_decay=0.1, fused=fused)
    rows = torch.stack([torch.cat([g.flatten() for g in gradients]) for gradients in seen]).double().numpy()
    first, second = (np.array([beta ** (steps - 1 - i) for i in range(steps)]) for beta in (beta1, beta2))
    mean = first @ rows / first.sum()
    square = second @ rows**2 / second.sum()
    found = gradient_stats(parameters, optimizer)
    assert found is not None
    assert found.step == steps
    assert found.rms == pytest.approx(math.sqrt(square.mean()), rel=1e-4)
    assert found.signal == pytest.approx(math.sqrt((mean**2).sum() / square.sum()), rel=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_gradients_without_a_mean_have_the_signal_of_noise(steps: int) -> None:
    parameter = nn.Parameter(torch.zeros(200_000))
    optimizer = torch.optim.AdamW([parameter], betas=(0.9, 0.999))
    for step in range(steps):
        parameter.grad = random(200_000, seed=step)
        optimizer.step()
    found = gradient_stats([parameter], optimizer)
    assert found is not None
    assert found.signal == pytest.approx({1: 1.0, 4: math.sqrt(0.16561 / 0.65341), 50: 0.2306}[steps], rel=0.01)


def test_gradients_that_do_not_change_are_all_signal() -> None:
    parameter = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.AdamW([parameter])
    for _ in range(5):
        parameter.grad = torch.linspace(-1, 1, 10)
        optimizer.step()
    found = gradient_stats([parameter], optimizer)
    assert found is not None
    assert found.signal == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adagrad", "Adamax"])
def test_without_adams_means_nothing_is_said(optimizer: str) -> None:
    made, parameters, _ = trained(2, optimizer)
    assert gradient_stats(parameters, made) is None
    assert gradient_stats(parameters, torch.optim.AdamW(parameters)) is None  # no step yet


def test_gradients_that_were_zero_have_no_signal() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.zeros(3)
    optimizer.step()
    assert gradient_stats([parameter], optimizer) == GradientStats(0.0, 0.0, 1)


# --- one adapter


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_is_measured_as_its_whole_update_says(packed: bool) -> None:
    base: Any = Linear4bit(random(96, 64), None, "nf4", False, torch.float32) if packed else nn.Linear(64, 96)
    (adapter,) = adapters_on({"q_proj": base}, rank=6, alpha=9.0).values()
    with torch.no_grad():
        adapter.lora_B.copy_(random(96, 6, seed=5))
    found = measure_rank_usage(adapter, torch.optim.SGD(adapter.parameters()))
    whole = 1.5 * (adapter.lora_B.double() @ adapter.lora_A.double()).detach().numpy()
    weight = (base.dequantize() if packed else base.weight.detach()).double().numpy()
    sigma = np.linalg.svd(whole, compute_uv=False)[:6]
    assert found.singular_values == pytest.approx(sigma)
    assert found.stable_rank == pytest.approx((np.linalg.norm(whole) / np.linalg.norm(whole, 2)) ** 2)
    assert found.relative_update == pytest.approx(np.linalg.norm(whole) / np.linalg.norm(weight), rel=1e-5)
    assert (found.rank, found.gradient) == (6, None)
    by_hand = usage(found.singular_values)
    for name in ("effective_rank", "directions_90", "directions_99"):
        assert getattr(found, name) == pytest.approx(getattr(by_hand, name))


def adapters_on(linears: dict[str, nn.Module], rank: int, alpha: float) -> dict[str, LoRALinear]:
    """Fresh adapters on linears of these dotted names."""
    model = nn.Module()
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        if parent and not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model.get_submodule(parent).add_module(last, linear)
    return inject_lora(model, LoRAConfig(rank=rank, alpha=alpha, target_modules=tuple(linears)), seed=0)


def test_a_fresh_adapter_has_no_update_and_a_base_of_zeros_is_infinitely_changed() -> None:
    base = nn.Linear(8, 8)
    nn.init.zeros_(base.weight)
    (adapter,) = adapters_on({"q_proj": nn.Linear(8, 8)}, rank=4, alpha=8.0).values()
    found = measure_rank_usage(adapter, torch.optim.SGD(adapter.parameters()))
    assert (found.effective_rank, found.stable_rank, found.directions_99, found.relative_update) == (0, 0, 0, 0)
    (adapter,) = adapters_on({"q_proj": base}, rank=4, alpha=8.0).values()
    assert measure_rank_usage(adapter, torch.optim.SGD(adapter.parameters())).relative_update == math.inf


# --- the advice

FULL = [1.2 - 0.02 * k for k in range(16)]
DECAYING = [0.8**k for k in range(16)]
TAILED = [1.0] * 15 + [0.1]  # effective rank 15.3, but it ends


def low(rank: int, of: int = 16) -> list[float]:
    return [1.0] * rank + [1e-6] * (of - rank)


@pytest.mark.parametrize(
    ("sigmas", "verdict", "rank"),
    [
        ([low(1)], "lower", 1),
        ([low(3)], "lower", 4),
        ([low(8)], "lower", 8),
        ([low(9)], "fine", None),
        ([low(5, 32)], "lower", 8),
        ([low(3), low(6), low(2)], "lower", 8),  # it must suit all
        ([low(3), low(9), low(3)], "fine", None),
        ([FULL], "raise", 32),
        ([[1.0] * 16], "raise", 32),
        ([FULL, FULL, DECAYING], "raise", 32),  # the median decides
        ([FULL, DECAYING, DECAYING], "fine", None),
        ([DECAYING], "fine", None),
        ([TAILED], "fine", None),
        ([[1.0] * 4], "raise", 8),
        ([[1.0] * 3], "none", None),
        ([[1.0]], "none", None),
        ([[1.0, 1e-6]], "lower", 1),
        ([low(3), low(3, 8)], "lower", 4),
    ],
)
def test_advice_on_known_spectra(sigmas: list[list[float]], verdict: str, rank: int | None) -> None:
    found = advise([usage(sigma) for sigma in sigmas], [], MIN_STEPS)
    assert (found.verdict, found.rank) == (verdict, rank)
    early = advise([usage(sigma) for sigma in sigmas], [], MIN_STEPS - 1)
    assert (early.verdict, early.rank) == ("none", None)


def test_zero_updates_get_no_advice_and_do_not_hinder_the_others() -> None:
    assert advise([ZERO, ZERO], [], 500).verdict == "none"
    assert advise([ZERO, usage(low(3)), usage(low(3))], [], 500) == advise([usage(low(3))], [], 500)
    assert advise([ZERO, ZERO, usage(FULL)], [], 500).verdict == "fine"  # the median is not full


def test_a_module_is_dropped_only_if_update_and_gradients_are_negligible() -> None:
    others = [usage(FULL, update, 1e-3) for update in (0.01, 0.02, 0.03)]
    idle = usage(FULL, 0.0019, 0.9e-4)
    assert advise([idle, idle], others, 500).verdict == "drop"
    for busy in (usage(FULL, 0.0021, 0.9e-4), usage(FULL, 0.0019, 1.1e-4), usage(FULL, 0.0019, None)):
        assert advise([idle, busy], others, 500).verdict == "raise"
    assert advise([idle], [*others, usage(FULL, 0.02, None)], 500).verdict == "raise"
    assert advise([idle], [], 500).verdict == "raise"
    assert advise([idle], others, 50).verdict == "none"
    assert advise([idle], [idle, ZERO, ZERO], 500).verdict == "raise"
    assert advise([ZERO], [idle, idle], 500).verdict == "none"  # its gradients are larger than theirs


def test_types_are_judged_alone_and_the_run_without_what_is_dropped() -> None:
    modules = {
        **{f"layers.{n}.self_attn.q_proj": usage(low(3), 0.02) for n in range(3)},
        **{f"layers.{n}.mlp.up_proj": usage(low(5), 0.03) for n in range(3)},
        **{f"layers.{n}.mlp.down_proj": usage(FULL, 1e-4, 1e-6) for n in range(3)},
    }
    found = summarize(modules, 400)
    advice = {kind: (line["advice"]["verdict"], line["advice"]["rank"]) for kind, line in found["types"].items()}
    assert advice == {"q_proj": ("lower", 4), "up_proj": ("lower", 8), "down_proj": ("drop", None)}
    assert (found["all"]["advice"]["rank"], found["all"]["drop"]) == (8, ["down_proj"])
    assert found["all"]["modules"] == 6
    assert found["summary"].startswith("rank 8 is enough: ")
    assert found["summary"].endswith("; try without down_proj")
    assert found["modules"].keys() == modules.keys()
    line = found["types"]["q_proj"]
    assert (line["modules"], line["directions_99"], line["relative_update"]) == (3, 3, 0.02)
    assert summarize({"q_proj": usage(FULL)}, 400)["summary"].startswith("try rank 32: ")


def test_words() -> None:
    verdicts = [("raise", 32), ("lower", 4), ("drop", None), ("fine", None), ("none", None)]
    said = [str(Advice(verdict, "", rank)) for verdict, rank in verdicts]
    assert said == ["try rank 32", "rank 4 is enough", "try without", "fine", "no advice"]


# --- the report


def test_a_report_without_adapters_is_empty() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert rank_report({}, optimizer, 500) == ({}, "", "")
    pissa = PiSSALinear(nn.Linear(8, 8), LoRAConfig(rank=2, init="pissa"), torch.Generator())
    assert rank_report({"q_proj": pissa}, optimizer, 500) == ({}, "", "")


def test_a_frozen_a_has_no_gradient_to_report() -> None:
    adapter = LoRALinear(nn.Linear(8, 8), LoRAConfig(rank=2, freeze_a=True), torch.Generator())
    optimizer = torch.optim.AdamW([adapter.lora_B])
    adapter(torch.ones(3, 8)).sum().backward()
    optimizer.step()
    assert measure_rank_usage(adapter, optimizer).gradient == gradient_stats([adapter.lora_B], optimizer)


def test_adapters_that_train_neither_a_nor_b_are_reported_without_gradients() -> None:
    adapters = adapters_on({"a.q_proj": nn.Linear(20, 20), "b.k_proj": nn.Linear(20, 20)}, rank=4, alpha=8.0)
    for adapter in adapters.values():
        adapter.lora_A.requires_grad_(False)
        adapter.lora_B.requires_grad_(False)
    bias = nn.Parameter(torch.ones(20))
    bias.grad = torch.ones(20)
    optimizer = torch.optim.AdamW([bias])
    optimizer.step()
    values, terminal, _ = rank_report(adapters, optimizer, 500)
    assert [usage["gradient"] for usage in values["adapters"]["modules"].values()] == [None, None]
    assert terminal.endswith("no advice: the update is zero")


def test_an_adapter_of_another_kind_is_measured_by_its_factors() -> None:
    """As LoRA-XS: B R A with only R, (r, r), trained."""

    class Square(LoRALinear):
        def __init__(self, base: nn.Linear, rank: int):
            nn.Module.__init__(self)
            self.base, self.scaling = base, 2.0
            self.down, self.up = random(rank, 20), random(20, rank, seed=1)
            self.square = nn.Parameter(random(rank, rank, seed=2))

        def factors(self) -> tuple[Tensor, Tensor]:
            return self.square @ self.down, self.up

    adapter = Square(nn.Linear(20, 20).requires_grad_(False), 4)
    optimizer = torch.optim.AdamW([adapter.square], lr=0.0)
    adapter.square.grad = random(4, 4, seed=3)
    optimizer.step()
    found = measure_rank_usage(adapter, optimizer)
    whole = 2 * (adapter.up @ adapter.square @ adapter.down).detach().numpy()
    assert found.singular_values == pytest.approx(np.linalg.svd(whole, compute_uv=False)[:4], rel=1e-5)
    assert found.gradient == gradient_stats([adapter.square], optimizer) is not None
    assert rank_report({"q_proj": adapter}, optimizer, 500)[0]


def test_a_report_says_what_the_optimizer_does_not_keep() -> None:
    adapters = adapters_on({"a.q_proj": nn.Linear(20, 20), "b.q_proj": nn.Linear(20, 20)}, rank=4, alpha=8.0)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.copy_(torch.linalg.qr(random(20, 4)).Q)
            adapter.lora_A.copy_(torch.linalg.qr(random(20, 4)).Q.T)
    optimizer = torch.optim.SGD([p for adapter in adapters.values() for p in (adapter.lora_A, adapter.lora_B)])
    values, terminal, markdown = rank_report(adapters, optimizer, 500)
    assert values["adapters"]["types"]["q_proj"]["gradient"] is None
    assert values["adapters"]["types"]["q_proj"]["advice"]["rank"] == 8
    (row,) = [line for line in markdown.splitlines() if line.startswith("| q_proj ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    update = f"{values['adapters']['all']['relative_update']:.2%}"
    assert cells == ["q_proj", "2", "4.0 of 4", "4.0", "4, 4", update, "not kept", "not kept", "try rank 8"]
    assert "Weights after step " in markdown
    assert "try rank 8: " in terminal
    json.dumps(values)


def test_the_demo_reports_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    few = [
        "training.max_steps=3",
        "data.max_samples=60",
        "evaluation.prompts=2",
        "logging.progress_bar=false",
        "logging.plots=none",
    ]
    assert train.main([str(TINY), f"output.dir={run}", *few]) == 0
    found = json.loads((run / "report.json").read_text())["adapters"]

    base = load_file(TINY.parent / "tiny" / "base" / "model.safetensors")
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    assert found["modules"].keys() == names
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "AB")
        sigma = np.linalg.svd(16 * b @ a, compute_uv=False)[:16]  # alpha / r = 256 / 16
        figures, by_hand = found["modules"][name], usage(sigma.tolist())
        weight = np.linalg.norm(base[f"{name}.weight"].double().numpy())
        assert figures["singular_values"] == pytest.approx(sigma)
        assert figures["effective_rank"] == pytest.approx(by_hand.effective_rank)
        assert figures["stable_rank"] == pytest.approx(by_hand.stable_rank)
        assert (figures["directions_90"], figures["directions_99"]) == (by_hand.directions_90, by_hand.directions_99)
        assert figures["relative_update"] == pytest.approx(np.linalg.norm(sigma) / weight, rel=1e-4)
        assert figures["gradient"]["step"] == 3
        assert 0 < figures["gradient"]["signal"] <= 1

    optimizer = load_file(run / "checkpoints" / "step-000003" / "optimizer.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    squares = torch.cat([optimizer[f"{name}.lora_{part}.exp_avg_sq"].flatten() for part in "AB"]).double()
    assert found["modules"][name]["gradient"]["rms"] == pytest.approx((squares.mean() / (1 - 0.999**3)).sqrt().item())

    section = (run / "report.md").read_text().partition("\n## Adapters\n")[2].partition("\n## Data\n")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == list(found["types"])
    assert all(row[-1].strip() == "no advice" for row in rows[2:])
    said = capsys.readouterr().out.splitlines()
    where = next(n for n, line in enumerate(said) if line.startswith("adapters  effective rank "))
    assert said[where + 1] == f"advice    no advice: 3 steps are not enough evidence, {MIN_STEPS} are needed"
    assert said[where - 1] == said[where + 2] == ""
