"""Rewards: metrics and user functions, hostile ones too, give a number, or NaN and one line."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoft import UserError
from nanoft.config import Config
from nanoft.config.loading import load_config
from nanoft.metrics.rewards import Answered, Prompt, Rewards, reward_function

OWN = """
import time

def right(prompt, answer, record):
    return (answer == record["solution"]) + len(prompt) / 100

def raises(prompt, answer, record):
    raise KeyError(answer)

def conditional(prompt, answer, record):
    return 1 / (len(answer) - 1)

def nan(prompt, answer, record):
    return float("nan")

def inf(prompt, answer, record):
    return float("inf")

def none(prompt, answer, record):
    return None

def text(prompt, answer, record):
    return "good"

def busy(prompt, answer, record):
    while True:
        pass

def sleeps(prompt, answer, record):
    time.sleep(60)

def stubborn(prompt, answer, record):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass

class Silent(Exception):
    def __str__(self):
        raise RuntimeError

def silent(prompt, answer, record):
    raise Silent

def garbled(prompt, answer, record):
    raise ValueError("\\ud800 \\x1b[31m")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    name = f"own_rewards_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


def answered(answer: str, number: int = 3, **record: Any) -> Answered:
    asked, fields = [{"role": "user", "content": "What is 1 + 1?"}], {"solution": "two", **record}
    return Answered(Prompt(asked, "2", record=fields, where=f"sums.jsonl:{number}"), answer, "2")


def rewards(*names: str, weights: tuple[float, ...] = (), timeout: float = 5.0) -> tuple[Rewards, list[str]]:
    """The reward functions, and their messages."""
    said: list[str] = []
    config = Config().override({"rl.reward": names, "rl.reward_weights": weights, "rl.reward_timeout": timeout})
    return Rewards(config.rl, said.append), said


@pytest.mark.parametrize(
    ("name", "answer", "value"),
    [
        ("exact_match", "2", 1.0),
        ("exact_match", "two", 0.0),
        ("numeric", "It is 2.", 1.0),
        ("contains", "1 + 1 = 2!", 1.0),
        ("regex:^[0-9]$", "2", 1.0),
        ("regex:^[0-9]$", "22", 0.0),
        ("max_words:2", "one two three", 0.0),
        ("json_equal", "2", 1.0),
    ],
)
def test_a_metric_is_a_reward(name: str, answer: str, value: float) -> None:
    assert reward_function(name)(answered(answer)) == value


def test_a_function_of_ones_own_sees_prompt_answer_and_record(own: str) -> None:
    function = reward_function(f"{own}:right")
    assert function(answered("two")) == pytest.approx(1.14)
    assert function(answered("2")) == pytest.approx(0.14)


def test_several_are_summed_with_their_weights(own: str) -> None:
    scorer, said = rewards("exact_match", f"{own}:right", "max_words:1", weights=(2.0, 10.0, -0.5))
    found = scorer.score([answered("2"), answered("two"), answered("I do not know")])
    np.testing.assert_allclose(found, [[1, 0.14, 1], [0, 1.14, 1], [0, 0.14, 0]])
    np.testing.assert_allclose(scorer.total(found), [2 + 1.4 - 0.5, 11.4 - 0.5, 1.4])
    unweighted, _ = rewards("exact_match", f"{own}:right", "max_words:1")
    np.testing.assert_allclose(unweighted.total(found), [2.14, 2.14, 0.14])
    assert said == []
    assert scorer.score([]).shape == (0, 3)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "KeyError: '2'"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("none", "TypeError"),
        ("text", "ValueError: could not convert string to float: 'good'"),
        ("busy", "rl.reward_timeout: takes longer than 0.05 seconds"),
        ("sleeps", "rl.reward_timeout: takes longer than 0.05 seconds"),
        ("stubborn", "rl.reward_timeout: takes longer than 0.05 seconds"),
        ("silent", "<exception str() failed>"),
        ("garbled", "ValueError: \\ud800 \\x1b[31m at"),
    ],
)
def test_one_that_fails_costs_its_answer_and_says_so_once(function: str, reason: str, own: str) -> None:
    scorer, said = rewards("exact_match", name := f"{own}:{function}", timeout=0.05)
    started = time.monotonic()
    found = scorer.score([answered("2"), answered("2", 4)])
    assert time.monotonic() - started < 5
    np.testing.assert_array_equal(found, [[1, math.nan]] * 2)
    assert np.isnan(scorer.total(found)).all()
    (line,) = said
    assert line.startswith(f"warning: rl.reward: {name}: ")
    assert reason in line
    assert line.isprintable()
    assert "at sums.jsonl:3 (answer '2')" in line
    assert "\n" not in line


def test_only_the_answer_that_fails_is_lost(own: str) -> None:
    scorer, said = rewards(f"{own}:conditional")
    np.testing.assert_array_equal(
        scorer.score([answered("abc"), answered("a"), answered("ab")])[:, 0], [0.5, np.nan, 1]
    )
    assert len(said) == 1


