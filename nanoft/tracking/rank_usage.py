"""Was the rank right? How much of its r directions each adapter used, measured once after training.

The update dW = scaling * B A has at most rank r; its singular values show how much of that is used. They are those of
an r x r matrix, so dW itself is never formed:

    B = Q_B R_B,    A^T = Q_A R_A,    dW = Q_B (scaling * R_B R_A^T) Q_A^T,    Q_B and Q_A with orthonormal columns

How far to trust the advice: directions without energy were not needed. A full spectrum is only a hint, because noise
fills all directions equally: try the larger rank, and trust the validation loss. Early in training a spectrum is no
evidence, because B starts at 0 and AdamW's first step is lr * sign(gradient). AdamW moves parameters equally far for
small and large gradients, so a module can be dropped only if its gradients, known from AdamW's moments, are small, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from nanoft.blocks.trained import Adapter
from nanoft.io.tables import markdown_table
from nanoft.lora import LoRALinear
from nanoft.nf4 import Frozen

MIN_STEPS = 100  # before any advice
MIN_RANK = 4  # a spectrum of fewer values has no tail
NEGLIGIBLE = 0.1  # of the other modules' median, that is 1 % of their energy
LEGEND = """\
Weights after step {step}; medians over the modules of a type; report.json has every module.

- 90 %, 99 %: singular directions that hold this share of the update's energy, in the module that needs the most.
- update: |dW| / |W|.
- gradient, signal: root mean square of the clipped gradients, and their |mean| relative to it, from AdamW's moments.
  Gradients that are pure noise have a signal of about sqrt((1 - beta1) / (1 + beta1)), which is 0.23 for 0.9.
