"""Records that compare answers: pairs, ranked answers, and single answers with a label.

A record becomes a conversation with its best answer, and the same prompt with each worse one. Objectives on pairs
compare the best answer with each worse one; KTO uses every answer by itself, as desirable or undesirable. PAIR_SHAPES
is the table of shapes. The prompt may be a text or messages in a field of its own, or the common beginning of answers
that are whole conversations.
"""

from __future__ import annotations

import re
from operator import itemgetter
from typing import Any

from nanoft.data.detection import BAD, GOOD, LABELS, Shape
from nanoft.data.sources import BadRecord
from nanoft.data.values import as_json, number_of, optional_text, text_of

Message = dict[str, Any]
# Categories of records without a preference.
EQUAL, EMPTY, UNRANKED = "equal answers", "empty answer", "no worse answer"
UNLABELED, UNDESIRABLE = "no label", "undesirable label"
TURNS = ("prompt", "conversations", "messages")  # fields that may hold turns
ASKED = (*TURNS, "question", "instruction", "input")  # fields of a prompt: the first one present is used
TEXTS = ("answer", "response", "content", "text", "value", "completion")  # fields of a ranked answer: its text,
PLACES = ("rank", "score", "overall_score", "reward")  # its rank (1 is best) or score (higher is better)
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # of a dialogue in one text, as in Anthropic's HH data


class Skipped(BadRecord):
    """A record without a preference, which is not malformed; `kind` is its category in the report."""

    def __init__(self, kind: str, reason: str = ""):
        super().__init__(reason or kind)
        self.kind = kind


def one_prompt(record: dict[str, Any]) -> dict[str, Any]:
    """Keep only the first field of a record's prompt; OpenAI nests it: "input": {"messages", "tools"}."""
    for name in ("prompt", "input"):
        if isinstance(record.get(name), dict) and "messages" in record[name]:
            record = {**record, "prompt": None, "input": None, **record[name]}
    unread = set(ASKED) - {asked := _asked(record)} - ({"input"} if asked == "instruction" else set())
    return {name: value for name, value in record.items() if name not in unread}


def _asked(record: dict[str, Any]) -> str | None:
    return next((name for name in ASKED if record.get(name)), None)


def last_answer(turns: list[Message]) -> list[Message]:
    """Mark only what follows the last user message as the answer that is compared."""
    at = max((at for at, turn in enumerate(turns) if turn["role"] == "user"), default=-1) + 1
    return [*_context(turns[:at]), *turns[at:]]


def _turns(value: Any, role: str) -> list[Message]:
    """The turns of a text (one), of a dialogue in one text, or of converted messages (unchanged)."""
    if isinstance(value, list):
        return value
    value = text_of({role: value}, role)
    if not SPEAKER.match(value):
        return [{"role": role, "content": value}]
    _, *parts = SPEAKER.split(value)
    roles = [{"Human": "user", "Assistant": "assistant"}[name] for name in parts[::2]]
    turns = [{"role": who, "content": text.strip()} for who, text in zip(roles, parts[1::2], strict=True)]
    return turns if role == "assistant" or turns[-1]["content"] else turns[:-1]  # a prompt may end in "Assistant:"


def _prompt(record: dict[str, Any]) -> list[Message]:
    """The turns before the answer, from the first field present; Alpaca's `input` is appended to `instruction`."""
    name = _asked(record)
    asked = _turns(record[name] if name in TURNS else text_of(record, name), "user") if name else []
    if name == "instruction" and (more := optional_text(record, "input").strip()):
        asked[-1] = {**asked[-1], "content": f"{asked[-1]['content']}\n\n{more}"}
    return asked


def _context(turns: list[Message]) -> list[Message]:
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]


def _versions(prompt: list[Message], answers: list[list[Message]]) -> list[list[Message]]:
    """Each answer after the prompt; if answers are whole conversations, their common turns are the prompt."""
    if all(answer == answers[0] for answer in answers[1:]):
        raise Skipped(EQUAL)
    if any(answer[0]["role"] != "assistant" for answer in answers):
        differ = [any(turn != turns[0] for turn in turns) for turns in zip(*answers, strict=False)]
        common = differ.index(True) if True in differ else len(differ) - 1  # one may be a prefix of another
        while common and any(answer[common]["role"] != "assistant" for answer in answers):
            common -= 1
        if not common:
            raise BadRecord("the answers have no prompt in common: add a field prompt")
        shared = [turn["content"].strip() for turn in answers[0][:common]]
        asked = [turn["content"].strip() for turn in prompt if turn["role"] == "user"][-1:]
        if prompt and not (asked and (asked[0] in shared or shared[-1] in asked[0])):
            raise BadRecord("prompt differs from the prompt in the answers: keep one of the two")
        prompt, answers = answers[0][:common], [answer[common:] for answer in answers]
    if not prompt:
        raise BadRecord("has no prompt")
    return [[*_context(prompt), *answer] for answer in answers]


def _pair(record: dict[str, Any]) -> list[list[Message]]:
    """{"prompt" (may be missing), "chosen", "rejected"}: texts or messages."""
    return _versions(_prompt(record), [_turns(record[name], "assistant") for name in ("chosen", "rejected")])


def _ranked(record: dict[str, Any]) -> list[list[Message]]:
    """{"prompt", "answers": best first, or with ranks or scores}: the best answer and each worse one."""
    answers = as_json(record["answers"], "answers")
    if not isinstance(answers, list):
        raise BadRecord("answers: not a list")
    is_plain = all(isinstance(answer, str) for answer in answers)
    given = list(enumerate(answers)) if is_plain else [_placed(answer) for answer in answers]
    placed = [(place, text_of({"answers": text}, "answers")) for place, text in given]
    placed = sorted((one for one in placed if one[1].strip()), key=itemgetter(0))
    worse = [text for place, text in placed if place > placed[0][0] and text != placed[0][1]]
    if not worse:
        raise Skipped(UNRANKED)
    return _versions(_prompt(record), [_turns(text, "assistant") for text in (placed[0][1], *worse)])


def _placed(answer: Any) -> tuple[float, Any]:
    """(place, text) of an answer with a rank, 1 is best, or with a score, higher is better."""
    given = answer if isinstance(answer, dict) else {}
    text, place = (next((name for name in names if given.get(name) is not None), "") for names in (TEXTS, PLACES))
    if not text or not place:
        raise BadRecord(f"answers: each needs a text ({', '.join(TEXTS)}) and a rank or score")
    return number_of(given, place) * (1 if place == "rank" else -1), given[text]


PAIR_SHAPES = {
    "preference": Shape(("chosen", "rejected"), ("system", *ASKED, "chosen", "rejected", "tools"), _pair),
    "ranked": Shape(("answers",), ("system", *ASKED, "answers", "tools"), _ranked),
}


def is_desirable(record: dict[str, Any], label: str | None) -> bool:
    """Whether the field `label` marks an answer as good; None: the first field of LABELS in the record."""
    name = next((name for name in ([label] if label else LABELS) if name in record), None)
    if name is None:
        where = f"{label!r} (data.label_field)" if label else " or ".join(LABELS)
        raise Skipped(UNLABELED, f"has no field {where}")
    value = str(record[name]).strip().lower()
    if value not in GOOD + BAD:
        what = f"{name}: {value!r:.40} is neither desirable nor undesirable (true/false, 1/0, good/bad)"
        raise Skipped(UNLABELED, what) if value in ("", "none", "nan") else BadRecord(what)
    return value in GOOD
