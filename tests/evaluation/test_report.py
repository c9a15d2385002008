"""The report: figures with intervals, a verdict that they support, and its caveats."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest

from nanoft.config import Config
from nanoft.evaluation import report
from nanoft.evaluation.evaluate import Completion, EvalResult, Likelihoods, answer_figures
from nanoft.evaluation.report import ReportInputs
from nanoft.metrics.answers import select_metrics
from nanoft.metrics.bootstrap import Figure
from nanoft.tracking.run import to_json

TOKENS = np.array([3, 17, 20, 31, 32, 64, 5, 18])


def measured(
    nats_a_token: Any = None, answers: str = "", metrics: tuple[str, ...] = (), stopped: bool = True, tokens: int = 5
) -> EvalResult:
    """Eight samples with these losses, and answers of one letter each to questions whose answer is r."""
    figures: dict[str, Figure] = {}
    if nats_a_token is not None:
        nats = np.stack([TOKENS * nats_a_token, np.zeros(8)], axis=1)
        figures = Likelihoods(nats, np.stack([TOKENS, 0 * TOKENS], axis=1), TOKENS).figures()
    completions = [Completion(f"question {n}", "r", letter, stopped, tokens) for n, letter in enumerate(answers)]
    return EvalResult({**figures, **answer_figures(completions, select_metrics(metrics))}, completions, 1.5)


def cells(text: str) -> list[list[str]]:
    """The cells of the first Markdown table of a text, without its rule."""
    lines = text[text.index("|") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


def reported(tuned: EvalResult, base: EvalResult | None = None, **more: Any) -> tuple[dict[str, Any], str, str]:
    return report.report(ReportInputs("name", tuned, base, **more))


HARD = np.array([2.0, 2.1, 1.9, 2.2, 2.0, 1.8, 2.3, 2.0])


def unwrapped(text: str) -> str:
    return " ".join(text.split())


def test_the_table_shows_base_beside_tuned_with_the_change_and_how_sure_it_is() -> None:
    _, terminal, _ = reported(measured(HARD - 1, "rrrrrrrx"), measured(HARD, "rxxxxxxx"))
    header, loss, overall, bits, exact, stop, length = cells(terminal)
    assert header == ["", "base", "tuned", "change", "95 % interval", "p"]
    perplexity = math.exp((HARD * TOKENS).sum() / TOKENS.sum())
    shown = [f"{perplexity:.4g}", f"{perplexity / math.e:.4g}"]
    assert loss == ["perplexity", *shown, "-63.2%", "-63.2% to -63.2%", "< 0.001"]  # 1 / e - 1
    assert overall[1:] == loss[1:]
    assert bits[3] == f"{-1 / math.log(2):+.3g}"
    assert exact[:4] == ["exact match", "12.5%", "87.5%", "+75.0 pp"]
    assert stop == ["stop rate", "100.0%", "100.0%", "+0.0 pp", "+0.0 to +0.0 pp", "1.000"]
    assert length == ["response tokens", "5", "5", "+0", "+0 to +0", "1.000"]


def test_what_was_not_measured_is_not_shown() -> None:
    assert cells(reported(measured(HARD))[1])[0] == ["", "tuned", "95 % interval"]
    loss_only, both = measured(HARD), measured(HARD, "rrrrrrrr")
    rows = {row[0]: row[1:] for row in cells(reported(both, loss_only)[1])}
    assert rows["exact match"] == ["-", "100.0%", "-", "-", "-"]
    values, terminal, markdown = reported(EvalResult())
    assert "nothing was evaluated: there is no validation data" in terminal
    assert "nothing was evaluated" in markdown
    assert values["tuned"] == {}
    assert {"base", "tuned"} <= reported(both, measured(HARD))[0].keys()


NOISE = np.array([0.3, -0.3, 0.2, -0.2, 0.25, -0.25, 0.1, -0.1])
VERDICTS: dict[str, tuple[EvalResult, EvalResult, str]] = {
    "both better": (measured(HARD - 1, "rrrrrrrr"), measured(HARD, "xxxxxxxx"), "better"),
    "one better, one unclear": (measured(HARD - 1, "rxrxrxrx"), measured(HARD, "xrxrxrxr"), "better"),
    "worse": (measured(HARD + 0.2), measured(HARD), "worse"),
    "worse answers": (measured(HARD + NOISE, "xxxxxxxr"), measured(HARD, "rrrrrrrr"), "worse"),
    "unclear": (measured(HARD + NOISE, "rxrxrxrx"), measured(HARD, "xrxrxrxr"), "no clear difference"),
    "the same": (measured(HARD), measured(HARD), "no clear difference"),
    "one each way": (measured(HARD - 1, "xxxxxxxx"), measured(HARD, "rrrrrrrr"), "better in one, worse in the other"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_says_what_the_intervals_say(case: str) -> None:
    tuned, base, expected = VERDICTS[case]
    values, terminal, markdown = reported(tuned, base)
    named = ["exact match"] if case == "worse answers" else ["perplexity"]
    named += ["exact match"] if case in ("both better", "one each way") else []
    first, *others = named  # the other figure of each pair has an interval around zero, or did not change at all
    assert values["verdict"].startswith(f"{expected}: {first} from ")
    assert [name for name in ("perplexity", "exact match") if f" and {name} from " in values["verdict"]] == others
    assert values["verdict"] in unwrapped(terminal)
    assert markdown.startswith(f"# name\n\n**Verdict.** {expected[0].upper()}{expected[1:]}: ")
    assert values["verdict"].count("95 % interval") == len(named)
    low, high = (values["changes"]["loss"]["change"][end] for end in ("low", "high"))
    assert (high < 0) == (case in ("both better", "one better, one unclear", "one each way"))
    assert (low > 0) == (case == "worse")


def test_pairs_decide_the_verdict_even_if_chosen_answers_become_rarer() -> None:
    right = [np.array([1.0, 0.0] * 4), np.ones(8)]  # before and after
    base, tuned = (
        EvalResult({**measured(hard).figures, "pair_accuracy": Figure.mean(pairs)})
        for hard, pairs in zip((HARD, HARD + 1), right, strict=True)
    )
    values, terminal, _ = reported(tuned, base)
    assert values["verdict"].startswith("better: pair accuracy from 50.0% to 100.0% (+50.0 pp, 95 % interval ")
    assert values["verdict"].endswith(", 8 pairs)")
    assert values["base"]["pair_accuracy"] == 0.5
    assert ["pair accuracy", "50.0%", "100.0%", "+50.0 pp"] in [row[:4] for row in cells(terminal)]


def test_without_a_base_or_with_one_sample_there_is_no_verdict_of_better_or_worse() -> None:
    assert reported(measured(HARD))[0]["verdict"] == "none: the base was not evaluated"
    one = [EvalResult({"loss": Figure(np.array([[nats, 1.0]]), unit="nats")}) for nats in (1.0, 2.0)]
    values, terminal, _ = reported(*one)
    assert values["verdict"].startswith("no clear difference: perplexity from 7.389 to 2.718")
    assert cells(terminal)[1] == ["perplexity", "7.389", "2.718", "-63.2%", "-", "-"]
    assert values["changes"]["loss"]["change"]["low"] != values["changes"]["loss"]["change"]["low"]
    assert json.loads(to_json(values))["changes"]["loss"]["change"]["low"] is None


def test_a_model_that_does_not_stop_or_forgets_is_warned_of() -> None:
    base, tuned = measured(HARD, "r" * 8), measured(HARD, "r" * 8, stopped=False)
    assert reported(tuned, base)[0].get("warnings") is None  # not trained: nothing to blame training for
    (line,) = reported(tuned, base, limit=64)[0]["warnings"]
    assert "only 0.0% of the answers stop within 64 tokens" in line
    assert line in reported(tuned, base, limit=64)[2]
    for rise, told in ((0.049, False), (0.051, True)):
        general = Figure(np.array([[1.0, 1], [2.0, 1]]), unit="nats")
        after = Figure(general.parts + np.array([math.log(1 + rise), 0]), unit="nats")
        pair = [EvalResult({"general_loss": figure}) for figure in (after, general)]
        assert ("warnings" in reported(*pair)[0]) == told
    leak = {"exact": 1, "near": 0, "said": "one prompt stands in the training data"}
    assert reported(tuned, base, leakage=leak)[0]["warnings"] == [leak["said"]]


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_worse_than_any(loss: float) -> None:
    broken, whole = measured(np.full(8, loss)), measured(HARD)
    values, terminal, _ = reported(broken, whole)
    assert cells(terminal)[1][2:] == [str(loss), "x inf" if loss == math.inf else "-", "-", "-"]
    assert values["verdict"].startswith("worse: perplexity from ")
    assert "perplexity is not finite" in values["warnings"]
    assert json.loads(to_json(values))["tuned"]["perplexity"] is None
    assert reported(whole, broken)[0]["verdict"].startswith("better: perplexity from ")
    assert reported(broken, broken)[0]["verdict"].startswith("no clear difference: ")


def test_wins_losses_and_ties_are_counted_and_listed() -> None:
    values, terminal, markdown = reported(measured(None, "rrxxr"), measured(None, "xrrxr"))
    assert "answers 1 wins, 1 losses, 3 ties (by exact match): win rate 50.0% (95 % interval " in unwrapped(terminal)
    assert "\n1 wins, 1 losses, 3 ties (by exact match): win rate 50.0% (95 % interval " in markdown
    found = values["answers"]
    assert found["win_rate"]["value"] == (1 + 3 / 2) / 5
    assert 0 <= found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"] <= 1
    assert [found[name] for name in ("metric", "wins", "losses", "ties")] == ["exact_match", 1, 1, 3]
    assert [each["outcome"] for each in found["each"]] == ["wins", "ties", "losses", "ties", "ties"]
    assert found["each"][2] == {
        "prompt": "question 2", "reference": "r", "base": "r", "tuned": "x", "outcome": "losses",
    }  # fmt: skip
    lost = markdown[markdown.index("### Losses") : markdown.index("### Worst answers")]
    assert "question 2" in lost
    assert lost.count("prompt:") == 1


def test_the_metric_of_ones_choice_decides_who_wins() -> None:
    """A length, so that a longer answer wins: aaa beats b."""
    metrics = ("min_characters:1", "exact_match")
    base, tuned = measured(None, "rr", metrics), measured(None, "rx", metrics)
    values, _, _ = reported(tuned, base, primary="min_characters:1")
    assert (values["answers"]["metric"], values["answers"]["ties"]) == ("min_characters:1", 2)
    assert "min characters:1 from 100.0% to 100.0%" in values["verdict"]
    assert reported(tuned, base)[0]["answers"]["losses"] == 1


def test_the_worst_answers_come_first_and_no_right_one_among_them() -> None:
    answers = ["one two three four", "one two three", "one", "nothing", "one two"]
    completions = [Completion(str(n), "one two three four", answer, True) for n, answer in enumerate(answers)]
    found = ReportInputs("name", EvalResult(answer_figures(completions, []), completions))
    assert report.worst(found) == [3, 2, 4, 1]
    many = [Completion(str(n), "r", "x", True) for n in range(40)]
    assert len(report.worst(ReportInputs("name", EvalResult(answer_figures(many, []), many)))) == 10
    alone = report.report(found)[0]["answers"]  # without a base, too
    assert alone["worst"] == [3, 2, 4, 1]
    assert alone["each"][3] == {"prompt": "3", "reference": "one two three four", "tuned": "nothing"}


def test_answers_have_their_rewards_and_the_mean_leaves_out_those_that_failed() -> None:
    """A row for each answer, to compare two models on the same prompts."""
    worth = [{"reward": value, "rewards/numeric": value} for value in (1.0, math.nan, 0.5)]
    before, after = (
        [Completion("q", "r", "a", True, 2, {**each, "reward": each["reward"] + more}) for each in worth]
        for more in (0.0, 1.0)
    )
    base, tuned = (EvalResult(answer_figures(said, []), said) for said in (before, after))
    assert tuned.figures["reward"].value == 1.75
    assert tuned.figures["reward"].parts.shape == (3, 2)
    values, terminal, markdown = reported(tuned, base)
    assert values["changes"]["reward"]["change"]["value"] == 1
    for text in (terminal, markdown):
        assert "   base: a (reward 1, numeric 1)" in text
        assert "  tuned: a (reward 2, numeric 1)" in text
    assert [each["rewards"] for each in values["answers"]["each"]][2] == {"reward": 1.5, "rewards/numeric": 0.5}
    assert values["answers"]["each"][2]["base_rewards"] == worth[2]


def test_breakdowns_add_up_to_the_whole() -> None:
    base, tuned = measured(HARD), measured(HARD - 1)
    values = ["a", "b", "a", "a", "(none)", "b", "a", "x|y"]
    by = report.breakdowns(ReportInputs("name", tuned, base, groups={"topic": values}))
    lengths = by["tokens of the response"]
    assert {name: row["samples"] for name, row in lengths.items()} == {
        "2 to 3": 1, "4 to 7": 1, "16 to 31": 4, "32 to 63": 1, "64 to 127": 1,
    }  # fmt: skip
    assert list(by["topic"]) == ["a", "b", "(none)", "x|y"]
    is_a = np.array(values) == "a"
    assert by["topic"]["a"]["base"] == pytest.approx(math.exp((HARD * TOKENS)[is_a].sum() / TOKENS[is_a].sum()))
    for rows in by.values():
        assert sum(row["tokens"] for row in rows.values()) == TOKENS.sum()
        nats = sum(row["tokens"] * math.log(row["tuned"]) for row in rows.values())
        assert math.exp(nats / TOKENS.sum()) == pytest.approx(tuned.perplexity)
    _, _, markdown = reported(tuned, base, groups={"topic": values})
    assert "| x\\|y " in markdown


def test_a_field_with_many_values_shows_the_most_frequent() -> None:
    losses = Figure(np.ones((100, 2)), unit="nats")
    values = [f"v{n}" for n in range(50)] + ["often"] * 50
    rows = report.breakdowns(ReportInputs("name", EvalResult({"loss": losses}), groups={"f": values}))["f"]
    assert len(rows) == 21
    assert next(iter(rows)) == "often"
    assert rows["(others)"]["samples"] == 31


def completion(answer: str, reference: str) -> Completion:
    return Completion("prompt", reference, answer, True)


def test_samples_show_both_answers_on_one_line_each() -> None:
    tuned = EvalResult(completions=[completion("new\nanswer", "wanted"), completion("long " * 100, "b")])
    base = EvalResult(completions=[completion("old", "wanted"), completion("older", "b")])
    both = report.side_by_side(base, tuned, range(1))
    assert [line.split(": ", 1) for line in both.splitlines()] == [
        [" prompt", "prompt"],
        [" wanted", "wanted"],
        ["   base", "old"],
        ["  tuned", "new answer"],
    ]
    alone = report.side_by_side(None, tuned, range(2))
    assert "base" not in alone
    assert max(len(line) for line in alone.splitlines()) <= 220
    assert report.side_by_side(base, tuned, range(0)) == ""


def test_a_report_holds_everything_that_it_was_given() -> None:
    training = {"steps": 1200, "seconds": 3.5, "tokens_per_second": 12345.6, "peak_memory_gb": 0.5}
    provenance = {"base": "some/model", "data_sha256": "abc", "versions": {"torch": "2.9", "numpy": "2.1"}}
    leakage = {"exact": 0, "near": 0, "said": "nothing leaks"}
    values, terminal, markdown = reported(
        measured(HARD, "rx"), measured(HARD, "xx"), training=training, provenance=provenance, leakage=leakage, shown=1
    )
    assert values["training"] == training
    assert values["provenance"] == provenance
    assert values["cost"] == {"training_seconds": 3.5, "evaluation_seconds": 3.0}
    assert "wanted: r" in terminal
    for part in ("| steps ", "1,200", "12,345.6", "some/model", "torch=2.9, numpy=2.1", "Nothing leaks.", "wanted: r"):
        assert part in markdown
    assert json.loads(to_json(values)) == json.loads(json.dumps(values))


def test_whatever_is_said_the_report_is_one_of_markdown() -> None:
    """An answer can end no block and add no line or column."""
    rng = random.Random(3)
    pieces = ["```", "\n", "|", "# head", "a", "\r", "\x00", "</pre>"]
    said = ["".join(rng.choice(pieces) for _ in range(12)) for _ in range(30)]
    completions = [Completion(text, text[::-1], text[3:], True) for text in said]
    found = EvalResult(answer_figures(completions, []), completions)
    _, _, markdown = reported(found, found)
    fences = [line for line in markdown.splitlines() if line.startswith("```")]
    assert fences == ["```"] * 4  # the worst ten, and side by side


def test_the_leak_check_of_a_split_is_told_as_it_was_made() -> None:
    def said(near: str, **changes: Any) -> str:
        data = {"removed": {}, "near_leaks": 0, "leaks": "remove", "shared_prompts": 0}
        data |= changes
        return report.leakage_of_run(data, near)["said"]

    begin = "training records with the prompt of a validation record"
    found = said("warn", shared_prompts=7, near_leaks=3, removed={"leak": 4})
    assert found == f"{begin}: 7; nearly: 3; removed: 4"
    assert said("warn", leaks="ignore") == f"{begin}: not checked (data.leaks=ignore); nearly: 0; removed: 0"
    assert said("ignore") == f"{begin}: 0; nearly: not checked (data.near_leaks=ignore); removed: 0"


def test_settings_that_are_not_the_default_are_told() -> None:
    config = Config().override({"lora.rank": 4, "model.name": "x", "output.dir": "runs/x", "system.seed": 3})
    assert report.settings_of(config) == {"lora.rank": 4, "system.seed": 3}