- A full spectrum may be noise: trust the validation loss. With another rank, keep lora.alpha / lora.rank.
"""


@dataclass(frozen=True)
class GradientStats:  # after clipping
    rms: float
    signal: float  # |mean gradient| / |RMS gradient|: 1 if the gradient is constant
    step: int  # number of gradients averaged


@dataclass(frozen=True)
class RankUsage:
    rank: int
    singular_values: list[float]  # of dW, (rank,), descending
    effective_rank: float
    stable_rank: float  # |dW|_F^2 / |dW|_2^2
    directions_90: int  # that hold 90 % of the energy
    directions_99: int
    relative_update: float  # |dW|_F / |W|_F
    gradient: GradientStats | None  # None: the optimizer has no such moments, or no matrix is trained


@dataclass(frozen=True)
class Advice:
    """What to do about the rank of some modules, and why."""

    verdict: str  # raise | lower | drop | fine | none (not enough evidence)
    why: str
    rank: int | None = None  # to try instead

    def __str__(self) -> str:
        words = {"raise": "try rank {}", "lower": "rank {} is enough", "drop": "try without", "none": "no advice"}
        return words.get(self.verdict, self.verdict).format(self.rank)


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
    """How many of the largest singular values hold this share of the energy sum(sigma^2); 0 for a zero matrix."""
    energy = sigma.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if sigma.any() else 0


def weight_norm(linear: Frozen) -> float:
    """|W|_F of a plain or quantized weight."""
    weight = linear.weight.detach() if isinstance(linear, (nn.Linear, nn.Embedding)) else linear.dequantize()
    # 64 rows at a time: on a CPU, a float32 sum over 60 million squares is off by 0.5 %.
    part = torch.empty_like(weight[:64], dtype=torch.float32)  # reused: allocation costs more than the sum
    norms = [part[: len(rows)].copy_(rows).norm() for rows in weight.split(64)]
    return torch.stack(norms).norm().item()


def gradient_stats(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> GradientStats | None:
    """Size and signal of the gradients of all parameters, from AdamW's m and v (Kingma & Ba 2015, algorithm 1).

    m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t); rms = sqrt(mean v^), signal = |m^| / |sqrt(v^)|.
    """
    betas = {p: group["betas"] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    states = [optimizer.state.get(p, {}) if p in betas else {} for p in parameters]
    if not states or not all({"step", "exp_avg", "exp_avg_sq"} <= state.keys() for state in states):
        return None
    squared_means = mean_squares = 0.0
    for p, state in zip(parameters, states, strict=True):
        (beta1, beta2), t = betas[p], int(state["step"])
        squared_means += state["exp_avg"].float().square().sum().item() / (1 - beta1**t) ** 2
        mean_squares += state["exp_avg_sq"].float().sum().item() / (1 - beta2**t)
    signal = math.sqrt(squared_means / mean_squares) if mean_squares else 0.0
    return GradientStats(math.sqrt(mean_squares / sum(p.numel() for p in parameters)), signal, t)


def measure_rank_usage(adapter: LoRALinear, optimizer: torch.optim.Optimizer) -> RankUsage:
    """All figures of one adapter, of any kind whose update is scaling * B A; it may train any part of itself."""
    a, b = adapter.factors()
    sigma = singular_values(a, b, adapter.scaling)
    norm, base = sigma.norm().item(), weight_norm(adapter.base)
    # Matrices only: biases and DoRA's magnitudes are vectors.
    matrices = [p for p in adapter.parameters(recurse=False) if p.requires_grad and p.dim() == 2]
    return RankUsage(
        rank=len(sigma),
        singular_values=sigma.tolist(),
        effective_rank=effective_rank(sigma),
        stable_rank=(norm / sigma[0].item()) ** 2 if norm else 0.0,
        directions_90=directions_for_energy(sigma, 0.90),
        directions_99=directions_for_energy(sigma, 0.99),
        relative_update=norm / base if base else math.inf,
        gradient=gradient_stats(matrices, optimizer),
    )


def advise(modules: Sequence[RankUsage], others: Sequence[RankUsage], step: int) -> Advice:
    """One recommendation for several modules: a lower rank must be enough for all, a higher one is for the median."""
    rank, most = max(m.rank for m in modules), max(m.directions_99 for m in modules)
    enough = 1 << max(most - 1, 0).bit_length()  # the next power of two
    fullness = median(m.effective_rank / m.rank for m in modules)
    tail = median(m.singular_values[-1] / (m.singular_values[0] or 1.0) for m in modules)
    # Update and gradients of each module are far below the others' medians, as far as gradients are known.
    figures = [attrgetter("relative_update"), attrgetter("gradient.rms")]
    known = bool(others) and all(m.gradient for m in (*modules, *others))
    is_negligible = known and all(max(map(f, modules)) < NEGLIGIBLE * median(map(f, others)) for f in figures)
    if step < MIN_STEPS:
        return Advice("none", f"{step} steps are not enough evidence, {MIN_STEPS} are needed")
    if is_negligible:
        return Advice("drop", f"update and gradients are less than {NEGLIGIBLE:.0%} of the other modules'")
    if most == 0:
        return Advice("none", "the update is zero")
    if enough <= rank / 2:  # a smaller saving is not worth another run
        return Advice("lower", f"at most {most} of {rank} directions hold 99 % of the energy", enough)
    if rank < MIN_RANK:
        return Advice("none", f"a spectrum of {rank} directions is not enough evidence")
    if fullness >= 0.9 and tail >= 0.25:  # the spectrum was cut off before it decayed
        why = f"the spectrum is full (effective rank {fullness:.0%} of {rank}), without decay"
        return Advice("raise", why, 2 * rank)
    return Advice("fine", f"{most} of {rank} directions hold 99 % of the energy, and the spectrum decays")


def aggregate(modules: Sequence[RankUsage]) -> dict[str, Any]:
    """Medians over several modules; of rank and directions, the maximum."""
    largest = {name: max(getattr(m, name) for m in modules) for name in ("rank", "directions_90", "directions_99")}
    names = ("effective_rank", "stable_rank", "relative_update")
    medians = {name: median(getattr(m, name) for m in modules) for name in names}
    known = [m.gradient for m in modules if m.gradient]
    rms, signal = (median(getattr(g, name) for g in known) if known else None for name in ("rms", "signal"))
    return {"modules": len(modules), **largest, **medians, "gradient": rms, "signal": signal}


def summarize(modules: dict[str, RankUsage], step: int) -> dict[str, Any]:
    """The `adapters` entry of report.json: figures of each module, of each type of module, and of the whole run."""
    types: dict[str, list[RankUsage]] = {}  # q_proj, ..., down_proj
    for name, usage in modules.items():
        types.setdefault(name.rpartition(".")[2], []).append(usage)
    lines = {}
    for kind, members in types.items():
        others = [m for other in types if other != kind for m in types[other]]
        lines[kind] = {**aggregate(members), "advice": asdict(advise(members, others, step))}
    drop = [kind for kind in types if lines[kind]["advice"]["verdict"] == "drop"]
    kept = [m for kind in types if kind not in drop for m in types[kind]]
    advice = advise(kept, [], step)
    return {
        "summary": f"{advice}: {advice.why}" + (f"; try without {', '.join(drop)}" if drop else ""),
        "step": step,
        "all": {**aggregate(kept), "advice": asdict(advice), "drop": drop},
        "types": lines,
        "modules": {name: asdict(usage) for name, usage in modules.items()},
    }


def rank_report(
    adapters: dict[str, Adapter], optimizer: torch.optim.Optimizer, step: int
) -> tuple[dict[str, Any], str, str]:
    """How the adapters used their rank: an entry of report.json, two lines for the terminal, a section of report.md.

    Empty without adapters, or with PiSSA, whose update has rank 2r. The optimizer's moments may be of a later step.
    """
    low_rank = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, LoRALinear)}
    if not low_rank or any(adapter.RANKS != 1 for adapter in low_rank.values()):
        return {}, "", ""
    usages = {name: measure_rank_usage(adapter, optimizer) for name, adapter in low_rank.items()}
    values = summarize(usages, step)
    summary, run = values["summary"], values["all"]
    used, moved = f"{run['effective_rank']:.1f} of {run['rank']}", f"{run['relative_update']:.2%} of the base"
    terminal = f"\n\nadapters  effective rank {used}, update {moved} (medians)\nadvice    {summary}"
    header = ["", "modules", "effective rank", "stable rank", "90 %, 99 %", "update", "gradient", "signal", "advice"]
    rows = []
    for kind, line in values["types"].items():
        ranks = [f"{line['effective_rank']:.1f} of {line['rank']}", f"{line['stable_rank']:.1f}"]
        update = [f"{line['directions_90']}, {line['directions_99']}", f"{line['relative_update']:.2%}"]
        known = line["gradient"] is not None
        gradient = [f"{line['gradient']:.1e}", f"{line['signal']:.2f}"] if known else ["not kept"] * 2
        rows.append([kind, str(line["modules"]), *ranks, *update, *gradient, str(Advice(**line["advice"]))])
    section = f"\n## Adapters\n\n{summary}.\n\n{markdown_table(header, rows)}\n\n{LEGEND.format(step=step)}"
    return {"adapters": values}, terminal, section
