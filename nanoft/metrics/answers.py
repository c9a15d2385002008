"""Is the answer correct? METRICS is the table of metrics, for evaluation and for rewards.

A metric is a function of an answer and its reference, usually from 0 (wrong) to 1 (correct). Exact match suits labels
and tool calls, `numeric` arithmetic, token F1 short facts; ROUGE and BLEU (from rouge-score and sacrebleu) count common
n-grams and suit summaries and translations. Constraints depend on the answer only.

A user-defined metric is `def function(answer, reference, prompt)`, or without the prompt; it returns a number, and
larger is better.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from nanoft import UserError
from nanoft.config.fields import nearest
from nanoft.config.functions import import_function, is_function
from nanoft.metrics.bootstrap import Array, Figure, ratio

Score = Callable[[str, str, str], Any]  # (answer, reference, prompt) -> a number, or the sums of a corpus metric


@dataclass(frozen=True)
class Entry:
    build: Callable[[str], Score]  # from the argument after the colon of the name
    argument: str = ""  # placeholder of that argument in messages: N in max_words:N
    package: str = ""  # of the extra `metrics`, if the metric needs one
    unit: Literal["share", "number"] = "share"
    of_sums: Callable[[Array], Array] | None = None  # the value of a corpus metric from its sums; None: mean of scores


@dataclass(frozen=True)
class Metric:
    """A metric that is ready to be computed."""

    name: str
    score: Score
    entry: Entry

    def figure(self, samples: Sequence[tuple[str, str, str]]) -> Figure:
        """The metric of (answer, reference, prompt) triples."""
        scores, entry = np.array([self.score(*sample) for sample in samples], dtype=np.float64), self.entry
        parts = scores if entry.of_sums else np.stack([scores, np.ones_like(scores)], axis=1)
        return Figure(parts, entry.of_sums or ratio, entry.unit)


def select_metrics(names: Sequence[str], field: str = "evaluation.metrics") -> list[Metric]:
    """Look up metrics by name, and import the packages that they need; `field` is for error messages."""
    return [_select(name, field) for name in names]


def _select(name: str, field: str) -> Metric:
    kind, colon, argument = name.partition(":")
    entry = METRICS.get(kind)
    if entry is not None and bool(colon) == bool(entry.argument):
        try:
            score = entry.build(argument)
        except ImportError:
            fix = f"needs the package {entry.package}: pip install -e '.[metrics]'"
            raise UserError(f"{field}: {name} {fix}") from None
        except (ValueError, re.error) as error:
            reason = f"not a regular expression: {error}" if kind == "regex" else f"write {kind}:{entry.argument}"
            raise UserError(f"{field}: {name}: {reason}") from None
        return Metric(name, score, entry)
    if is_function(name):
        return Metric(name, _own(name), Entry(_own, unit="number"))
    forms = [f"{kind}:{entry.argument}" if entry.argument else kind for kind, entry in METRICS.items()]
    raise UserError(f"{field}: {name!r}: no such metric{nearest(kind, [*forms, 'package.module:function'])}")


def exact_match(answer: str, reference: str) -> float:
    return float(answer.strip() == reference.strip())


def normalize(text: str) -> str:
    """Lower case, without punctuation, the articles a, an, the, and double spaces (SQuAD, Rajpurkar et al. 2016)."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def normalized_match(answer: str, reference: str) -> float:
    return float(normalize(answer) == normalize(reference))


def contains(answer: str, reference: str) -> float:
    return float(reference.strip() in answer)


