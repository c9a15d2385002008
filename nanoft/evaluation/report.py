"""The evaluation report: is the model better, by how much, how certain is that, and under which conditions?

The verdict is one sentence and never claims more than the intervals do: better or worse only if the whole 95 % interval
lies on one side of zero change. It is followed by tables, breakdowns, possible leakage (evaluation prompts in the
training data), and everything needed to reproduce the figures.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanoft.config import Config
from nanoft.evaluation.evaluate import PERPLEXITIES, EvalResult
from nanoft.io.tables import format_duration, markdown_table, wrap
from nanoft.metrics.answers import token_f1
from nanoft.metrics.bootstrap import Comparison, Figure, compare, interval
from nanoft.perplexity import safe_exp

STOP_RATE = 0.95  # a trained model below it probably learned not to stop
FORGETTING = 0.05  # warn from this relative rise of the perplexity of a general text
WORST = 10  # answers listed
OUTCOMES = ("wins", "losses", "ties")  # of tuned against base, per prompt

Groups = dict[str, dict[str, Any]]  # name of a group -> its figures


@dataclass(frozen=True)
class ReportInputs:
    name: str
    tuned: EvalResult
    base: EvalResult | None = None
    primary: str = "exact_match"  # the metric that decides which answer wins
    limit: int | None = None  # evaluation.max_new_tokens, to check the stop rate of a trained model
    groups: dict[str, list[str]] = field(default_factory=dict)  # a field -> its value for each sample
    leakage: dict[str, Any] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    curves: str = ""  # Markdown
    provenance: dict[str, Any] = field(default_factory=dict)
    shown: int = 3  # answers shown side by side
    seed: int = 0


def report(inputs: ReportInputs) -> tuple[dict[str, Any], str, str]:
    """The object of report.json, the text for the terminal, and report.md."""
    before, after, outcome = inputs.base.figures if inputs.base else {}, inputs.tuned.figures, outcomes(inputs)
    compared = {name: compare(before[name], after[name], inputs.seed) for name in after if name in before}
    values: dict[str, Any] = {
        "verdict": verdict(inputs, compared), "warnings": warnings(inputs, compared),
        "changes": {name: dataclasses.asdict(c) for name, c in compared.items()},
        "by": breakdowns(inputs), "answers": answers(inputs, outcome),
        "leakage": inputs.leakage, "training": inputs.training, "cost": cost(inputs), "provenance": inputs.provenance,
    }  # fmt: skip
    won = [f"answers   {values['answers']['win_rate']['said']}"] if outcome else []
    lines = [f"verdict   {values['verdict']}", *won, *(f"warning: {line}" for line in values["warnings"])]
    head = "\n".join(wrap(line, 10) for line in lines)
    main, samples = comparison(inputs, compared), side_by_side(inputs.base, inputs.tuned, range(inputs.shown))
    by = {name: _breakdown(inputs, name, groups) for name, groups in values["by"].items()}
    terminal = f"\n{main}\n\n{head}\n{''.join(by[name] for name in inputs.groups if name in by)}\n{samples}".rstrip()
    evaluated = {**({"base": inputs.base.to_dict()} if inputs.base else {}), "tuned": inputs.tuned.to_dict()}
    evaluated |= {name: value for name, value in values.items() if value}
    return evaluated, terminal, _markdown(inputs, values, main + "\n", "".join(by.values()))


# ---- The verdict


def verdict(inputs: ReportInputs, compared: dict[str, Comparison]) -> str:
    """One sentence: better, worse, both, or no clear difference; with the intervals of the figures that changed."""
    if inputs.base is None:
        return "none: the base was not evaluated"
    likelihood = "pair_accuracy" if "pair_accuracy" in compared else "loss"  # both answers may become less likely
    decisive = [name for name in dict.fromkeys((likelihood, inputs.primary)) if name in compared]
    if not decisive:
        return "none: there is no validation data"
    figures = inputs.tuned.figures
    clear = {name: way for name in decisive if (way := _direction(figures[name], compared[name]))}
    changed = [*clear] or [name for name in decisive if compared[name].change.value != 0] or decisive[:1]
    words = {(): "no clear difference", (1,): "better", (-1,): "worse", (-1, 1): "better in one, worse in the other"}
    described = " and ".join(_describe(name, compared[name], figures[name]) for name in changed)
    return f"{words[tuple(sorted(set(clear.values())))]}: {described}"


def _direction(figure: Figure, c: Comparison) -> int:
    """1: the whole interval is an improvement; -1: a deterioration; 0: it contains zero, or no loss is finite."""
    finite = [math.isfinite(one.value) for one in (c.base, c.tuned)]
    if not all(finite):  # a loss that is not finite is worse than any finite one
        return finite[1] - finite[0]
    sign = -1 if figure.unit == "nats" else 1
    return sign * ((c.change.low > 0) - (c.change.high < 0))


def _describe(name: str, c: Comparison, figure: Figure) -> str:
    before, after, change, span, p = _cells(c, figure.unit)
    unit = "samples" if name in PERPLEXITIES else "pairs" if name == "pair_accuracy" else "prompts"
    count = f"{len(figure.parts):,} {unit}"
    return f"{label(name)} from {before} to {after} ({change}, 95 % interval {span}, p {p}, {count})"


def warnings(inputs: ReportInputs, compared: dict[str, Comparison]) -> list[str]:
    """Warnings to read before relying on the verdict."""
    found, figures = [], inputs.tuned.figures
    if inputs.limit and "stop_rate" in figures and figures["stop_rate"].value < STOP_RATE:
        found.append(
            f"only {figures['stop_rate'].value:.1%} of the answers stop within {inputs.limit} tokens: "
            "raise evaluation.max_new_tokens, or check that training samples end their turns (train.py --show-batch)"
        )
    if "general_loss" in compared and (rise := _relative(compared["general_loss"].change.value)) > FORGETTING:
        found.append(
            f"the model forgets: perplexity of the general text rises by {rise:.1%}: "
            "lower training.learning_rate or lora.rank, or mix in general data"
        )
    if inputs.leakage.get("exact") or inputs.leakage.get("near"):
        found.append(inputs.leakage["said"])
    return found + [f"{label(name)} is not finite" for name, f in figures.items() if not math.isfinite(f.value)]


# ---- Tables


def label(name: str) -> str:
    return PERPLEXITIES.get(name, name).replace("_", " ")


def comparison(inputs: ReportInputs, compared: dict[str, Comparison]) -> str:
    """Base and tuned as a table, with a dash for figures that were not measured."""
    rows = []
    for name, figure in inputs.tuned.figures.items():
        if inputs.base is None:
            i = interval(figure, inputs.seed)
            span = "-" if math.isnan(i.low) else f"{_shown(i.low, figure.unit)} to {_shown(i.high, figure.unit)}"
            rows.append([label(name), _shown(i.value, figure.unit), span])
        elif name in compared:
            rows.append([label(name), *_cells(compared[name], figure.unit)])
        else:
            rows.append([label(name), "-", _shown(figure.value, figure.unit), "-", "-", "-"])
    header = ["", "base", "tuned", "change", "95 % interval", "p"] if inputs.base else ["", "tuned", "95 % interval"]
    return markdown_table(header, rows) if rows else "nothing was evaluated: there is no validation data"


def _cells(c: Comparison, unit: str) -> list[str]:
    """Base, tuned, change, its interval, p."""
    values = (c.change.value, c.change.low, c.change.high)
    change, low, high = (_change(value, unit).replace(" points", " pp") for value in values)  # fits 80 columns
    low = low.removesuffix(" pp")
    span = "-" if math.isnan(c.change.low) else f"{low} to {high}"
    p = "-" if math.isnan(c.p) else "< 0.001" if c.p < 0.001 else f"{c.p:.3f}"
    return [_shown(c.base.value, unit), _shown(c.tuned.value, unit), change, span, p]


def _shown(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{safe_exp(value) if unit == 'nats' else value:.4g}"


def _change(value: float, unit: str) -> str:
    """Perplexity relative to the base's, shares in percentage points, other figures as differences."""
    if math.isnan(value):
        return "-"
    if unit == "nats":
        relative = _relative(value)
        return f"{relative:+.1%}" if relative < 10 else f"x {relative + 1:.4g}"
    return f"{100 * value:+.1f} points" if unit == "share" else f"{value:+.3g}"


