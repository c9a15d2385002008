"""Metrics against rouge-score, sacrebleu, and cases with known values."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from nanoft import UserError
from nanoft.metrics.answers import METRICS, normalize, select_metrics
from nanoft.metrics.bootstrap import interval

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "mat,",
    "quickly.",
    "42",
    "jumps",
    "over",
    "lazy",
    "house!",
    "red",
    "blue",
]


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Answers that share some of their words with the references; one is empty, one exact."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        reference = [rng.choice(WORDS) for _ in range(rng.randint(5, 20))]
        answer = [word if rng.random() < 0.7 else rng.choice(WORDS) for word in reference][rng.randint(0, 2) :]
        pairs.append((" ".join(answer), " ".join(reference)))
    return [*pairs, ("", "the cat"), ("a cat sat on the mat", "a cat sat on the mat")]


def triples(pairs: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    return [(answer, reference, "a prompt") for answer, reference in pairs]


def score(name: str, answer: str, reference: str = "", prompt: str = "") -> float:
    (metric,) = select_metrics([name])
    return metric.figure([(answer, reference, prompt)]).value


@pytest.mark.parametrize(("name", "theirs"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")])
def test_rouge_is_that_of_rouge_score(name: str, theirs: str) -> None:
    pairs = texts(30)
    scorer = RougeScorer([theirs])
    expected = [scorer.score(reference, answer)[theirs].fmeasure for answer, reference in pairs]
    figure = select_metrics([name])[0].figure(triples(pairs))
    assert figure.each().tolist() == expected
    assert figure.value == pytest.approx(sum(expected) / len(expected), abs=1e-12)
    assert len(set(expected)) > 10


def test_bleu_is_that_of_sacrebleu() -> None:
    (bleu,) = select_metrics(["bleu"])
    for seed in range(5):
        pairs = texts(25, seed)
        answers, references = map(list, zip(*pairs, strict=True))
        expected = sacrebleu.corpus_bleu(answers, [references]).score
        assert bleu.figure(triples(pairs)).value == pytest.approx(expected, abs=1e-9)
        assert 5 < expected < 95
    assert (
        bleu.figure([("nothing", "in common", "")]).value == sacrebleu.corpus_bleu(["nothing"], [["in common"]]).score
    )


def test_an_interval_of_bleu_is_that_of_sacrebleu() -> None:
    """Both resample; theirs is mean and half width of 1,000 draws."""
    pairs = texts(60)
    answers, references = map(list, zip(*pairs, strict=True))
    theirs = sacrebleu.metrics.BLEU().corpus_score(answers, [references], n_bootstrap=1000)
    own = interval(select_metrics(["bleu"])[0].figure(triples(pairs)))
    assert (own.low + own.high) / 2 == pytest.approx(theirs._mean, abs=0.6)
    assert (own.high - own.low) / 2 == pytest.approx(theirs._ci, rel=0.15)


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("exact_match", " a b\n", "a b", 1),
        ("exact_match", "A b", "a b", 0),
        ("normalized_match", "The  Eiffel Tower!", "eiffel tower", 1),
        ("normalized_match", "Anthem", "them", 0),  # an article is a whole word
        ("contains", "It is Paris, of course", "Paris ", 1),
        ("contains", "It is paris", "Paris", 0),
        ("numeric", "7 - 3 is 4", "#### 4", 1),
        ("numeric", "so 7-3=4", "4.0", 1),
        ("numeric", "She pays $1,234.50.", "first 3, then\n#### 1234.5", 1),
        ("numeric", "5 and then\n#### -12\nor 3", "-12", 1),
        ("numeric", "minus: -0.5", "-.5", 1),
        ("numeric", "4", "14", 0),
        ("numeric", "none", "none", 0),
        ("numeric", "10-7", "7", 1),  # a subtraction: its last number
        ("numeric", "10-7", "-7", 0),
        ("numeric", "10 - 7", "7", 1),
        ("numeric", "(3)-7", "7", 1),
        ("numeric", "5%-7%", "7", 1),
        ("numeric", "x-7", "7", 1),  # a hyphen
        ("numeric", "1,000-500.5", "500.5", 1),
        ("numeric", "3-10=-7", "-7", 1),
        ("numeric", "(-7)", "-7", 1),
        ("numeric", "x=-7", "-7", 1),
        ("numeric", "-$7", "-7", 1),
        ("numeric", "10-$7", "7", 1),
        ("numeric", "\N{MINUS SIGN}7", "-7", 1),
        ("numeric", "5*-3", "-3", 1),
        ("numeric", "#### 10", "10-10-10", 1),
        ("numeric", "0.1", "0.10000000000000001", 0),
        ("json_valid", ' {"a": [1, null]}\n', "", 1),
        ("json_valid", '{"a": NaN}', "", 0),
        ("json_valid", "{'a': 1}", "", 0),
        ("json_valid", "null", "", 1),
        ("json_valid", "[" * 100_000, "", 0),
        ("json_valid", "1e99999999999999999999999", "", 1),
        ("json_equal", "0.1", "1e-1", 1),
        ("json_equal", '{"b": 1.0, "a": [1e2]}', '{"a":[100],"b":1}', 1),
        ("json_equal", '{"a": true}', '{"a": 1}', 0),
        ("json_equal", "[1, 2]", "[2, 1]", 0),
        ("json_equal", '["number", 1]', "1", 0),
        ("json_equal", "no", "no", 0),
        ("json_equal", "12345678901234567890123", "12345678901234567890124", 0),
        ("one_line", "one\n", "", 1),
        ("one_line", "one\ntwo", "", 0),
        (r"regex:^\d{3}$", "123", "", 1),
        (r"regex:^\d{3}$", "1234", "", 0),
        ("regex:(?i)os", "import OS", "", 1),
        ("max_words:2", "one two", "", 1),
        ("max_words:2", "one two three", "", 0),
        ("min_words:2", "one", "", 0),
        ("max_characters:3", "abc", "", 1),
        ("min_characters:3", "ab", "", 0),
    ],
)
def test_a_score_that_is_known(name: str, answer: str, reference: str, expected: float) -> None:
    assert score(name, answer, reference) == expected


def test_token_f1_counts_each_word_as_often_as_both_have_it() -> None:
    # P = 2/3 (cat, sat of cat sat cat), R = 2/4, so F1 = 2 (2/3)(1/2) / (2/3 + 1/2) = 4/7
    assert score("token_f1", "The cat sat. Cat", "cat sat on mats") == pytest.approx(4 / 7)
    assert score("token_f1", "the", "an") == 1  # nothing is left of either
    assert score("token_f1", "the", "cat") == 0
    for answer, reference in texts(20):
        said, wanted = normalize(answer).split(), normalize(reference).split()
        left = list(wanted)
        common = 0
        for word in said:
            if word in left:
                left.remove(word)
                common += 1
        expected = 2 * common / (len(said) + len(wanted))
        assert score("token_f1", answer, reference) == pytest.approx(expected)


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metric_module.py").write_text(
        "def closeness(answer, reference):\n    return -abs(len(answer) - len(reference))\n"
        "def broken(answer, reference):\n    return 1 / 0\n"
        "def lost(answer, reference):\n    return float('nan')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_metric_module", raising=False)
    path = list(sys.path)
    (metric,) = select_metrics(["my_metric_module:closeness"])
    assert sys.path == path
    figure = metric.figure([("abc", "a", ""), ("a", "a", "")])
    assert figure.each().tolist() == [-2, 0]
    assert figure.value == -1
    for name, message in (("broken", "ZeroDivisionError"), ("lost", "returned nan")):
        with pytest.raises(UserError, match=message):
            select_metrics([f"my_metric_module:{name}"])[0].figure([("a", "b", "")])
    for name, message in (("absent", "AttributeError"), ("number", "not a function")):
        with pytest.raises(UserError, match=message):
            select_metrics([f"my_metric_module:{name}"])


def test_a_function_of_ones_own_may_take_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_prompt_module.py").write_text(
        "def two(answer, reference):\n    return len(answer + reference)\n"
        "def three(answer, reference, prompt):\n    return len(answer + reference) * 100 + len(prompt)\n"
        "def named(answer, reference, *, strict=False):\n    return 5\n"
        "def option(answer, reference, factor=2):\n    return factor\n"
        "def optional(answer, reference, prompt=''):\n    return len(prompt)\n"
        "def every(*sample):\n    return len(sample)\n"
        "class Judge:\n    def __call__(self, answer, reference, question):\n        return len(question)\n"
        "judge = Judge()\n"
    )
    monkeypatch.chdir(tmp_path)
    expected = {"two": 3, "three": 304, "named": 5, "option": 2, "optional": 4, "every": 2, "judge": 4}
    assert {name: score(f"my_prompt_module:{name}", "ab", "c", "four") for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_macth", "did you mean exact_match?"),
        ("rougel", "did you mean rouge_l?"),
        ("max_word:3", "did you mean max_words"),
        ("xyz", "choose one of exact_match, "),
        ("max_words:many", "write max_words:N"),
        ("max_words", "did you mean max_words:N?"),
        ("regex:(", "not a regular expression"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
    ],
)
def test_an_unknown_metric_is_one_line_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        select_metrics(["exact_match", name])
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"), [("rouge_l", "rouge_score.rouge_scorer"), ("bleu", "sacrebleu.metrics.bleu")]
)
def test_a_missing_extra_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install -e '\.\[metrics\]'"):
        select_metrics([name])


# An argument for each metric that takes one, and an answer that the metric must find right.
ARGUMENTS = {"N": "1", "PATTERN": "7"}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_its_unit_its_bounds_and_its_best_value(name: str) -> None:
    entry = METRICS[name]
    (metric,) = select_metrics([f"{name}:{ARGUMENTS[entry.argument]}" if entry.argument else name])
    figure, best = metric.figure(triples(texts(20))), 1.0 if entry.unit == "share" else 100.0
    assert figure.unit == entry.unit
    assert np.all((figure.each() >= 0) & (figure.each() <= best + 1e-9))
    assert 0 <= figure.value <= best
    perfect = '{"a": [1, 2, 3, 4, 5, 6]}' if "json" in name else "7" if entry.argument else "a cat sat on the mat 7"
    same = metric.figure(triples([(perfect, perfect)] * 3)).value
    assert same == pytest.approx(best)
    worse = metric.figure(triples([(perfect, perfect), ("", perfect)])).value
    assert worse <= same
