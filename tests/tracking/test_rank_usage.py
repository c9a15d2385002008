"""Rank usage against numpy's SVD of the whole update, entropy by hand, known spectra."""

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
from nanoft.nf4 import quantize
from nanoft.tracking.rank_usage import (
    MIN_STEPS,
    RankUsage,
    advise,
    directions_for_energy,
    effective_rank,
    measure_rank_usage,
    rank_report,
    singular_values,
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


def usage(sigma: list[float]) -> RankUsage:
    """A module with this spectrum, all figures by hand."""
    rank, total, energy = len(sigma), sum(sigma), sum(s * s for s in sigma)
    entropy = -sum(s / total * math.log(s / total) for s in sigma if s)
    cumulative = [sum(s * s for s in sigma[: k + 1]) for k in range(rank)]
    held = next(k + 1 for k in range(rank) if cumulative[k] >= 0.99 * energy)
    return RankUsage(rank, sigma, math.exp(entropy), held)


ZERO = RankUsage(16, [0.0] * 16, 0.0, 0)


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
    for share in (0.5, 0.9, 0.99):
        held, energy = directions_for_energy(sigma, share), math.fsum(s * s for s in values)
        assert math.fsum(s * s for s in values[:held]) >= share * energy * (1 - 1e-12)
        assert math.fsum(s * s for s in values[: held - 1]) <= share * energy * (1 + 1e-12)


# --- one adapter


@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_is_measured_as_its_whole_update_says(packed: bool) -> None:
    base: Any = quantize(random(96, 64), ("nf4", False), torch.float32) if packed else nn.Linear(64, 96)
    (adapter,) = adapters_on({"q_proj": base}, rank=6, alpha=9.0).values()
    with torch.no_grad():
        adapter.lora_B.copy_(random(96, 6, seed=5))
    found = measure_rank_usage(adapter)
    whole = 1.5 * (adapter.lora_B.double() @ adapter.lora_A.double()).detach().numpy()
    sigma = np.linalg.svd(whole, compute_uv=False)[:6]
    assert found.singular_values == pytest.approx(sigma)
    by_hand = usage(found.singular_values)
    assert (found.rank, found.directions_99) == (6, by_hand.directions_99)
    assert found.effective_rank == pytest.approx(by_hand.effective_rank)


def adapters_on(linears: dict[str, nn.Module], rank: int, alpha: float) -> dict[str, LoRALinear]:
    """Fresh adapters on linears of these dotted names."""
    model = nn.Module()
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        if parent and not hasattr(model, parent):
            model.add_module(parent, nn.Module())
        model.get_submodule(parent).add_module(last, linear)
    return inject_lora(model, LoRAConfig(rank=rank, alpha=alpha, target_modules=tuple(linears)), seed=0)


def test_a_fresh_adapter_has_no_update() -> None:
    (adapter,) = adapters_on({"q_proj": nn.Linear(8, 8)}, rank=4, alpha=8.0).values()
    found = measure_rank_usage(adapter)
    assert (found.effective_rank, found.directions_99) == (0, 0)


# --- the advice

FULL = [1.2 - 0.02 * k for k in range(16)]
DECAYING = [0.8**k for k in range(16)]
TAILED = [1.0] * 15 + [0.1]  # effective rank 15.3, but it ends


def low(rank: int, of: int = 16) -> list[float]:
    return [1.0] * rank + [1e-6] * (of - rank)


@pytest.mark.parametrize(
    ("sigmas", "advice"),
    [
        ([low(1)], "rank 1 is enough"),
        ([low(3)], "rank 4 is enough"),
        ([low(8)], "rank 8 is enough"),
        ([low(9)], "fine"),
        ([low(5, 32)], "rank 8 is enough"),
        ([low(3), low(6), low(2)], "rank 8 is enough"),  # it must suit all
        ([low(3), low(9), low(3)], "fine"),
        ([FULL], "try rank 32"),
        ([[1.0] * 16], "try rank 32"),
        ([FULL, FULL, DECAYING], "try rank 32"),  # the median decides
        ([FULL, DECAYING, DECAYING], "fine"),
        ([DECAYING], "fine"),
        ([TAILED], "fine"),
        ([[1.0] * 4], "try rank 8"),
        ([[1.0] * 3], "no advice"),
        ([[1.0]], "no advice"),
        ([[1.0, 1e-6]], "rank 1 is enough"),
        ([low(3), low(3, 8)], "rank 4 is enough"),
    ],
)
def test_advice_on_known_spectra(sigmas: list[list[float]], advice: str) -> None:
    usages = [usage(sigma) for sigma in sigmas]
    assert advise(usages, MIN_STEPS)[0] == advice
    assert advise(usages, MIN_STEPS - 1)[0] == "no advice"


def test_zero_updates_get_no_advice_and_do_not_hinder_the_others() -> None:
    assert advise([ZERO, ZERO], 500)[0] == "no advice"
    assert advise([ZERO, usage(low(3)), usage(low(3))], 500) == advise([usage(low(3))], 500)
    assert advise([ZERO, ZERO, usage(FULL)], 500)[0] == "fine"  # the median is not full


# --- the report


def test_a_report_without_adapters_is_empty() -> None:
    assert rank_report({}, 500) == ({}, "", "")
    pissa = PiSSALinear(nn.Linear(8, 8), LoRAConfig(rank=2, init="pissa"), torch.Generator())
    assert rank_report({"q_proj": pissa}, 500) == ({}, "", "")


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
    found = measure_rank_usage(adapter)
    whole = 2 * (adapter.up @ adapter.square @ adapter.down).detach().numpy()
    assert found.singular_values == pytest.approx(np.linalg.svd(whole, compute_uv=False)[:4], rel=1e-5)
    assert rank_report({"q_proj": adapter}, 500)[0]


def test_a_report_judges_each_type_alone() -> None:
    linears = {name: nn.Linear(20, 20) for name in ("a.q_proj", "b.q_proj", "a.up_proj")}
    adapters = adapters_on(linears, rank=4, alpha=8.0)
    with torch.no_grad():
        for name, adapter in adapters.items():
            adapter.lora_B.copy_(torch.linalg.qr(random(20, 4)).Q)
            adapter.lora_A.copy_(torch.linalg.qr(random(20, 4)).Q.T)
            adapter.lora_A[1 if "up" in name else 4 :] = 0
    values, terminal, markdown = rank_report(adapters, 500)
    found = values["adapters"]
    assert {kind: line["advice"] for kind, line in found["types"].items()} == {
        "q_proj": "try rank 8", "up_proj": "rank 1 is enough",
    }  # fmt: skip
    (row,) = [line for line in markdown.splitlines() if line.startswith("| q_proj ")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "q_proj",
        "2",
        "4.0 of 4",
        "4",
        "try rank 8",
    ]
    assert "Weights after step 500; " in markdown
    assert "advice    try rank 8: " in terminal  # the median of all three
    assert found["modules"].keys() == adapters.keys()
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

    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors}
    assert found["modules"].keys() == names
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "AB")
        sigma = np.linalg.svd(16 * b @ a, compute_uv=False)[:16]  # alpha / r = 256 / 16
        figures, by_hand = found["modules"][name], usage(sigma.tolist())
        assert figures["singular_values"] == pytest.approx(sigma)
        assert figures["effective_rank"] == pytest.approx(by_hand.effective_rank)
        assert figures["directions_99"] == by_hand.directions_99

    section = (run / "report.md").read_text().partition("\n## Adapters\n")[2].partition("\n## Data\n")[0]
    rows = [line.strip("| ").split("|") for line in section.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == list(found["types"])
    assert all(row[-1].strip() == "no advice" for row in rows[2:])
    said = capsys.readouterr().out.splitlines()
    where = next(n for n, line in enumerate(said) if line.startswith("adapters  effective rank "))
    assert said[where + 1] == f"advice    no advice: 3 steps are not enough evidence; {MIN_STEPS} are needed"
    assert said[where - 1] == said[where + 2] == ""
