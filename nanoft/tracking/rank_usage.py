"""Was the rank right? What each adapter made of its r directions, measured once, when training is over.

The update dW = scaling * B A has rank r at most, and its singular values say how much of that is used. They are
those of an r x r matrix; dW itself is never formed:

    B = Q_B R_B,    A^T = Q_A R_A,    dW = Q_B (scaling * R_B R_A^T) Q_A^T,    Q_B and Q_A with orthonormal columns

Beside them stand the size of the update relative to W, and what AdamW's running means say about the gradients; nothing
is recorded while training runs.

How far to trust the advice:

- Directions without energy were not needed, so much is certain. A full spectrum is a hint only, because noise fills all
  directions alike: try the larger rank, and believe the validation loss.
- A young adapter says nothing. B starts at 0 and its first gradients share few directions, which makes the update look
  poor; AdamW's very first step is lr * sign(gradient), which makes it look rich whatever the gradient is. In the demo
  (rank 16) the effective rank falls until step 10 and stays where it is from step 100 on: no advice before that.
- AdamW moves parameters by the same amount whether their gradients are small or large. So a module can be dropped only
  if its gradients are negligible as well as its update, and only a run without it proves that.
- Singular values know one run, not a higher learning rate, more data or another seed; and "fine" is not "best". In the
  demo rank 4 is advised to go up, 16 and 64 are fine; their validation losses are 0.012, 0.0046 and 0.0018.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from nanoft.io.tables import markdown_table
from nanoft.lora import LoRALinear
from nanoft.nf4 import Frozen

MIN_STEPS = 100  # no advice before: see above
MIN_RANK = 4  # a spectrum of fewer values has no tail to look at
FULL = 0.9  # a spectrum is full if its effective rank is this share of r ...
TAIL = 0.25  # ... and its smallest value this share of its largest: it was cut off where it had not yet decayed
SPARE = 0.5  # a rank is too high if this share of it is enough; less saves too little to be worth another run
NEGLIGIBLE = 0.1  # of the other modules' median: a hundredth of their energy
LEGEND = """\
Weights after step {step}; medians over the modules of a type; every module is in report.json.

- 90 %, 99 %: singular directions that hold so much of the update's energy, in the module that needs most.
- update: |dW| / |W|.
- gradient, signal: {moments}
- A full spectrum may be noise: believe the validation loss. With another rank, keep lora.alpha / lora.rank.
"""
KEPT = """\
root mean square of the clipped gradients, and their |mean| beside it, from AdamW's running means after
  step {step}. Mere noise has a signal of {noise:.2f}; it is less where gradients used to be larger."""


@dataclass(frozen=True)
class GradientStats:
    """What AdamW's running means say about an adapter's gradients, which are the clipped ones."""

    rms: float  # root of the mean squared gradient
    signal: float  # |mean gradient| / |RMS gradient|: 1 if it is always the same
    noise: float  # the signal of gradients that are independent of one another and zero on average
    step: int  # how many gradients the means have seen


@dataclass(frozen=True)
class RankUsage:
    """What one adapter made of its rank."""

    rank: int
    singular_values: list[float]  # of dW, `rank` of them, falling
    effective_rank: float
    stable_rank: float  # |dW|_F^2 / |dW|_2^2
    directions_90: int  # that hold 90 % of the energy
    directions_99: int
    relative_update: float  # |dW|_F / |W|_F
    gradient: GradientStats | None  # None: the optimizer does not keep such means


@dataclass(frozen=True)
class Advice:
    """What to do about the rank of some modules, and why."""

    verdict: str  # raise | lower | drop | fine | none (too little to go by)
    why: str
    rank: int | None = None  # to try instead

    def __str__(self) -> str:
        words = {"raise": "try rank {}", "lower": "rank {} would do", "drop": "try without", "none": "no advice"}
        return words.get(self.verdict, self.verdict).format(self.rank)


def singular_values(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Singular values of scaling * B A, falling, from the triangles of B and A^T.

    Args:
        a: (r, in).
        b: (out, r).
    Returns:
        (r,) float64 on the CPU; the last ones are zero if in or out is less than r.
    """
    r_b, r_a = (torch.linalg.qr(m.detach().cpu().double(), mode="r").R for m in (b, a.T))  # (min(r, out or in), r)
    core = torch.zeros(len(a), len(a), dtype=torch.float64)
    core[: len(r_b), : len(r_a)] = scaling * r_b @ r_a.T
    return torch.linalg.svdvals(core)