def token_f1(answer: str, reference: str) -> float:
    """2 P R / (P + R) of the normalized words, counted with repetition (SQuAD, section 6.1)."""
    words, wanted = normalize(answer).split(), normalize(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()  # P = common / words, R = common / wanted
    return 2 * common / (len(words) + len(wanted))


# A minus after a digit, letter, closing bracket, % or . is a subtraction or a hyphen: 10-7, (3)-7, 5%-7%.
NUMBER = re.compile(r"(?:(?<![\w)\]}%.])-[$€£]?)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")


def numeric(answer: str, reference: str) -> float:
    """Whether both state the same number: the one after `####` (GSM8K, Cobbe et al. 2021), or else the last one."""
    found, wanted = final_number(answer), final_number(reference)
    return float(found is not None and found == wanted)


def final_number(text: str) -> Decimal | None:
    """The number of an answer: 1234.5 of "She pays $1,234.50", 7 of "10-7", -7 of "3 - 10 = -7"."""
    _, marked, after = text.replace("\N{MINUS SIGN}", "-").rpartition("####")
    found = [re.sub("[,$€£]", "", number) for number in NUMBER.findall(after)]
    return Decimal(found[0 if marked else -1]) if found else None


def json_valid(answer: str, _: str) -> float:
    return float(_normal_json(answer) is not None)


def json_equal(answer: str, reference: str) -> float:
    """Whether both are the same JSON value: 1 equals 1.0 but not true; the order of keys does not matter."""
    found = _normal_json(answer)
    return float(found is not None and found == _normal_json(reference))


def _normal_json(text: str) -> str | None:
    """JSON with sorted keys and without needless fractions (1.0 is 1); None if the text is not JSON."""

    def number(digits: str) -> float:
        value = float(digits)
        return int(value) if value.is_integer() else value

    try:  # NaN is Python's, not JSON's: int("NaN") raises
        return json.dumps(json.loads(text, parse_float=number, parse_constant=int), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def one_line(answer: str, _: str) -> float:
    return float("\n" not in answer.strip())


def _matches(pattern: str) -> Score:
    compiled = re.compile(pattern)
    return lambda answer, *_: float(compiled.search(answer) is not None)


def _bound(units: Callable[[Any], Any], sign: int, value: str) -> Score:
    """A limit on words (units=str.split) or characters (units=str): a maximum for sign 1, a minimum for -1."""
    limit = int(value)
    return lambda answer, *_: float(sign * len(units(answer)) <= sign * limit)


def _rouge(kind: str, _: str) -> Score:
    """ROUGE-N and ROUGE-L (Lin 2004), F-measure, without stemming, as rouge-score computes it."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    return lambda answer, reference, _: scorer.score(reference, answer)[kind].fmeasure


def _bleu(_: str) -> Score:
    """BLEU of the whole set (Papineni et al. 2002), from 0 to 100, as sacrebleu computes it with its defaults.

    Its ten sums: correct and total n-grams for n = 1 to 4, words of the answers, words of the references.
    """
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU()

    def sums(answer: str, reference: str, _: str) -> list[float]:
        found = bleu.corpus_score([answer], [[reference]])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    return sums


def _bleu_of_sums(sums: Array) -> Array:
    from sacrebleu.metrics.bleu import BLEU

    rows = np.rint(sums).astype(int).reshape(-1, 10).tolist()
    scores = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows]
    return np.array(scores).reshape(sums.shape[:-1])


def _own(name: str) -> Score:
    function = import_function(name, "evaluation.metrics", "(answer, reference, prompt)")
    count = 2  # 3 if there is a third parameter that is required or named prompt
    with contextlib.suppress(TypeError, ValueError):  # a built-in without a signature
        third = [*inspect.signature(function).parameters.values()][2:3]
        count += any(p.kind <= p.POSITIONAL_OR_KEYWORD and (p.default is p.empty or p.name == "prompt") for p in third)

    def score(*sample: str) -> float:
        try:
            value = float(function(*sample[:count]))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"evaluation.metrics: {name}: {reason} (answer {sample[0]!r:.60})") from None
        if not math.isfinite(value):
            fix = "return a finite number"
            raise UserError(f"evaluation.metrics: {name}: returned {value} for the answer {sample[0]!r:.60}: {fix}")
        return value

    return score


def _plain(score: Callable[[str, str], float]) -> Entry:
    return Entry(lambda _: lambda answer, reference, _: score(answer, reference))


PLAIN = (exact_match, normalized_match, contains, token_f1, numeric, json_valid, json_equal, one_line)
METRICS = {
    **{score.__name__: _plain(score) for score in PLAIN},
    **{f"rouge_{n}": Entry(functools.partial(_rouge, f"rouge{n.upper()}"), package="rouge-score") for n in "12l"},
    "bleu": Entry(_bleu, package="sacrebleu", unit="number", of_sums=_bleu_of_sums),
    "regex": Entry(_matches, argument="PATTERN"),
    "max_words": Entry(functools.partial(_bound, str.split, 1), argument="N"),
    "min_words": Entry(functools.partial(_bound, str.split, -1), argument="N"),
    "max_characters": Entry(functools.partial(_bound, str, 1), argument="N"),
    "min_characters": Entry(functools.partial(_bound, str, -1), argument="N"),
}
