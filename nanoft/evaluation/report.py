"""What a reader of the result wants to know, in the order of asking: is it better, by how much, how sure, at what cost?

The verdict is one sentence and never says more than the interval does: better or worse only where the whole 95 %
interval lies on one side of no change. Behind it stand the tables (base beside tuned on the same samples), where it is
good and where it is not (by length, by a field of the records, the worst answers), what could make the figures too good
(prompts of the evaluation among the training data), and what it takes to do it again.
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
from nanoft.io.tables import format_duration, markdown_table
from nanoft.metrics.answers import token_f1
from nanoft.metrics.bootstrap import Comparison, Figure, Interval, compare, interval
from nanoft.perplexity import safe_exp

STOP_RATE = 0.95  # below it after training, something in the data keeps the model from stopping
FORGETTING = 0.05  # rise of the perplexity of a general text that is worth a warning
WORST, LOSSES = 10, 10  # answers listed
GROUPS = 20  # values of a field listed; the rest together
OUTCOMES = ("wins", "losses", "ties")  # of tuned, prompt by prompt
LENGTH = "tokens of the response"
LEGEND = (
    "Change and 95 % interval by drawing the samples again, the same for both (paired bootstrap, 10,000 draws); "
    "p: of so large a change if there were none."
)


@dataclass(frozen=True)
class ReportInputs:
    """Everything that a report is made of."""

    name: str
    tuned: EvalResult
    base: EvalResult | None = None
    primary: str = "exact_match"  # the metric by which an answer wins
    limit: int | None = None  # evaluation.max_new_tokens, if a model that was trained is to be judged by its stops
    groups: dict[str, list[str]] = field(default_factory=dict)  # a field -> its value for each sample
    places: list[str] = field(default_factory=list)  # file:line of each sample
    leakage: dict[str, Any] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    shown: int = 3  # answers side by side
    seed: int = 0

    def compared(self) -> dict[str, Comparison]:
        """Each figure that both models have."""
        before = self.base.figures if self.base else {}
        after = self.tuned.figures
        return {name: compare(before[name], after[name], self.seed) for name in after if name in before}


def results(base: EvalResult | None, tuned: EvalResult) -> dict[str, Any]:
    """The `base` and `tuned` objects of report.json and of eval.py --json."""
    return {**({"base": base.to_dict()} if base else {}), "tuned": tuned.to_dict()}


def report(found: ReportInputs) -> tuple[dict[str, Any], str, str]:
    """report.json's object, the text for the terminal, and report.md."""
    compared = found.compared()
    said, warned = verdict(found, compared), warnings(found, compared)
    outcome = outcomes(found)
    values = {
        "verdict": said,
        "warnings": warned,
        "changes": {name: dataclasses.asdict(c) for name, c in compared.items()},
        "by": breakdowns(found),
        "hardest": hardest(found),
        "answers": answers(found, outcome),
        "leakage": found.leakage,
        "training": found.training,
        "cost": cost(found),
        "provenance": found.provenance,
    }
    won = [f"answers   {_counted(outcome)} (by {label(found.primary)})"] if outcome else []
    head = "\n".join([f"verdict   {said}", *won, *(f"warning: {line}" for line in warned)])
    main, samples = comparison(found, compared), side_by_side(found.base, found.tuned, range(found.shown))
    asked = _breakdowns(found, list(found.groups))
    terminal = f"\n{main}\n\n{head}\n{asked}\n{samples}".rstrip()
    measured = results(found.base, found.tuned) | {name: value for name, value in values.items() if value}
    return measured, terminal, _markdown(found, main, said, warned)


# ---- The verdict


def verdict(found: ReportInputs, compared: dict[str, Comparison]) -> str:
    """One sentence: better, worse, both, or no clear difference; with the intervals that say so."""
    if found.base is None:
        return "none: the base was not measured"
    judged = [name for name in dict.fromkeys(("loss", found.primary)) if name in compared]
    if not judged:
        return "none: there is no validation data"
    better = any(_direction(found.tuned.figures[name], compared[name]) > 0 for name in judged)
    worse = any(_direction(found.tuned.figures[name], compared[name]) < 0 for name in judged)
    word = "better in one, worse in the other" if better and worse else "better" if better else "worse" if worse else ""
    figures = " and ".join(_in_words(name, compared[name], found.tuned.figures[name]) for name in judged)
    return f"{word or 'no clear difference'}: {figures}"