def test_a_long_message_of_an_error_is_one_line(own: str, tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("def f(prompt, answer, record):\n    raise ValueError('a\\nb\\n' * 1000)\n")
    scorer, said = rewards("long:f")
    assert np.isnan(scorer.score([answered("2\n" * 500)])).all()
    assert "\n" not in said[0]
    assert len(said[0]) < 500


# --- the limit


def test_the_handler_and_the_timer_are_what_they_were(own: str) -> None:
    def own_handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGALRM, own_handler)
    try:
        scorer, _ = rewards("exact_match", f"{own}:raises", f"{own}:busy", timeout=0.05)
        scorer.score([answered("2")])
        assert signal.getsignal(signal.SIGALRM) is own_handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seconds", [1e-9, 1e-5, 2e-5, 3e-5, 5e-5])
def test_a_limit_that_ends_anywhere_is_a_timeout_or_none(seconds: float) -> None:
    """The alarm may come before the function is called, and while the limit is being removed."""
    before = signal.getsignal(signal.SIGALRM)
    scorer, _ = rewards("exact_match", timeout=seconds)
    assert all(np.isnan(value) or value == 1 for value in scorer.score([answered("2")] * 500)[:, 0])
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_without_sigalrm_in_a_thread_it_says_so_once_and_still_works() -> None:
    result: list[Any] = []

    def work() -> None:
        scorer, said = rewards("exact_match", "max_words:3")
        result.extend([scorer.score([answered("2")]).tolist(), said])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert result[0] == [[1.0, 1.0]]
    (line,) = result[1]
    assert line.startswith("warning: rl.reward_timeout: no effect here")
    assert rewards("exact_match")[1] == []


# --- what is refused


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("exactmatch", ["rl.reward: 'exactmatch': no such metric", "exact_match"]),
        ("bleu", ["rl.reward: bleu"]),  # of a set, not of an answer
        ("regex:(", ["rl.reward: regex:(: not a regular expression"]),
        ("max_words:many", ["rl.reward: max_words:many: write max_words:N"]),
        ("nowhere_at_all:f", ["rl.reward: nowhere_at_all:f: ModuleNotFoundError"]),
        ("math:pi", ["rl.reward: math:pi: not a function", "def pi(prompt, answer, record)"]),
    ],
)
def test_a_name_that_is_none_is_one_line(name: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        reward_function(name)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_file_of_data_may_not_name_a_function(own: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"rl:\n  reward: ['exact_match', '{own}:right']\n")
    with pytest.raises(UserError, match=f"rl.reward: {own}:right: a data file must not name code to run"):
        load_config(tmp_path / "run.yaml", [], {})
    (tmp_path / "run.yaml").write_text("rl:\n  reward: ['exact_match']\n")
    assert load_config(tmp_path / "run.yaml", [f"rl.reward={own}:right"], {}).rl.reward == (f"{own}:right",)


def test_the_config_of_a_run_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    settings = Config().override({"rl.reward": ("exact_match", "evil:f"), "rl.reward_weights": (1.0, 2.0)}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**settings, "provenance": {}}))
    config = load_config(tmp_path / "config.json", [], {})
    assert config.rl.reward[0] == "exact_match"
    assert len(config.rl.reward) == 2, "its weights still fit"
    with pytest.raises(UserError) as caught:
        Rewards(config.rl)
    assert "\n" not in str(caught.value)
    assert load_config(tmp_path / "config.json", ["rl.reward=max_words:2"], {}).rl.reward == ("max_words:2",)


def test_a_reward_model_is_no_function_whatever_its_directory(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("rl:\n  reward: ['run:judge']\n")
    assert load_config(tmp_path / "run.yaml", [], {}).rl.reward == ("run:judge",)
    settings = Config().override({"rl.reward": ("run:judge",)}).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**settings, "provenance": {}}))
    assert load_config(tmp_path / "config.json", [], {}).rl.reward == ("run:judge",)


def judging(answers: Sequence[Answered]) -> list[float]:
    """A reward model that takes some answers for a reason to fail."""
    said = [each.answer for each in answers]
    if "bad" in said:
        raise UserError("the chat template refuses this")
    if "large" in said:
        raise MemoryError
    return [math.inf if text == "odd" else float(len(text)) for text in said]


def test_a_reward_model_that_fails_costs_the_answers_for_which_it_does() -> None:
    said: list[str] = []
    config = Config().override({"rl.reward": ("run:judge",)})
    scorer = Rewards(config.rl, said.append, lambda run: judging)
    np.testing.assert_array_equal(scorer.score([answered("2"), answered("two")])[:, 0], [1, 3])
    assert not said
    found = scorer.score([answered("2"), answered("bad", 7), answered("odd"), answered("two")])
    np.testing.assert_array_equal(found[:, 0], [1, math.nan, math.nan, 3])
    assert scorer.failures["run:judge"] == 2
    assert len(said) == 1
    assert "run:judge: nanoft.UserError: the chat template refuses this at sums.jsonl:7" in said[0]
    for answers in ([answered("large")], [answered("bad"), answered("large")]):
        with pytest.raises(MemoryError):
            scorer.score(answers)


@pytest.mark.parametrize("text", ["run:runs/judge,max_words:9", "[run:runs/judge, max_words:9]"])
def test_several_on_the_command_line(text: str) -> None:
    assert Config().override({"rl.reward": text}).rl.reward == ("run:runs/judge", "max_words:9")
