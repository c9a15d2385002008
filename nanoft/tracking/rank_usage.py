"""Was the rank right? Measure after training how many of its r directions each adapter used.

The update dW = scaling * B A has at most rank r; its singular values show how much of that is used. They are those of
an r x r matrix, so dW itself is never formed:

    B = Q_B R_B,    A^T = Q_A R_A,    dW = Q_B (scaling * R_B R_A^T) Q_A^T,    Q_B and Q_A with orthonormal columns

How reliable is the advice? Directions without energy were not needed. A full spectrum is only a hint, because noise
fills all directions equally: try the larger rank, and trust the validation loss. Early in training a spectrum proves
nothing, because B starts at 0 and AdamW's first step is lr * sign(gradient).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from nanoft.blocks.trained import Adapter
from nanoft.io.tables import markdown_table
from nanoft.lora import LoRALinear

MIN_STEPS = 100  # before any advice
MIN_RANK = 4  # a spectrum of fewer values has no tail
LEGEND = """\
Weights after step {step}; medians over the modules of a type; report.json has every module.

- 99 %: singular directions that hold this share of the update's energy, in the module that needs the most.
- A full spectrum may be noise: trust the validation loss. With another rank, keep lora.alpha / lora.rank.
"""


@dataclass(frozen=True)
class RankUsage:
    rank: int
    singular_values: list[float]  # of dW, (rank,), descending
    effective_rank: float
    directions_99: int  # that hold 99 % of the energy


def singular_values(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Singular values of scaling * B A, (r,) float64, descending, from a = A, (r, in), and b = B, (out, r)."""
    r_b, r_a = (torch.linalg.qr(m.detach().cpu().double(), mode="r").R for m in (b, a.T))  # (min(r, out or in), r)
    core = torch.zeros(len(a), len(a), dtype=torch.float64)
    core[: len(r_b), : len(r_a)] = scaling * r_b @ r_a.T
    return torch.linalg.svdvals(core)


def effective_rank(sigma: Tensor) -> float:
    """exp(-sum p ln p) with p = sigma / sum(sigma) (Roy & Vetterli 2007); 0 for a zero matrix."""
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item() if sigma.any() else 0.0


def directions_for_energy(sigma: Tensor, share: float) -> int:
    """The number of largest singular values with this share of the energy sum(sigma^2); 0 for a zero matrix."""
    energy = sigma.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if sigma.any() else 0


def measure_rank_usage(adapter: LoRALinear) -> RankUsage:
    sigma = singular_values(*adapter.factors(), adapter.scaling)
    return RankUsage(len(sigma), sigma.tolist(), effective_rank(sigma), directions_for_energy(sigma, 0.99))


def advise(modules: Sequence[RankUsage], step: int) -> tuple[str, str]:
    """Advice on the rank of several modules, and the reason; a lower rank must be enough for all of them."""
    rank, most = max(m.rank for m in modules), max(m.directions_99 for m in modules)
    enough = 1 << max(most - 1, 0).bit_length()  # the next power of two
    fullness = median(m.effective_rank / m.rank for m in modules)
    tail = median(m.singular_values[-1] / (m.singular_values[0] or 1.0) for m in modules)
    if step < MIN_STEPS:
        return "no advice", f"{step} steps are not enough evidence; {MIN_STEPS} are needed"
    if most == 0:
        return "no advice", "the update is zero"
    if enough <= rank / 2:  # a smaller saving is not worth another run
        return f"rank {enough} is enough", f"at most {most} of {rank} directions hold 99 % of the energy"
    if rank < MIN_RANK:
        return "no advice", f"a spectrum of {rank} directions is not enough evidence"
    if fullness >= 0.9 and tail >= 0.25:  # the spectrum was cut off before it decayed
        return f"try rank {2 * rank}", f"the spectrum is full (effective rank {fullness:.0%} of {rank}), without decay"
    return "fine", f"{most} of {rank} directions hold 99 % of the energy, and the spectrum decays"


def summarize(modules: Sequence[RankUsage], step: int) -> dict[str, Any]:
    """The largest rank and number of directions of several modules, their median effective rank, and advice."""
    advice, why = advise(modules, step)
    return {
        "modules": len(modules),
        "rank": max(m.rank for m in modules),
        "directions_99": max(m.directions_99 for m in modules),
        "effective_rank": median(m.effective_rank for m in modules),
        "advice": advice,
        "why": why,
    }


def rank_report(adapters: dict[str, Adapter], step: int) -> tuple[dict[str, Any], str, str]:
    """How the adapters used their rank: an entry of report.json, two lines for the terminal, a section of report.md.

    Empty without adapters, or with PiSSA, whose update has rank 2r.
    """
    low_rank = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LoRALinear)}
    if not low_rank or any(adapter.RANKS != 1 for adapter in low_rank.values()):
        return {}, "", ""
    usages = {name: measure_rank_usage(adapter) for name, adapter in low_rank.items()}
    types: dict[str, list[RankUsage]] = {}  # q_proj, ..., down_proj
    for name, usage in usages.items():
        types.setdefault(name.rpartition(".")[2], []).append(usage)
    run = summarize([*usages.values()], step)
    lines = {kind: summarize(members, step) for kind, members in types.items()}
    summary, used = f"{run['advice']}: {run['why']}", "{effective_rank:.1f} of {rank}"
    terminal = f"\n\nadapters  effective rank {used.format(**run)} (median)\nadvice    {summary}"
    rows = [
        [kind, str(line["modules"]), used.format(**line), str(line["directions_99"]), line["advice"]]
        for kind, line in lines.items()
    ]
    table = markdown_table(["", "modules", "effective rank", "99 %", "advice"], rows)
    section = f"\n## Adapters\n\n{summary}.\n\n{table}\n\n{LEGEND.format(step=step)}"
    each = {name: asdict(usage) for name, usage in usages.items()}
    return {"adapters": {"step": step, "all": run, "types": lines, "modules": each}}, terminal, section