def _direction(figure: Figure, c: Comparison) -> int:
    """1: the whole interval is on the better side of no change; -1: on the worse one; 0: it holds no change.

    A loss that is not finite is worse than any that is.
    """
    finite = [math.isfinite(one.value) for one in (c.base, c.tuned)]
    if not all(finite):
        return finite[1] - finite[0]
    sign = 1 if figure.higher_is_better and figure.unit != "nats" else -1
    return sign * ((c.change.low > 0) - (c.change.high < 0))


def _in_words(name: str, c: Comparison, figure: Figure) -> str:
    before, after, change, span, p = _cells(c, figure.unit)
    many = f"{len(figure.parts):,} {'samples' if name in PERPLEXITIES else 'prompts'}"
    return f"{label(name)} from {before} to {after} ({change}, 95 % interval {span}, p {p}, {many})"


def warnings(found: ReportInputs, compared: dict[str, Comparison]) -> list[str]:
    """What a reader should know before believing the verdict."""
    told = []
    figures = found.tuned.figures
    if found.limit and "stop_rate" in figures and figures["stop_rate"].value < STOP_RATE:
        told.append(
            f"only {figures['stop_rate'].value:.1%} of the answers end by themselves within {found.limit} tokens: "
            "raise evaluation.max_new_tokens, or see whether training ends its turns (train.py --show-batch)"
        )
    if "general_loss" in compared:
        rise = _relative(compared["general_loss"].change.value)
        if rise > FORGETTING:
            told.append(
                f"perplexity of the general text rises by {rise:.1%}: the model forgets: "
                "lower training.learning_rate or lora.rank, or mix general data in"
            )
    if found.leakage.get("exact") or found.leakage.get("near"):
        told.append(found.leakage["said"])
    told += [f"{label(name)} is not finite" for name, figure in figures.items() if not math.isfinite(figure.value)]
    return told


# ---- Tables


def label(name: str) -> str:
    return PERPLEXITIES.get(name, name).replace("_", " ")


def comparison(found: ReportInputs, compared: dict[str, Comparison]) -> str:
    """Base beside tuned, as a table; what was not measured is a dash."""
    rows = []
    for name, figure in found.tuned.figures.items():
        if found.base is None:
            measured = interval(figure, found.seed)
            rows.append([label(name), _shown(measured.value, figure.unit), _span(measured, figure.unit)])
        elif name in compared:
            rows.append([label(name), *_cells(compared[name], figure.unit)])
        else:
            rows.append([label(name), "-", _shown(figure.value, figure.unit), "-", "-", "-"])
    header = ["", "tuned", "95 % interval"]
    if found.base is not None:
        header = ["", "base", "tuned", "change", "95 % interval", "p"]
    return markdown_table(header, rows) if rows else "nothing was measured: there is no validation data"


def _cells(c: Comparison, unit: str) -> list[str]:
    """Base, tuned, change, its interval, p."""
    low, high = _change(c.change.low, unit).removesuffix(" points"), _change(c.change.high, unit)
    span = "-" if math.isnan(c.change.low) else f"{low} to {high}"
    p = "-" if math.isnan(c.p) else "< 0.001" if c.p < 0.001 else f"{c.p:.3f}"
    return [_shown(c.base.value, unit), _shown(c.tuned.value, unit), _change(c.change.value, unit), span, p]


