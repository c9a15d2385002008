"""Rewards: scores of sampled answers, by the functions that `rl.reward` names.

A built-in reward is a metric (`answers.py`), so that training maximizes what evaluation measures. A user-defined reward
is `def function(prompt, answer, record)` of two texts and the record as read from its file; it returns a number, and
larger is better. A function that fails costs one warning and its answer, not the run: that answer's reward is NaN.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanoft import UserError
from nanoft.batches import Array
from nanoft.config.functions import RUN, import_function, is_function
from nanoft.config.settings import RLConfig
from nanoft.data.formats import Conversation, Message
from nanoft.io.untrusted import Alarm, can_interrupt, one_line, time_limit
from nanoft.metrics.answers import METRICS, select_metrics
from nanoft.runtime.memory import is_out_of_memory


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the answer, the reference answer, and the tools the model may call."""

    messages: list[Message]
    reference: str  # may be empty
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)  # variables for the chat template
    record: dict[str, Any] = field(default_factory=dict)  # for rewards: as read from its file
    where: str = ""  # file:line of the record

    @classmethod
    def of(cls, c: Conversation, at: int = -1) -> Prompt:
        """The prompt to which message `at` of a record is the answer."""
        asked, answer = c.messages[:at], c.messages[at]["content"]
        return cls(asked, answer, c.tools, c.template_args, c.fields, f"{c.file}:{c.line}")

    @property
    def text(self) -> str:
        """The message to answer."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Answered:
    """The model's answer to a prompt, and the reference without control tokens."""

    prompt: Prompt
    answer: str
    reference: str


class Rewards:
    """The reward functions of a run, and the number of failures of each.

    `open_run(DIR)` returns the reward model of a name run:DIR, a function of many answers.
    """

    def __init__(self, rl: RLConfig, log: Callable[[str], None] = print, open_run: Callable[[str], Any] = str):
        self.names, self.log, self.timeout = list(rl.reward), log, rl.reward_timeout
        self.functions = [None if name.startswith(RUN) else reward_function(name) for name in rl.reward]
        self.models = {name: open_run(name.removeprefix(RUN)) for name in rl.reward if name.startswith(RUN)}
        self.weights = np.array(rl.reward_weights or [1.0] * len(rl.reward))
        self.failures: Counter[str] = Counter()
        self.first_failure = ""
        if self.timeout and not can_interrupt():
            self.log("warning: rl.reward_timeout: no effect here: it needs SIGALRM and the main thread")

    @property
    def columns(self) -> list[str]:
        """The names of the sum and of each function in logs."""
        return ["reward", *(f"rewards/{name}" for name in self.names)]

    def score(self, answers: Sequence[Answered]) -> Array:
        """The reward of each answer by each function, (answers, functions) float64; NaN: it failed."""
        columns = [self._column(*named, answers) for named in zip(self.names, self.functions, strict=True)]
        return np.array(columns, np.float64).reshape(len(columns), len(answers)).T

    def _column(self, name: str, function: Any, answers: Sequence[Answered]) -> list[float]:
        """The rewards by one function; a reward model scores all answers at once or, if that fails, one by one."""
        if (judge := self.models.get(name)) is None:
            return [self._call(name, function, one) for one in answers]
        try:
            if all(map(math.isfinite, found := judge(answers))):
                return list(found)
        except Exception as error:
            if is_out_of_memory(error):
                raise
        return [self._call(name, lambda answered: judge([answered])[0], one) for one in answers]

    def total(self, rewards: Array) -> Array:
        """The weighted sums of rewards, (answers,); NaN where one failed."""
        return rewards @ self.weights

    def _call(self, name: str, function: Callable[[Answered], Any], answered: Answered) -> float:
        try:
            with time_limit(self.timeout, "rl.reward_timeout"):
                value = float(function(answered))
            if math.isfinite(value):
                return value
            reason = f"returned {value}"
        except (Exception, Alarm) as error:  # a mistake in the user's own function
            if name in self.models and is_out_of_memory(error):
                raise
            reason = f"{one_line(''.join(traceback.format_exception_only(error))):.200}"  # str(error) may fail too
        self.failures[name] += 1
        if self.failures[name] == 1:
            what = f"rl.reward: {name}: {reason} at {answered.prompt.where} (answer {answered.answer!r:.60})"
            self.first_failure = self.first_failure or what
            self.log(f"warning: {what}: answers for which it fails are skipped")
        return math.nan


def reward_function(name: str) -> Callable[[Answered], Any]:
    """A metric, or the user's `package.module:function`, as a function of an answer."""
    if is_function(name) and name.partition(":")[0] not in METRICS:
        function = import_function(name, "rl.reward", "(prompt, answer, record)")
        return lambda a: function(a.prompt.text, a.answer, a.prompt.record)
    metric = select_metrics([name], "rl.reward")[0]
    if metric.entry.of_sums:
        raise UserError(f"rl.reward: {name}: measures a whole set of answers, not a single one: choose another metric")
    return lambda a: metric.score(a.answer, a.reference, a.prompt.text)