def effective_rank(sigma: Tensor) -> float:
    """exp(-sum p ln p) with p = sigma / sum(sigma) (Roy & Vetterli 2007); 0 for a matrix of zeros."""
    return torch.special.entr(sigma / sigma.sum()).sum().exp().item() if sigma.any() else 0.0


def directions_for_energy(sigma: Tensor, share: float) -> int:
    """How many of the largest singular values hold that share of the energy, sum(sigma^2); 0 for a matrix of zeros."""
    energy = sigma.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if sigma.any() else 0


def weight_norm(linear: Frozen) -> float:
    """|W|_F, in one pass over the weight, as every micro-batch makes two; a packed weight is unpacked for it."""
    weight = linear.weight.detach() if isinstance(linear, nn.Linear) else linear.dequantize()
    # a few rows at a time: on a CPU, a float32 sum over 60 million squares is off by half a per cent
    part = torch.empty_like(weight[:64], dtype=torch.float32)  # one for all: new memory costs more than the sum
    norms = [part[: len(rows)].copy_(rows).norm() for rows in weight.split(64)]
    return torch.stack(norms).norm().item()


def gradient_stats(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> GradientStats | None:
    """Size and signal of the gradients over all the parameters, from AdamW's m and v (Kingma & Ba 2015, algorithm 1).

    m^ = m / (1 - beta1^t), v^ = v / (1 - beta2^t); rms = sqrt(mean v^), signal = |m^| / |sqrt(v^)|. Independent
    gradients of mean zero have signal^2 = (1 - beta1)(1 + beta1^t) / ((1 + beta1)(1 - beta1^t)) on average: the noise.
    """
    betas = {p: group["betas"] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    squared_means, mean_squares, count = 0.0, 0.0, 0
    for p in parameters:
        state = optimizer.state.get(p, {})
        if p not in betas or not {"step", "exp_avg", "exp_avg_sq"} <= state.keys():
            return None
        (beta1, beta2), t = betas[p], int(state["step"])
        squared_means += state["exp_avg"].float().square().sum().item() / (1 - beta1**t) ** 2
        mean_squares += state["exp_avg_sq"].float().sum().item() / (1 - beta2**t)
        count += p.numel()
    noise = math.sqrt((1 - beta1) * (1 + beta1**t) / ((1 + beta1) * (1 - beta1**t)))
    signal = math.sqrt(squared_means / mean_squares) if mean_squares else 0.0
    return GradientStats(math.sqrt(mean_squares / count), signal, noise, t)


def measure_rank_usage(adapter: LoRALinear, optimizer: torch.optim.Optimizer) -> RankUsage:
    """All figures of one adapter."""
    sigma = singular_values(adapter.lora_A, adapter.lora_B, adapter.scaling)
    norm, base = sigma.norm().item(), weight_norm(adapter.base)
    return RankUsage(
        rank=len(sigma),
        singular_values=sigma.tolist(),
        effective_rank=effective_rank(sigma),
        stable_rank=(norm / sigma[0].item()) ** 2 if norm else 0.0,
        directions_90=directions_for_energy(sigma, 0.90),
        directions_99=directions_for_energy(sigma, 0.99),
        relative_update=norm / base if base else math.inf,
        gradient=gradient_stats([p for p in (adapter.lora_A, adapter.lora_B) if p.requires_grad], optimizer),
    )


def advise(modules: Sequence[RankUsage], others: Sequence[RankUsage], step: int) -> Advice:
    """One recommendation for some modules: to lower the rank must suit all, to raise it must suit the median.

    Args:
        others: the modules beside which these may be negligible; may be empty.
        step: optimizer steps that made the weights.
    """
    rank, most = max(m.rank for m in modules), max(m.directions_99 for m in modules)
    enough = 1 << max(most - 1, 0).bit_length()  # the next power of two: a little room, and what people choose from
    fullness = median(m.effective_rank / m.rank for m in modules)
    tail = median(m.singular_values[-1] / (m.singular_values[0] or 1.0) for m in modules)
    if step < MIN_STEPS:
        return Advice("none", f"{step} steps are too few to judge by, {MIN_STEPS} are needed")
    if others and is_negligible(modules, others):
        return Advice("drop", f"update and gradients are less than {NEGLIGIBLE:.0%} of the other modules'")
    if most == 0:
        return Advice("none", "the update is zero")
    if enough <= SPARE * rank:
        return Advice("lower", f"99 % of the energy lies in {most} of {rank} directions at most", enough)
    if rank < MIN_RANK:
        return Advice("none", f"{rank} directions are too few to judge by")
    if fullness >= FULL and tail >= TAIL:
        return Advice("raise", f"the spectrum is full (effective rank {fullness:.0%} of {rank}) to its end", 2 * rank)
    return Advice("fine", f"99 % of the energy needs {most} of {rank} directions, and the spectrum decays")


def is_negligible(modules: Sequence[RankUsage], others: Sequence[RankUsage]) -> bool:
    """Whether update and gradients of each are far below the others' medians; not if gradients are unknown."""

    def far_below(mine: list[float], theirs: list[float]) -> bool:
        return max(mine) < NEGLIGIBLE * median(theirs)

    updates = [[m.relative_update for m in side] for side in (modules, others)]
    gradients = [[m.gradient.rms for m in side if m.gradient] for side in (modules, others)]
    known = sum(map(len, gradients)) == len(modules) + len(others)
    return known and far_below(*updates) and far_below(*gradients)


def aggregate(modules: Sequence[RankUsage]) -> dict[str, Any]:
    """Several modules in one: medians; of the directions, the most that one of them needs."""
    gradients = [m.gradient for m in modules if m.gradient]
    return {
        "modules": len(modules),
        "rank": max(m.rank for m in modules),
        "effective_rank": median(m.effective_rank for m in modules),
        "stable_rank": median(m.stable_rank for m in modules),
        "directions_90": max(m.directions_90 for m in modules),
        "directions_99": max(m.directions_99 for m in modules),
        "relative_update": median(m.relative_update for m in modules),
        "gradient": median(g.rms for g in gradients) if gradients else None,
        "signal": median(g.signal for g in gradients) if gradients else None,
    }


def summarize(modules: dict[str, RankUsage], step: int) -> dict[str, Any]:
    """The `adapters` of report.json: each module's figures, a line for each type of module, one for the whole run."""
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
    said = f"{advice}: {advice.why}" + (f"; try without {', '.join(drop)}" if drop else "")
    return {
        "summary": said,
        "step": step,
        "all": {**aggregate(kept), "advice": asdict(advice), "drop": drop},
        "types": lines,
        "modules": {name: asdict(usage) for name, usage in modules.items()},
    }


def rank_report(
    adapters: dict[str, LoRALinear], optimizer: torch.optim.Optimizer, step: int
) -> tuple[dict[str, Any], str, str]:
    """How the adapters used their rank: an entry for report.json, two lines for the terminal, a section of report.md.

    Args:
        adapters: by module name; without any, or with PiSSA, whose change has twice the rank, all that is returned is
            empty.
        step: of the weights; the optimizer's means may be those of a later one.
    """
    if not adapters or any(adapter.FACTORS != LoRALinear.FACTORS for adapter in adapters.values()):
        return {}, "", ""
    values = summarize({name: measure_rank_usage(adapter, optimizer) for name, adapter in adapters.items()}, step)
    said, whole, means = values["summary"], values["all"], next(iter(values["modules"].values()))["gradient"]
    used = f"effective rank {whole['effective_rank']:.1f} of {whole['rank']}"
    terminal = f"\n\nadapters  {used}, update {whole['relative_update']:.2%} of the base (medians)\nadvice    {said}"
    header = ["", "modules", "effective rank", "stable rank", "90 %, 99 %", "update", "gradient", "signal", "advice"]
    rows = [[kind, *table_row(line)] for kind, line in values["types"].items()]
    legend = LEGEND.format(step=step, moments=KEPT.format(**means) if means else "not kept by this optimizer.")
    return {"adapters": values}, terminal, f"\n## Adapters\n\n{said}.\n\n{markdown_table(header, rows)}\n\n{legend}"


def table_row(line: dict[str, Any]) -> list[str]:
    """A line of `summarize` for a table."""
    known = line["gradient"] is not None
    return [
        str(line["modules"]),
        f"{line['effective_rank']:.1f} of {line['rank']}",
        f"{line['stable_rank']:.1f}",
        f"{line['directions_90']}, {line['directions_99']}",
        f"{line['relative_update']:.2%}",
        f"{line['gradient']:.1e}" if known else "not kept",
        f"{line['signal']:.2f}" if known else "not kept",
        str(Advice(**line["advice"])),
    ]
