"""What is an answer worth? The rewards of a step's answers, by the functions that `rl.reward` names.

A built-in reward is a metric (`answers.py`), so what training raises is what evaluation measures. Your own reward is
`def function(prompt, answer, record)`, of texts and of the record as it stands in its file: a number, larger being
better. A function that fails says so in one line and costs its answer, not the run: the answer has no reward, NaN.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

from nanoft import UserError
from nanoft.batches import Array
from nanoft.config.functions import RUN, import_function, is_function
from nanoft.config.settings import RLConfig
from nanoft.data.formats import Conversation, Message
from nanoft.io.untrusted import one_line
from nanoft.metrics.answers import METRICS, select_metrics
from nanoft.runtime.memory import is_out_of_memory


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the answer, the reference answer, and the tools the model may call."""

    messages: list[Message]
    reference: str  # may be empty
    tools: list[dict[str, Any]] | None = None
    template_args: dict[str, Any] = field(default_factory=dict)  # variables for the chat template
    record: dict[str, Any] = field(default_factory=dict)  # for rewards: as it stands in its file
    where: str = ""  # file:line of the record

    @classmethod
    def of(cls, c: Conversation, at: int = -1) -> Prompt:
        """What message `at` of a record answers."""
        asked, answer = c.messages[:at], c.messages[at]["content"]
        return cls(asked, answer, c.tools, c.template_args, c.fields, f"{c.file}:{c.line}")

    @property
    def text(self) -> str:
        """The message that is answered."""
        return str(self.messages[-1]["content"])


@dataclass(frozen=True)
class Answered:
    """The model's answer to a prompt, and the reference without control tokens."""

    prompt: Prompt
    answer: str
    reference: str


class Rewards:
    """The reward functions of a run, and how often each has failed.

    `open_run(DIR)` gives the reward model of a name run:DIR, a function of many answers.
    """

    def __init__(self, rl: RLConfig, log: Callable[[str], None] = print, open_run: Callable[[str], Any] = str):
        self.names, self.log, self.timeout = list(rl.reward), log, rl.reward_timeout
        self.functions = [None if name.startswith(RUN) else reward_function(name) for name in rl.reward]
        self.models = {name: open_run(name.removeprefix(RUN)) for name in rl.reward if name.startswith(RUN)}
        self.weights = np.array(rl.reward_weights or [1.0] * len(rl.reward))
        self.failures: Counter[str] = Counter()
        self.first_failure = ""
        if self.timeout and not can_interrupt():
            self.log("warning: rl.reward_timeout: has no effect here, without SIGALRM in the main thread")

    @property
    def columns(self) -> list[str]:
        """The names of the sum and of each function in logs."""
        return ["reward", *(f"rewards/{name}" for name in self.names)]

    def score(self, answers: Sequence[Answered]) -> Array:
        """What each function says of each answer, (answers, functions) float64; NaN: it failed."""
        columns = [self._column(*named, answers) for named in zip(self.names, self.functions, strict=True)]
        return np.array(columns, np.float64).reshape(len(columns), len(answers)).T

    def _column(self, name: str, function: Any, answers: Sequence[Answered]) -> list[float]:
        """What one function says; a reward model is asked about all answers at once, and if that fails about each."""
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
            value = call_within(self.timeout, lambda: float(function(answered)))
            if math.isfinite(value):
                return value
            reason = f"returned {value}"
        except Exception as error:  # the function is the user's program, and so is the mistake
            if name in self.models and is_out_of_memory(error):
                raise
            reason = f"{one_line(''.join(traceback.format_exception_only(error))):.200}"  # its own text may fail, too
        self.failures[name] += 1
        if self.failures[name] == 1:
            what = f"rl.reward: {name}: {reason} at {answered.prompt.where} (answer {answered.answer!r:.60})"
            self.first_failure = self.first_failure or what
            self.log(f"warning: {what}: this answer is skipped, as further ones will be")
        return math.nan


def reward_function(name: str) -> Callable[[Answered], Any]:
    """A metric, or the user's own `package.module:function`, as a function of an answer."""
    if is_function(name) and name.partition(":")[0] not in METRICS:
        function = import_function(name, "rl.reward", "(prompt, answer, record)")
        return lambda a: function(a.prompt.text, a.answer, a.prompt.record)
    metric = select_metrics([name], "rl.reward")[0]
    if metric.entry.of_sums:
        raise UserError(f"rl.reward: {name}: measures a whole set of answers, not one: choose another")
    return lambda a: metric.score(a.answer, a.reference, a.prompt.text)


def can_interrupt() -> bool:
    return hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()


class Alarm(BaseException):
    """The time is up: no Exception, so that a function which catches those ends all the same."""


def call_within(seconds: float, call: Callable[[], float]) -> float:
    """What `call` returns; a TimeoutError after so many seconds, by SIGALRM. Without that, or for 0: no limit."""
    if not seconds or not can_interrupt():
        return call()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Alarm

    before, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, interval = signal.getitimer(signal.ITIMER_REAL)  # of a timer that runs already
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Alarm:
        raise TimeoutError(f"took longer than rl.reward_timeout={seconds:g} seconds") from None
    finally:
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)