def _relative(nats: float) -> float:
    """exp(tuned loss - base loss) - 1: relative change of perplexity."""
    return math.expm1(nats) if nats < 700 else math.inf


def breakdowns(inputs: ReportInputs) -> dict[str, Groups]:
    """Perplexity by length of the response and by the requested fields: heading -> group -> figures."""
    figure = inputs.tuned.figures.get("loss")
    if figure is None:
        return {}
    lengths = figure.parts[:, 1].astype(int)
    starts = [1 << int(n).bit_length() - 1 if n else 0 for n in lengths]  # powers of two: 16 to 31 is one group
    by_length = {f"{start} to {2 * start - 1}": np.equal(starts, start) for start in sorted(set(starts)) if start}
    masks = {"tokens of the response": by_length}
    for heading, values in inputs.groups.items():
        listed = [value for value, _ in Counter(values).most_common(20)]  # the rest together
        masks[heading] = {value: np.array([v == value for v in values]) for value in listed}
        rest = np.array([v not in listed for v in values])
        masks[heading] |= {"(others)": rest} if rest.any() else {}
    return {heading: {name: _group(inputs, mask) for name, mask in parts.items()} for heading, parts in masks.items()}


def _group(inputs: ReportInputs, mask: Any) -> dict[str, Any]:
    """The figures of the samples where `mask`, (n,) bool, is true."""
    tokens = int(inputs.tuned.figures["loss"].parts[mask, 1].sum())
    group: dict[str, Any] = {"samples": int(mask.sum()), "tokens": tokens}
    for name, model in (("base", inputs.base), ("tuned", inputs.tuned)):
        if model and "loss" in model.figures and tokens:
            figure = model.figures["loss"]
            group[name] = safe_exp(dataclasses.replace(figure, parts=figure.parts[mask]).value)
    return group


