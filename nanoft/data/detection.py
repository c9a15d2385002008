"""Detect the shape of a file's records, and which of their columns are its fields.

Data sets have many names for one field: `output`, `response`, `completion`. A shape whose fields occur under their own
names takes precedence; other names are used only if they fit exactly one shape. An ambiguous file is an error, which
lists the settings to choose from.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.data.sources import BadRecord, Raw

FIELD_NAMES = {  # field of a shape -> its other names
    "messages": ("chat",),
    "conversations": ("conversation",),
    "system": ("system_prompt", "system_message"),
    "input": ("context",),
    "output": ("response", "answer", "completion"),
    "prompt": ("input", "inputs", "query"),
    "completion": ("response", "output", "answer", "targets"),
    "question": ("problem",),
    "answer": ("response", "output", "completion", "solution"),
    "document": ("text", "article", "dialogue"),
    "summary": ("highlights", "abstract"),
    "chosen": ("preferred", "accepted", "chosen_response", "response_chosen", "preferred_output", "response_j"),
    "rejected": ("dispreferred", "rejected_response", "response_rejected", "non_preferred_output", "response_k"),
    "answers": ("responses", "completions", "candidates"),
}
LABELS = ("label", "kto_tag")  # fields that mark answers as good or bad, if all their values are in GOOD or BAD
GOOD = ("true", "1", "1.0", "desirable", "chosen", "good", "yes")  # 1.0 and 0.0: from tables with missing values
BAD = ("false", "0", "0.0", "undesirable", "rejected", "bad", "no")


@dataclass(frozen=True)
class Shape:
    """One way to write down a conversation."""

    required: tuple[str, ...]  # fields that every record has; `auto` detects the shape by them
    fields: tuple[str, ...]  # all fields that are read, in display order
    # Converts to messages, or to several versions of them, best first, for objectives with preferences.
    to_messages: Callable[[dict[str, Any]], list[Any]] | None  # None: plain text, whose last field is the target


def normalized_name(name: str) -> str:
    """A name in the form in which names are compared: lower case, `_` for spaces and hyphens."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def find_columns(shape: Shape, present: Collection[str]) -> list[dict[str, str]]:
    """All ways to find a shape's fields among the columns, as field -> column; none if a required one is missing.

    If all required fields occur under their own names, other columns are not considered.
    """
    is_exact = all(name in present for name in shape.required)
    choices: list[list[tuple[str, str] | None]] = []
    for name in shape.fields:
        names = (name, *FIELD_NAMES.get(name, ()))
        taken = [] if name in shape.required else [c[0][1] for c in choices if len(c) == 1 and c[0]]
        others = [c for c in present if normalized_name(c) in names and c not in taken]
        found = [(name, column) for column in ([name] if is_exact and name in present else others)]
        if not found and name in shape.required:
            return []
        choices.append([*found] or [None])
    ways = [dict(filter(None, way)) for way in itertools.product(*choices)]
    return [way for way in ways if len(set(way.values())) == len(way)]


def detect_shape(
    path: Path, shapes: Mapping[str, Shape], wanted: str, records: list[tuple[int, Raw]],
    others: Mapping[str, Shape],  # shapes for other objectives
) -> tuple[str, dict[str, str]]:  # fmt: skip
    """(shape, field -> column) of the wanted shape, or `auto`.

    `auto` is the shape that most records have, or else the one that fits by other names, or else text.
    """
    present = list(dict.fromkeys(name for _, record in records if isinstance(record, dict) for name in record))
    votes = dict.fromkeys(shapes, 0)
    for _, record in records:
        for name, shape in shapes.items() if isinstance(record, dict) else ():
            votes[name] += shape.to_messages is not None and record.keys() >= {*shape.required}
    best = [name for name in votes if votes[name] and votes[name] == max(votes.values())]
    best = [name for name in best if shapes[name].required != ("prompt",)] or best  # other shapes have a prompt too
    paired = [name for name in best if {"chosen", "rejected"} <= {*shapes[name].fields}]  # with a prompt in `messages`
    best = (paired or best) if wanted == "auto" else [wanted]
    example = next((record for _, record in records if isinstance(record, dict)), {})
    if best and wanted == "auto" and not paired and isinstance(example.get("chosen"), dict):
        raise UserError(f"{path}: {other_objective(others['preference'], {})}")
    if len(best) > 1:
        choices = " or ".join(f"data.format={name} ({', '.join(shapes[name].required)})" for name in best)
        raise UserError(f"{path}: its records fit {len(best)} shapes: choose {choices}")
    if best:
        return best[0], require_one_reading(path, find_columns(shapes[best[0]], present), present)
    readings = [(n, way) for n, s in shapes.items() if s.to_messages for way in find_columns(s, present)]
    if readings:
        names = {*FIELD_NAMES, *itertools.chain(*FIELD_NAMES.values())}
        unused = {c for c in present if normalized_name(c) in names} - {*readings[0][1].values()}
        require_one_reading(path, [way for _, way in readings], present, bool(unused))
        return readings[0]
    if "text" in present and "text" in shapes:
        return "text", {}
    line, first = records[0]
    if isinstance(first, BadRecord):
        raise UserError(f"{path}:{line}: {first}")
    fitting = [n for n, s in others.items() if s.required != ("prompt",) and find_columns(s, present)]
    if fitting:
        raise UserError(f"{path}: {other_objective(others[fitting[0]], example)}")
    has = f"the fields {names_of(first)}" if isinstance(first, dict) else f"no fields, but is a {type(first).__name__}"
    known = "; ".join(
        f"{name} ({', '.join(shape.required)})" for name, shape in shapes.items() if name != "raw_prompt_completion"
    )
    raise UserError(f"{path}: unknown shape: its first record has {has}: map them with data.columns to one of {known}")


def other_objective(shape: Shape, example: dict[str, Any]) -> str:
    """What the records contain that this objective cannot use, and the objective that can."""
    if shape.required not in (("chosen", "rejected"), ("answers",)):
        kto = [f", or training.objective=kto to learn from {name}" for name in LABELS if name in example]
        return f"it has no preferred answers ({', '.join(shape.required)}): set training.objective=sft{''.join(kto)}"
    return (
        "contains pairs of answers: set training.objective=dpo to learn the preference, or map the chosen ones with "
        "data.columns (completion, answer, output or messages) for SFT"
    )


def require_one_reading(
    path: Path, ways: list[dict[str, str]], present: Collection[str], unsure: bool = False
) -> dict[str, str]:
    """The only way to read a file; a UserError that lists the settings if there are several, or if it is `unsure`."""
    if len(ways) > 1 or unsure:
        choices = [f"data.columns='{json.dumps(way, ensure_ascii=False)}'" for way in ways]
        choices += ["data.format=text"] * ("text" in present)
        where = f"{path}: its fields {names_of(present)} can be read in several ways"
        raise UserError(f"{where}: choose {' or '.join(choices)}")
    return ways[0] if ways else {}


def require_label_choice(path: Path, records: list[tuple[int, Raw]]) -> None:
    """Raise a UserError if a field marks answers as good or bad: training would learn the bad ones too."""
    for name in LABELS:
        found = {str(r[name]).strip().lower() for _, r in records if isinstance(r, dict) and r.get(name) is not None}
        if found and found <= {*GOOD, *BAD}:
            choice = f"set data.label_field={name} to learn only good ones, data.label_field=ignore to learn all"
            raise UserError(f"{path}: {name} marks answers as good or bad: {choice}, or training.objective=kto")


def names_of(record: Collection[str]) -> str:
    return repr(", ".join(record))[1:-1][:200]