def _shown(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{safe_exp(value) if unit == 'nats' else value:.4g}"


def _span(i: Interval, unit: str) -> str:
    return "-" if math.isnan(i.low) else f"{_shown(i.low, unit)} to {_shown(i.high, unit)}"


def _change(value: float, unit: str) -> str:
    """Perplexity in per cent of the base's, shares in points, other figures as they are."""
    if math.isnan(value):
        return "-"
    if unit == "nats":
        relative = _relative(value)
        return f"{relative:+.1%}" if relative < 10 else f"x {relative + 1:.4g}"
    return f"{100 * value:+.1f} points" if unit == "share" else f"{value:+.3g}"


def _relative(nats: float) -> float:
    """exp(tuned loss - base loss) - 1: the change of perplexity as a share of the base's."""
    return math.expm1(nats) if nats < 700 else math.inf


def breakdowns(found: ReportInputs) -> dict[str, dict[str, dict[str, Any]]]:
    """Perplexity by length of the response and by the fields that were asked for: heading -> group -> figures."""
    figure = found.tuned.figures.get("loss")
    if figure is None:
        return {}
    lengths = figure.parts[:, 1].astype(int)
    starts = [1 << int(n).bit_length() - 1 if n else 0 for n in lengths]  # powers of two: 16 to 31 is one group
    by_length = {f"{start} to {2 * start - 1}": np.equal(starts, start) for start in sorted(set(starts)) if start}
    groups = {LENGTH: by_length}
    for heading, values in found.groups.items():
        listed = [value for value, _ in Counter(values).most_common(GROUPS)]
        groups[heading] = {value: np.array([v == value for v in values]) for value in listed}
        rest = np.array([v not in listed for v in values])
        groups[heading] |= {"(others)": rest} if rest.any() else {}
    return {heading: {name: _group(found, rows) for name, rows in parts.items()} for heading, parts in groups.items()}


def _group(found: ReportInputs, rows: Any) -> dict[str, Any]:
    """One line of a breakdown: the samples `rows`, (n,) bool."""
    tuned = found.tuned.figures["loss"]
    base = found.base.figures.get("loss") if found.base else None
    line: dict[str, Any] = {"samples": int(rows.sum()), "tokens": int(tuned.parts[rows, 1].sum())}
    for column, figure in (("base", base), ("tuned", tuned)):
        if figure is not None and line["tokens"]:
            line[column] = safe_exp(dataclasses.replace(figure, parts=figure.parts[rows]).value)
    return line


def _breakdown(found: ReportInputs, title: str, heading: str, groups: dict[str, dict[str, Any]]) -> str:
    """A breakdown under its title; nothing where there is nothing to tell."""
    columns = ["base", "tuned"] if found.base else ["tuned"]
    rows = [
        [_cell(name), f"{row['samples']:,}", f"{row['tokens']:,}"]
        + [f"{row[column]:.4g}" if column in row else "-" for column in columns]
        for name, row in groups.items()
    ]
    return f"\n## {title}\n\n{markdown_table([_cell(heading), 'samples', 'tokens', *columns], rows)}\n" if rows else ""


def _breakdowns(found: ReportInputs, only: Sequence[str] | None = None) -> str:
    parts = {heading: groups for heading, groups in breakdowns(found).items() if only is None or heading in only}
    return "".join(
        _breakdown(found, f"Perplexity by {_cell(heading)}", heading, groups) for heading, groups in parts.items()
    )


def hardest(found: ReportInputs) -> dict[str, dict[str, Any]]:
    """The samples that the tuned model finds least likely, by place: wrong references are often among them."""
    if "loss" not in found.tuned.figures or not found.places:
        return {}
    order = np.argsort(-np.nan_to_num(found.tuned.figures["loss"].each()), kind="stable")[:WORST]
    return {found.places[at]: _group(found, np.arange(len(found.places)) == at) for at in order.tolist()}


# ---- Answers


def outcomes(found: ReportInputs) -> list[str]:
    """wins, losses or ties: of each prompt, whether tuned is better than base by the primary metric."""
    if not found.base or found.primary not in found.tuned.figures or found.primary not in found.base.figures:
        return []
    after, before = found.tuned.figures[found.primary], found.base.figures[found.primary]
    gains = (after.each() - before.each()) * (1 if after.higher_is_better else -1)
    return ["wins" if gain > 1e-9 else "losses" if gain < -1e-9 else "ties" for gain in gains.tolist()]


def _counted(outcome: Sequence[str]) -> str:
    return ", ".join(f"{outcome.count(word):,} {word}" for word in OUTCOMES)


def answers(found: ReportInputs, outcome: Sequence[str]) -> dict[str, Any]:
    """Every prompt with what was answered, which were answered worst, and who won, for report.json."""
    if not found.tuned.exchanges:
        return {}
    each = [{"prompt": e.prompt, "reference": e.reference, "tuned": e.answer} for e in found.tuned.exchanges]
    if found.base and outcome:
        for line, before, word in zip(each, found.base.exchanges, outcome, strict=True):
            line |= {"base": before.answer, "outcome": word}
    counts = {word: outcome.count(word) for word in OUTCOMES} if outcome else {}
    return {"metric": found.primary, **counts, "worst": worst(found), "each": each}


def worst(found: ReportInputs) -> list[int]:
    """The prompts answered worst: by the primary metric, then by the words in common with the reference."""
    if found.primary not in found.tuned.figures:
        return []
    scores = found.tuned.figures[found.primary].each().tolist()

    def rank(index: int) -> tuple[float, float]:
        exchange = found.tuned.exchanges[index]
        return scores[index], token_f1(exchange.answer, exchange.reference)

    wrong = [index for index, exchange in enumerate(found.tuned.exchanges) if not exchange.exact]
    return sorted(wrong, key=rank)[:WORST]


def side_by_side(base: EvalResult | None, tuned: EvalResult, which: Sequence[int] | range) -> str:
    """Some prompts with the reference and both answers."""
    blocks = []
    for index in which:
        if index >= len(tuned.exchanges):
            break
        exchange = tuned.exchanges[index]
        lines = [("prompt", exchange.prompt), ("wanted", exchange.reference)]
        if base and index < len(base.exchanges):
            lines.append(("base", base.exchanges[index].answer))
        lines.append(("tuned", exchange.answer))
        blocks.append("\n".join(f"{name:>7}: {_one_line(text)}" for name, text in lines))
    return "\n\n".join(blocks)


def _answers_section(found: ReportInputs) -> str:
    outcome = outcomes(found)
    text = ""
    if outcome:
        counts = [f"{outcome.count(word):,}" for word in OUTCOMES]
        lost = [index for index, word in enumerate(outcome) if word == "losses"]
        text += f"\n## Answers: wins and losses by {label(found.primary)}\n\n"
        text += markdown_table(["wins of tuned", "losses", "ties"], [counts]) + "\n"
        text += _block("Lost", side_by_side(found.base, found.tuned, lost[:LOSSES]))
    text += _block("The worst answers", side_by_side(found.base, found.tuned, worst(found)))
    return text + _block("Answers side by side", side_by_side(found.base, found.tuned, range(found.shown)))


def _block(heading: str, text: str) -> str:
    return f"\n### {heading}\n\n```\n{text}\n```\n" if text else ""


# ---- Leakage, cost, provenance


def leakage_of_run(data: dict[str, Any], near: str) -> dict[str, Any]:
    """What the split of a run's own data did about prompts on both sides.

    Args:
        data: what became of the data (nanoft/corpus.py).
        near: data.near_leaks.
    """
    removed, kept = data["removed"].get("leak", 0), data["near_leaks"] if data["near_leaks_are"] == "kept" else 0
    said = "no prompt of the validation data stands in the training data"
    said += f" ({removed:,} training records that did were left out)" if removed else ""
    if near == "ignore":
        said += "; prompts that nearly do were not looked for (data.near_leaks=ignore)"
    elif kept:
        said += f"; {kept:,} training records ask nearly what a validation record asks (data.near_leaks=remove)"
    else:
        said += ", nor nearly so"
    return {"exact": 0, "near": kept, "removed": removed, "said": said}


def cost(found: ReportInputs) -> dict[str, float]:
    """Seconds, and watt-hours where the machine counts them."""
    known = {f"training_{key}": found.training[key] for key in ("seconds", "energy_wh") if key in found.training}
    measured = [one for one in (found.base, found.tuned) if one]
    return known | {"evaluation_seconds": round(sum(one.seconds for one in measured), 3)}


def settings_of(config: Config) -> dict[str, Any]:
    """What a config has that is not the default, but for names of places."""
    plain = Config().to_dict()
    return {
        f"{section}.{name}": value
        for section, fields in config.to_dict().items()
        if section not in ("evaluation", "logging", "output")
        for name, value in fields.items()
        if value != plain[section][name] and not name.endswith(("name", "file"))
    }


def _provenance(provenance: dict[str, Any]) -> str:
    """A list: one entry a line, however long."""
    text = "\n## Provenance\n\n"
    for key, value in provenance.items():
        pairs = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
        text += f"- {key.replace('_', ' ')}: {' '.join(str(pairs).split())}\n"
    return text


def _markdown(found: ReportInputs, main: str, said: str, warned: Sequence[str]) -> str:
    text = f"# {found.name}\n\n**Verdict.** {said[0].upper()}{said[1:]}.\n"
    text += "".join(f"\n**Warning.** {line}.\n" for line in warned)
    text += f"\n{main}\n" + (f"\n{LEGEND}\n" if found.base and found.tuned.figures else "")
    if found.training:
        took = format_duration(cost(found)["evaluation_seconds"])
        rows = [[_with_unit(key), f"{value:,}"] for key, value in found.training.items()]
        text += f"\n{markdown_table(['training', ''], [*rows, ['evaluation', took]])}\n"
    text += _breakdowns(found) + _breakdown(found, "The samples of the highest perplexity", "sample", hardest(found))
    text += _answers_section(found)
    if found.leakage:
        text += f"\n## Leakage\n\n{found.leakage['said'][0].upper()}{found.leakage['said'][1:]}.\n"
    if found.provenance:
        text += _provenance(found.provenance)
    return text


def _with_unit(key: str) -> str:
    """peak_memory_gb: peak memory, GB."""
    return key.replace("_gb", ", GB").replace("_wh", ", Wh").replace("_", " ")


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str, limit: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