def _breakdown(inputs: ReportInputs, heading: str, groups: Groups) -> str:
    """A breakdown as a section; empty without groups."""
    columns = ["base", "tuned"] if inputs.base else ["tuned"]
    rows = [
        [_cell(name), f"{group['samples']:,}", f"{group['tokens']:,}"]
        + [f"{group[column]:.4g}" if column in group else "-" for column in columns]
        for name, group in groups.items()
    ]
    table = markdown_table([_cell(heading), "samples", "tokens", *columns], rows)
    return f"\n## Perplexity by {_cell(heading)}\n\n{table}\n" if rows else ""


# ---- Answers


def outcomes(inputs: ReportInputs) -> list[str]:
    """wins, losses or ties of tuned against base, for each prompt, by the primary metric."""
    if not inputs.base or inputs.primary not in inputs.tuned.figures or inputs.primary not in inputs.base.figures:
        return []
    after, before = inputs.tuned.figures[inputs.primary], inputs.base.figures[inputs.primary]
    gains = after.each() - before.each()
    return ["wins" if gain > 1e-9 else "losses" if gain < -1e-9 else "ties" for gain in gains.tolist()]


def win_rate(outcome: Sequence[str], metric: str, seed: int) -> dict[str, Any]:
    """The share of prompts on which the tuned model wins, with its interval; ties count half."""
    i = interval(Figure.mean([{"wins": 1.0, "ties": 0.5, "losses": 0.0}[word] for word in outcome]), seed)
    rate = f"win rate {i.value:.1%} (95 % interval {i.low:.1%} to {i.high:.1%}; ties count half)"
    counts = ", ".join(f"{outcome.count(word):,} {word}" for word in OUTCOMES)
    return {**dataclasses.asdict(i), "said": f"{counts} (by {label(metric)}): {rate}"}


def answers(inputs: ReportInputs, outcome: Sequence[str]) -> dict[str, Any]:
    """The `answers` object of report.json: every prompt with its answers and outcome, and the worst ones."""
    if not inputs.tuned.completions:
        return {}
    each: list[dict[str, Any]] = [
        {"prompt": c.prompt, "reference": c.reference, "tuned": c.answer, **(c.rewards and {"rewards": c.rewards})}
        for c in inputs.tuned.completions
    ]
    if inputs.base and outcome:
        for line, before, word in zip(each, inputs.base.completions, outcome, strict=True):
            line.update({"base_rewards": before.rewards} if before.rewards else {}, base=before.answer, outcome=word)
    counts: dict[str, Any] = {word: outcome.count(word) for word in OUTCOMES} if outcome else {}
    counts |= {"win_rate": win_rate(outcome, inputs.primary, inputs.seed)} if outcome else {}
    return {"metric": inputs.primary, **counts, "worst": worst(inputs), "each": each}


