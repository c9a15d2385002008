"""Is the answer right? Each metric is a function of an answer and its reference, from 0 (wrong) to 1 (right).

Which one to believe depends on the task. Exact match suits labels and tool calls, numeric answers suit arithmetic,
token F1 suits short facts, ROUGE and BLEU count common n-grams and suit summaries and translations, where even a good
answer shares only half of them. Constraints (length, JSON, a pattern) look at the answer alone. ROUGE and BLEU are
those of rouge-score and sacrebleu, so that the figures are the published ones.

Your own metric is one function of (answer, reference) that gives a number, larger being better, named as
`package.module:function`. To import it is to run it, so such a name is taken from a config written in Python, from the
command line and from the environment, never from a YAML or JSON file (nanoft/config.py).
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np

from nanoft import UserError
from nanoft.config.loading import FUNCTION
from nanoft.metrics.bootstrap import Array, Figure, ratio

Score = Callable[[str, str], float]
EXTRA = "pip install -e '.[metrics]'"


@dataclass(frozen=True)
class Metric:
    """What one answer adds to the sums that the metric is made of, and the metric of those sums."""

    name: str
    parts: Callable[[str, str], Sequence[float]]  # of (answer, reference)
    of_sums: Callable[[Array], Array] = ratio
    unit: Literal["share", "number"] = "share"

    @classmethod
    def mean(cls, name: str, score: Score, unit: Literal["share", "number"] = "share") -> Metric:
        """The mean of a score over all answers."""
        return cls(name, lambda answer, reference: (score(answer, reference), 1.0), unit=unit)

    def figure(self, pairs: Sequence[tuple[str, str]]) -> Figure:
        """The metric of (answer, reference) pairs."""
        return Figure(np.array([self.parts(*pair) for pair in pairs], dtype=np.float64), self.of_sums, self.unit)


def select_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics of these names, everything that they need imported.

    Raises:
        UserError: an unknown name (with the nearest known one), a missing extra, a function that cannot be imported.
    """
    return [_find(name) for name in names]


def _find(name: str) -> Metric:
    kind, colon, value = name.partition(":")
    if kind in CONSTRAINTS and colon:
        return Metric.mean(name, _constraint(name, kind, value))
    if name in SCORES:
        return Metric.mean(name, SCORES[name])
    if name in ROUGE:
        return _rouge(name)
    if name == "bleu":
        return _bleu()
    if FUNCTION.fullmatch(name):
        return Metric.mean(name, _own(name), unit="number")
    forms = {kind: f"{kind}:{argument}" for kind, (argument, _) in CONSTRAINTS.items()}
    known = {**dict.fromkeys(SCORES), **dict.fromkeys(ROUGE), "bleu": None, **forms}
    near = difflib.get_close_matches(kind, known, n=1, cutoff=0.5)
    listed = [forms.get(each, each) for each in near or known]
    hint = f"did you mean {listed[0]}?" if near else f"there are {', '.join(listed)} and package.module:function"
    raise UserError(f"evaluation.metrics: {name!r}: no such metric: {hint}")


# ---- Right or wrong


def exact_match(answer: str, reference: str) -> float:
    """Character by character, but for white space around."""
    return float(answer.strip() == reference.strip())