def worst(inputs: ReportInputs) -> list[int]:
    """The prompts with the worst answers: by the primary metric, then by token F1."""
    if inputs.primary not in inputs.tuned.figures:
        return []
    scores, completions = inputs.tuned.figures[inputs.primary].each().tolist(), inputs.tuned.completions
    wrong = [index for index, completion in enumerate(completions) if not completion.exact]
    f1 = {index: token_f1(completions[index].answer, completions[index].reference) for index in wrong}
    return sorted(wrong, key=lambda index: (scores[index], f1[index]))[:WORST]


def side_by_side(base: EvalResult | None, tuned: EvalResult, which: Sequence[int]) -> str:
    """Some prompts with the reference and both answers."""
    blocks = []
    for index in (index for index in which if index < len(tuned.completions)):
        c = tuned.completions[index]
        before = [("base", base.completions[index])] if base and index < len(base.completions) else []
        lines = [("prompt", _one_line(c.prompt)), ("wanted", _one_line(c.reference))]
        lines += [(name, _one_line(said.answer) + said.worth) for name, said in [*before, ("tuned", c)]]
        blocks.append("\n".join(f"{name:>7}: {text}" for name, text in lines))
    return "\n\n".join(blocks)


def leakage_of_run(data: dict[str, Any], near: str) -> dict[str, Any]:
    """Prompts on both sides of the split of a run's data, from its report and data.near_leaks."""
    removed, near_kept, shared = data["removed"].get("leak", 0), data["near_leaks"], data["shared_prompts"]
    exact = "not checked (data.leaks=ignore)" if data["leaks"] == "ignore" else f"{shared:,}"
    nearly = "not checked (data.near_leaks=ignore)" if near == "ignore" else f"{near_kept:,}"
    said = f"training records with the prompt of a validation record: {exact}; nearly: {nearly}; removed: {removed:,}"
    return {"exact": shared, "near": near_kept, "removed": removed, "said": said}


def cost(inputs: ReportInputs) -> dict[str, float]:
    """Seconds, and watt-hours where the machine measures them."""
    known = {f"training_{key}": inputs.training[key] for key in ("seconds", "energy_wh") if key in inputs.training}
    return known | {"evaluation_seconds": round(sum(r.seconds for r in (inputs.base, inputs.tuned) if r), 3)}


def settings_of(config: Config) -> dict[str, Any]:
    """Settings that differ from the defaults, except names and files."""
    plain, apart = Config().flat(), ("evaluation.", "logging.", "output.")
    changed = {name: value for name, value in config.flat().items() if value != plain[name]}
    return {k: v for k, v in changed.items() if not k.startswith(apart) and not k.endswith(("name", "file"))}


def _markdown(inputs: ReportInputs, values: dict[str, Any], main: str, breakdown: str) -> str:
    text = f"# {inputs.name}\n\n**Verdict.** {_sentence(values['verdict'])}\n"
    text += "".join(f"\n**Warning.** {line}.\n" for line in values["warnings"])
    text += f"\n{main}"
    if inputs.base and inputs.tuned.figures:
        text += "\n95 % interval and p-value from a paired bootstrap (10,000 resamples).\n"
    text += f"\n## Curves\n\n{inputs.curves}\n" if inputs.curves else ""
    if inputs.training:
        text += "\n## Training\n"
        names = [key.replace("_gb", ", GB").replace("_wh", ", Wh").replace("_", " ") for key in inputs.training]
        rows = [[name, f"{value:,}"] for name, value in zip(names, inputs.training.values(), strict=True)]
        rows.append(["evaluation", format_duration(values["cost"]["evaluation_seconds"])])
        text += f"\n{markdown_table(['training', ''], rows)}\n"
    text += breakdown
    answered = values["answers"]
    shown = {"Worst answers": answered.get("worst", ()), "Answers side by side": range(inputs.shown)}
    if "wins" in answered:
        text += f"\n## Answers\n\n{_sentence(answered['win_rate']['said'])}\n"
        losses = [number for number, line in enumerate(answered["each"]) if line["outcome"] == "losses"]
        shown = {"Losses": losses[:WORST], **shown}
    for heading, which in shown.items():
        if block := side_by_side(inputs.base, inputs.tuned, which):
            text += f"\n### {heading}\n\n```\n{block}\n```\n"
    if inputs.leakage:
        text += f"\n## Leakage\n\n{_sentence(inputs.leakage['said'])}\n"
    text += "\n## Provenance\n\n" if inputs.provenance else ""
    for key, value in inputs.provenance.items():
        pairs = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        text += f"- {key.replace('_', ' ')}: {' '.join(str(pairs).split())}\n"
    return text


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