def normalize(text: str) -> str:
    """Lower case, without punctuation, the articles a, an, the, and double spaces (SQuAD, Rajpurkar et al. 2016)."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def normalized_match(answer: str, reference: str) -> float:
    return float(normalize(answer) == normalize(reference))


def contains(answer: str, reference: str) -> float:
    """Whether the reference stands in the answer."""
    return float(reference.strip() in answer)


def token_f1(answer: str, reference: str) -> float:
    """2 P R / (P + R) of the normalized words, counted with repetition (SQuAD, section 6.1)."""
    said, wanted = normalize(answer).split(), normalize(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()  # P = common / said, R = common / wanted
    return 2 * common / (len(said) + len(wanted))


NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+")


def numeric(answer: str, reference: str) -> float:
    """Whether both give the same number: that behind `####` as in GSM8K (Cobbe et al. 2021), else the last one."""
    said, wanted = final_number(answer), final_number(reference)
    return float(said is not None and said == wanted)


def final_number(text: str) -> Decimal | None:
    """1,234.50 is 1234.5; a minus that follows a digit or a letter (7-3) is no sign."""
    _, marked, behind = text.rpartition("####")
    found = NUMBER.findall(re.sub(r"(?<=\w)-", " ", behind if marked else text))
    if not found:
        return None
    return Decimal((found[0] if marked else found[-1]).replace(",", ""))


# ---- JSON


def json_valid(answer: str, _: str) -> float:
    return float(_parse(answer) is not None)


def json_equal(answer: str, reference: str) -> float:
    """Whether both are the same value: 1 is 1.0 and not true, keys have no order."""
    said = _parse(answer)
    return float(said is not None and said == _parse(reference))


def _parse(text: str) -> tuple[Any] | None:
    """The value that a text spells, in a tuple; None if it spells none. Numbers are told from true and false."""

    def number(digits: str) -> tuple[str, Decimal]:
        return "number", Decimal(digits)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return (json.loads(text, parse_int=number, parse_float=number, parse_constant=refuse),)
    except (ValueError, ArithmeticError, RecursionError):
        return None


# ---- Constraints on the answer alone


def one_line(answer: str, _: str) -> float:
    return float("\n" not in answer.strip())


def _constraint(name: str, kind: str, value: str) -> Score:
    argument, build = CONSTRAINTS[kind]
    try:
        return build(value)
    except (ValueError, re.error) as error:
        reason = f"not a regular expression: {error}" if kind == "regex" else f"write {kind}:{argument}"
        raise UserError(f"evaluation.metrics: {name}: {reason}") from None


def _matches(pattern: str) -> Score:
    compiled = re.compile(pattern)
    return lambda answer, _: float(compiled.search(answer) is not None)


def _bound(size: Callable[[str], int], sign: int) -> Callable[[str], Score]:
    """At most (sign 1) or at least (sign -1) so many."""

    def build(value: str) -> Score:
        limit = int(value)
        return lambda answer, _: float(sign * size(answer) <= sign * limit)

    return build


def _words(text: str) -> int:
    return len(text.split())


SCORES: dict[str, Score] = {
    "exact_match": exact_match,
    "normalized_match": normalized_match,
    "contains": contains,
    "token_f1": token_f1,
    "numeric": numeric,
    "json_valid": json_valid,
    "json_equal": json_equal,
    "one_line": one_line,
}
CONSTRAINTS: dict[str, tuple[str, Callable[[str], Score]]] = {
    "regex": ("PATTERN", _matches),
    "max_words": ("N", _bound(_words, 1)),
    "min_words": ("N", _bound(_words, -1)),
    "max_characters": ("N", _bound(len, 1)),
    "min_characters": ("N", _bound(len, -1)),
}
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


# ---- Metrics of other packages, and your own


def _rouge(name: str) -> Metric:
    """ROUGE-N and ROUGE-L (Lin 2004), F-measure, without stemming, as rouge-score computes it."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError(f"evaluation.metrics: {name} needs the package rouge-score: {EXTRA}") from None
    kind = ROUGE[name]
    scorer = RougeScorer([kind])
    return Metric.mean(name, lambda answer, reference: scorer.score(reference, answer)[kind].fmeasure)


def _bleu() -> Metric:
    """BLEU of the whole set (Papineni et al. 2002), from 0 to 100, as sacrebleu computes it with its defaults.

    Its ten sums: correct and total n-grams for n = 1 to 4, words of the answers, words of the references.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise UserError(f"evaluation.metrics: bleu needs the package sacrebleu: {EXTRA}") from None
    bleu = BLEU()

    def parts(answer: str, reference: str) -> list[float]:
        found = bleu.corpus_score([answer], [[reference]])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def of_sums(sums: Array) -> Array:
        rows = np.rint(sums).astype(int).reshape(-1, 10).tolist()
        scores = [BLEU.compute_bleu(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows]
        return np.array(scores).reshape(sums.shape[:-1])

    return Metric("bleu", parts, of_sums, unit="number")


def _own(name: str) -> Score:
    """The user's function, found as Python finds modules, and last in the current directory."""
    module, _, function = name.partition(":")
    here = os.getcwd()
    try:
        sys.path.append(here)
        found = getattr(importlib.import_module(module), function)
    except UserError:
        raise
    except Exception as error:  # the module is the user's program, and so is the mistake
        raise UserError(f"evaluation.metrics: {name}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UserError(f"evaluation.metrics: {name}: is no function: write def {function}(answer, reference)")

    def score(answer: str, reference: str) -> float:
        try:
            value = float(found(answer, reference))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"evaluation.metrics: {name}: {reason} (answer {answer!r:.60})") from None
        if not math.isfinite(value):
            raise UserError(f"evaluation.metrics: {name}: gave {value} for the answer {answer!r:.60}")
        return value

    return score
