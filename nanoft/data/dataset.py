"""Files to the samples of a run: one pass over the data, a table of what became of it, and a cache.

    read -> check -> known already? -> render -> encode -> fits? -> file of token ids        one pass, streamed
    near duplicates -> split -> leaks -> weights                                             on numbers of the records

Tokenizing a million records takes minutes, so it is done once: `nanoft/cache.py` keeps the result under a hash of all
it depends on (the files' contents, the tokenizer, the template and its date, the settings). The token ids are mapped
into memory, so a corpus of any size is opened in the time that it takes to check it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tqdm import tqdm

from nanoft import UserError
from nanoft.batches import Sample, TokenDataset, encode_targets
from nanoft.config import DataConfig
from nanoft.data import filters
from nanoft.data.cache import cached, hash_unless_known
from nanoft.data.chat_tokenizer import ChatTokenizer, Rendered, TemplateRefusal
from nanoft.data.formats import UNDESIRABLE, Conversation, Reading, Rejected, read_file
from nanoft.data.sources import find_files, read_raw
from nanoft.data.truncation import fit
from nanoft.io.tables import markdown_table

Array = np.ndarray[Any, Any]
VERSION = 1  # of what the cache holds
NOT_IN_KEY = ("packing", "group_by_length", "pad_to_multiple_of")  # what Batches does with the samples
PERCENTILES = (50, 90, 99, 100)
MALFORMED = "malformed"
TOKENS, REJECTED, REPORT = "tokens.bin", "rejected.jsonl", "report.json"
NEAR = 0.8  # share of the 5-grams that two prompts have in common, unless data.near_duplicates says another
WHOLE, PROMPT = "whole.sig", "prompt.sig"  # MinHash signatures, while building


@dataclass(frozen=True)
class Corpus:
    """What a run learns from and what it is measured on."""

    training: TokenDataset
    validation: TokenDataset
    report: dict[str, Any]
    directory: Path  # in the cache
    files: list[Path]
    record_file: Array  # (records,) which of the files
    record_line: Array  # (records,)
    truncated: Array  # which samples were cut
    reading: Reading

    def conversations(self, samples: TokenDataset, limit: int) -> list[Conversation]:
        """The first `limit` conversations that samples came from, read again from their files."""
        records = list(dict.fromkeys(samples.records.tolist()))[:limit]
        found: dict[int, Conversation] = {}
        for number, file in enumerate(self.files):
            lines = {int(self.record_line[r]): r for r in records if self.record_file[r] == number}
            for item in read_file(file, self.reading, only=set(lines)) if lines else ():
                if isinstance(item, Conversation):
                    found[lines[item.line]] = item
        return [found[record] for record in records]

    def questions(self, samples: TokenDataset) -> Iterator[str]:
        """What each record that samples came from opens with, file by file, never all of them in memory."""
        for number, file in enumerate(self.files):
            records = np.unique(samples.records)
            lines = set(self.record_line[records[self.record_file[records] == number]].tolist())
            for item in read_file(file, self.reading, only=lines) if lines else ():
                if isinstance(item, Conversation):
                    yield item.question()

    def values(self, samples: TokenDataset, name: str) -> list[str]:
        """A field of the record that each sample came from, as its file has it; `(none)` where it is missing.

        Raises:
            UserError: no record has the field.
        """
        found: dict[int, str] = {}
        fields: dict[str, None] = {}
        wanted = {(int(self.record_file[r]), int(self.record_line[r])): r for r in samples.records.tolist()}
        for number, file in enumerate(self.files):
            for line, record in read_raw(file, self.reading.delimiter):
                if (number, line) in wanted and isinstance(record, dict):
                    fields |= dict.fromkeys(record)
                    if record.get(name) is not None:
                        found[wanted[number, line]] = str(record[name])
        if not found:
            raise UserError(f"evaluation.by_field: {name}: no record has this field: there are {', '.join(fields)}")
        return [found.get(record, "(none)") for record in samples.records.tolist()]

    def whole(self, samples: TokenDataset) -> TokenDataset:
        """Those that were not cut: the prompts of the others are longer than anything that was trained on."""
        part: TokenDataset = samples[~np.isin(samples.chosen, self.truncated)]
        return part

    def place(self, record: int) -> str:
        """file:line of a record."""
        return f"{self.files[self.record_file[record]]}:{self.record_line[record]}"


def open_corpus(
    data: DataConfig, limit: int, seed: int, chat: ChatTokenizer, say: Callable[[str], None], bar: bool = False
) -> Corpus:
    """The samples of some files, from the cache if they are there.

    Args:
        limit: tokens that a sample may have (model.max_seq_length).
        say: told what is worth knowing.
        bar: show the progress of tokenizing.
    Raises:
        UserError: a file cannot be read, too much of it is malformed, or no sample is left.
    """
    parts = _parts(data)
    files = [file for part in parts for file in part]
    reading = reading_of(data)

    def build(aside: Path) -> None:
        _build(aside, DatasetBuilder(aside, data, limit, seed, chat, reading), parts, bar)

    entry = cached(_key(data, limit, seed, chat, files), build, say)
    arrays = {path.stem: np.load(path) for path in entry.glob("*.npy")}
    tokens = np.memmap(entry / TOKENS, dtype=np.int32, mode="r")
    training, validation = (
        TokenDataset(tokens, arrays["starts"], arrays["records"], arrays[name]) for name in ("training", "validation")
    )
    report = json.loads((entry / REPORT).read_text(encoding="utf-8"))
    where = {name: arrays[name] for name in ("record_file", "record_line", "truncated")}
    return Corpus(training, validation, report, entry, files, reading=reading, **where)


def data_hash(data: DataConfig) -> str:
    """One hash of the contents of all data files."""
    return hash_unless_known([file for part in _parts(data) for file in part])


def _parts(data: DataConfig) -> list[list[Path]]:
    """The files of each part of train_file; behind them, those of validation_file."""
    parts = find_files(data.train_file)
    if data.weights and len(data.weights) != len(parts):
        raise UserError(f"data.weights: {len(data.weights)} weights for {len(parts)} files: give one for each")
    if data.validation_file is None:
        return parts
    return [*parts, [file for part in find_files(data.validation_file, "data.validation_file") for file in part]]


def _key(data: DataConfig, limit: int, seed: int, chat: ChatTokenizer, files: list[Path]) -> str:
    """Everything that the samples depend on."""
    settings = {name: value for name, value in dataclasses.asdict(data).items() if name not in NOT_IN_KEY}
    depends = [VERSION, tokenizers.__version__, settings, limit, seed, list(map(str, files)), chat.identity()]
    return json.dumps(depends, sort_keys=True, default=str) + hash_unless_known(files)


def reading_of(data: DataConfig) -> Reading:
    """The settings that say how files are read."""
    wanted = {data.split_stratify or data.label_field, data.split_group, data.split_time} - {None, "length"}
    fields = tuple(sorted(str(name) for name in wanted))
    return Reading(data.format, data.columns, data.delimiter, data.label_field, fields)


# ---- The pass over the files


class DatasetBuilder:
    """Reads, checks, renders, encodes and writes; holds what must be known of each record and each sample."""

    def __init__(self, aside: Path, data: DataConfig, limit: int, seed: int, chat: ChatTokenizer, reading: Reading):
        self.data, self.limit, self.seed, self.chat, self.reading = data, limit, seed, chat, reading
        self.removed: Counter[str] = Counter()
        self.first_bad: list[str] = []
        self.shapes: list[dict[str, Any]] = []
        self.read = self.cut_off = self.target_tokens_lost = 0
        self.seen: set[int] = set()  # fingerprints, the lowest bit says of which side
        self.in_flight: dict[int, Conversation] = {}  # rendered, not yet encoded
        self.lost: dict[int, tuple[str, str]] = {}  # records that lost a sample, and why
        self.samples_lost = self.near_leaks = 0
        # of each record
        self.file, self.line, self.part = array("l"), array("q"), array("l")
        self.question, self.prompt, self.asked = array("Q"), array("Q"), array("Q")
        self.group, self.time = array("Q"), array("d")
        self.stratum: list[Any] = []
        # of each sample
        self.starts, self.record, self.truncated = array("q", [0]), array("l"), array("q")
        self.targets = array("l")
        self.tokens = open(aside / TOKENS, "wb", buffering=1 << 20)  # noqa: SIM115 (see `close`)
        self.rejected = open(aside / REJECTED, "w", encoding="utf-8")  # noqa: SIM115
        self.systems: set[int] = set()  # ranks of system texts that were seen
        wanted = {WHOLE: data.near_duplicates, PROMPT: data.near_leaks != "ignore" and _holds_out(data)}
        self.signatures = {name: open(aside / name, "wb") for name in wanted if wanted[name]}  # noqa: SIM115

    def run(self, parts: list[list[Path]], bar: bool) -> None:
        """All files, one after another."""
        self.validation_part = len(parts) - 1 if self.data.validation_file is not None else -1
        size = sum(os.path.getsize(file) for files in parts for file in files)
        shown: dict[str, Any] = {"unit": "B", "unit_scale": True, "desc": "tokenizing", "leave": False, "delay": 1.0}
        with tqdm(total=size, disable=not bar, **shown) as self.bar:
            for sample in self.chat.encode(self._render(parts)):
                self._take(sample)
        for stream in (self.tokens, *self.signatures.values()):
            stream.flush()

    def reject(self, kind: str, reason: str, file: str, line: int) -> None:
        """Count a record that is not used, and write it down."""
        self.removed[kind] += 1
        entry = {"kind": kind, "reason": reason, "file": file, "line": line}
        self.rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if kind == MALFORMED and len(self.first_bad) < 5:
            self.first_bad.append(f"{file}:{line}: {reason}")

    def _render(self, parts: list[list[Path]]) -> Iterator[Rendered]:
        files = [(part, file) for part, paths in enumerate(parts) for file in paths]
        for number, (part, file) in enumerate(files):
            for conversation in self._read(file, part == self.validation_part):
                record = self._add(conversation, number, part)
                if conversation.text is not None:
                    pieces = [self.chat.text_sample(conversation.text, record)]
                else:
                    pieces = self._render_samples(conversation, record)
                if pieces:
                    self.in_flight[record] = conversation
                    yield from pieces

    def _read(self, file: Path, is_validation: bool) -> Iterator[Conversation]:
        """The records of a file that are worth rendering."""
        kept, done = 0, 0

        def tick(position: int) -> None:
            nonlocal done
            self.bar.update(position - done)
            done = position

        for item in read_file(file, self.reading, tick):
            if isinstance(item, str):
                self.shapes.append({"file": str(file), "shape": item, "records": 0})
                continue
            self.read += 1
            self.shapes[-1]["records"] += 1
            if isinstance(item, Rejected):
                kind = UNDESIRABLE if item.reason == UNDESIRABLE else MALFORMED
                self.reject(kind, item.reason, item.file, item.line)
            elif unwanted := self._unwanted(item, is_validation):
                self.reject(*unwanted, item.file, item.line)
            else:
                kept += 1
                yield item
            if kept == self.data.max_samples:
                return

    def _unwanted(self, item: Conversation, is_validation: bool) -> tuple[str, str] | None:
        """(kind, reason) why a good record is left out before it is rendered."""
        characters, longest = item.characters(), self.data.max_characters or math.inf
        if characters < self.data.min_characters:
            return "too short", f"{characters} characters, fewer than data.min_characters={self.data.min_characters}"
        if characters > longest:
            return "too many characters", f"{characters} characters, more than data.max_characters={longest}"
        if self.data.deduplicate:
            mark = filters.fingerprint(item) << 1 | is_validation
            if mark in self.seen:
                return "duplicate", "says exactly what an earlier record says"
            self.seen.add(mark)
        return None

    def _add(self, item: Conversation, file: int, part: int) -> int:
        """Note what the split needs to know of a record; returns its number."""
        data, question, prompt = self.data, item.question(), item.prompt()
        self.file.append(file)
        self.line.append(item.line)
        self.part.append(part)
        self.question.append(filters.rank(question, self.seed))
        self.prompt.append(filters.rank(prompt, self.seed))
        self.asked.append(filters.rank(" ".join(prompt.lower().split()), self.seed))
        if data.split_group:
            self.group.append(filters.rank(item.fields[data.split_group], self.seed))
        if data.split_time:
            self.time.append(_time(item, data.split_time))
        if strata := data.split_stratify or data.label_field:
            value = _length_bin(item.characters()) if strata == "length" else item.fields[strata]
            self.stratum.append(value)
        if self.signatures:
            self._sign(item)
        self.cut_off += filters.looks_cut_off(item)
        return len(self.file) - 1

    def _sign(self, item: Conversation) -> None:
        """Signatures of what is said; a system text that an earlier record has, too, is no part of it."""
        own = item
        if item.messages and item.messages[0]["role"] == "system":
            system = filters.rank(item.messages[0]["content"], self.seed)
            if system in self.systems:
                own = dataclasses.replace(item, messages=item.messages[1:])
            self.systems.add(system)
        for name, stream in self.signatures.items():
            said = own.prompt() if name == PROMPT else own.said()
            stream.write(filters.signature(said).tobytes())

    def _render_samples(self, conversation: Conversation, record: int) -> list[Rendered]:
        try:
            pieces = self.chat.render_samples(conversation.messages, record, conversation.tools, self.data.train_on)
        except TemplateRefusal as reason:
            self.reject(MALFORMED, str(reason), conversation.file, conversation.line)
            return []
        if not any(piece.spans for piece in pieces):
            self.reject(MALFORMED, "no message of it is to be learned", conversation.file, conversation.line)
            return []
        return pieces

    def _take(self, sample: Sample) -> None:
        """Write an encoded sample, if it fits."""
        while (oldest := next(iter(self.in_flight))) < sample.record:
            del self.in_flight[oldest]
        conversation = self.in_flight[sample.record]
        fitted = self._fit(sample, conversation) if sample.is_target.any() else None
        self.target_tokens_lost += int(sample.is_target.sum()) - (int(fitted.is_target.sum()) if fitted else 0)
        if not sample.is_target.any():
            self._lose(sample, MALFORMED, "the sequence has no target token: nothing could be learned from it")
        elif fitted is None:
            reason = f"{len(sample.ids)} tokens, more than model.max_seq_length={self.limit}"
            self._lose(sample, "too long", f"{reason} (data.truncation={self.data.truncation})")
        elif len(fitted.ids) < self.data.min_tokens:
            reason = f"{len(fitted.ids)} tokens, fewer than data.min_tokens={self.data.min_tokens}"
            self._lose(sample, "too few tokens", reason)
        else:
            if len(fitted.ids) < len(sample.ids):
                self.truncated.append(len(self.record))
            self.tokens.write(encode_targets(fitted).tobytes())
            self.starts.append(self.starts[-1] + len(fitted.ids))
            self.record.append(sample.record)
            self.targets.append(int(fitted.is_target.sum()))

    def _lose(self, sample: Sample, kind: str, reason: str) -> None:
        """One sample less; its record is left out if it has no other."""
        self.samples_lost += 1
        self.lost.setdefault(sample.record, (kind, reason))

    def settle(self, files: list[str]) -> None:
        """Count the records of which no sample is left."""
        used = set(self.record) if self.lost else set()
        for record in sorted(self.lost.keys() - used):
            self.reject(*self.lost[record], files[self.file[record]], self.line[record])

    def _fit(self, sample: Sample, conversation: Conversation) -> Sample | None:
        try:
            return fit(sample, conversation, self.chat, self.limit, self.data.truncation, self.data.train_on)
        except TemplateRefusal:
            return None  # the template wants what was cut

    def close(self) -> None:
        self.tokens.close()
        self.rejected.close()
        for stream in self.signatures.values():
            stream.close()

    def check_malformed(self) -> None:
        """Stop if so many records are malformed that the data is not what its owner believes."""
        bad = self.removed[MALFORMED]
        if bad > self.data.max_bad_records * self.read:
            raise UserError(
                f"{self.first_bad[0]} ({bad:,} of {self.read:,} records are malformed, more than "
                f"data.max_bad_records={self.data.max_bad_records} allows: repair them"
                + "".join(f"; {reason}" for reason in self.first_bad[1:])
                + ")"
            )


def _time(item: Conversation, name: str) -> float:
    """A number or an ISO 8601 date as seconds; later is larger."""
    value = item.fields[name]
    try:
        with contextlib.suppress(ValueError):
            return float(value)
        date = datetime.fromisoformat(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise UserError(
            f"{item.file}:{item.line}: {name}: {value!r:.40} is neither a number nor a date like 2024-02-29 "
            "(data.split_time)"
        ) from None


def _length_bin(characters: int) -> int:
    """Powers of two: 512 to 1023 characters is bin 512."""
    return 1 << (max(characters, 1).bit_length() - 1)


# ---- Who is on which side


def _build(aside: Path, passed: DatasetBuilder, parts: list[list[Path]], bar: bool) -> None:
    """Everything that the cache keeps of a corpus, in a directory of its own."""
    with contextlib.closing(passed):
        passed.run(parts, bar)
        passed.settle([str(file) for part in parts for file in part])
        passed.check_malformed()
        starts, record = np.array(passed.starts, np.int64), np.array(passed.record, np.int64)
        if not len(record):
            raise UserError(_none_left(passed))
        is_training, is_validation = _sides(aside, passed, record, [str(file) for part in parts for file in part])
    training = _weighted(np.flatnonzero(is_training[record]), record, passed)
    if not len(training):
        leaks = f" ({passed.removed['leak']} of them ask what validation asks)" if passed.removed["leak"] else ""
        raise UserError(f"data: no record is left for training{leaks}: see the settings of data.validation_...")
    validation = np.flatnonzero(is_validation[record])
    for name, values in {
        "starts": starts,
        "records": record,
        "truncated": np.array(passed.truncated, np.int64),
        "training": training,
        "validation": validation,
        "record_file": np.array(passed.file, np.int32),
        "record_line": np.array(passed.line, np.int64),
    }.items():
        np.save(aside / f"{name}.npy", values)
    for path in aside.glob("*.sig"):
        path.unlink()
    tokens = np.memmap(aside / TOKENS, dtype=np.int32, mode="r")
    sides = {name: TokenDataset(tokens, starts, record, chosen) for name, chosen in
             (("training", training), ("validation", validation))}  # fmt: skip
    report = _report(passed, sides)
    (aside / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _none_left(passed: DatasetBuilder) -> str:
    """Why there is nothing to train on, and what to change."""
    reasons = ", ".join(f"{count} {kind}" for kind, count in passed.removed.most_common())
    fix = ""
    if passed.removed["too long"]:
        better = "" if passed.data.truncation == "prompt" else ", or set data.truncation=prompt"
        fix = f": none fits model.max_seq_length={passed.limit}: raise it{better}"
    return f"data: none of {passed.read} records is left ({reasons or 'there were none'}){fix}"


def _sides(aside: Path, passed: DatasetBuilder, record: Array, files: list[str]) -> tuple[Array, Array]:
    """(is_training, is_validation) of each record: near duplicates removed, split, leaks removed."""
    data, asked = passed.data, np.array(passed.asked, np.uint64)
    used = np.zeros(len(asked), dtype=np.bool_)
    used[record] = True
    is_validation = np.array(passed.part) == passed.validation_part
    pool = used & ~is_validation

    def remove(which: Array, kind: str, reason: str) -> None:
        for number in np.flatnonzero(which).tolist():
            passed.reject(kind, reason, files[passed.file[number]], passed.line[number])

    if data.near_duplicates:
        whole = np.memmap(aside / WHOLE, dtype=np.uint32, mode="r").reshape(-1, filters.SIGNATURE)
        alike = filters.near_duplicates(whole, data.near_duplicates, pool)
        remove(alike, "near duplicate", f"shares {data.near_duplicates:.0%} of its 5-grams with an earlier record")
        pool &= ~alike
    if data.validation_file is None:
        is_validation = np.zeros_like(pool)
        is_validation[pool] = _hold_out(passed, pool, data)
    else:
        is_validation &= used
    is_training = pool & ~is_validation
    leaks = is_training & np.isin(asked, asked[is_validation])
    if PROMPT in passed.signatures:
        read, threshold = functools.partial(_read_signatures, aside / PROMPT), data.near_duplicates or NEAR
        near = filters.resembling(read, threshold, is_training & ~leaks, is_validation)
        passed.near_leaks = int(near.sum())
        if data.near_leaks == "remove":
            leaks |= near
    remove(leaks, "leak", "asks what a validation record asks")
    return is_training & ~leaks, is_validation


def _hold_out(passed: DatasetBuilder, pool: Array, data: DataConfig) -> Array:
    """Which records of the pool are held out."""
    count = int(pool.sum())
    size = data.validation_size or round(data.validation_split * count)
    if data.validation_size is None and data.validation_split and count > 1:
        size = max(size, 1)  # asked for some, and too few for a share
    if size >= count > 1:
        raise UserError(f"data.validation_size: {size}: there are {count} records: leave some for training")
    # Equal questions stay together; where a few questions are asked of many documents, equal prompts do.
    question, prompt = np.array(passed.question, np.uint64)[pool], np.array(passed.prompt, np.uint64)[pool]
    ranks = question if 2 * len(np.unique(question)) >= count else prompt
    if data.split_time:
        return filters.hold_out_newest(np.array(passed.time)[pool], ranks, size)
    strata = np.zeros(len(pool), np.int64)
    if passed.stratum:
        values = {value: number for number, value in enumerate(sorted(set(passed.stratum), key=str))}
        strata = np.array([values[value] for value in passed.stratum])
    if data.split_group:
        ranks = np.array(passed.group, np.uint64)[pool]
    return filters.hold_out(ranks, strata[pool], size)


def _holds_out(data: DataConfig) -> bool:
    return bool(data.validation_file or data.validation_split or data.validation_size)


def _read_signatures(path: Path, start: int, stop: int) -> Array:
    width = filters.SIGNATURE
    return np.fromfile(path, np.uint32, (stop - start) * width, offset=4 * start * width).reshape(-1, width)


def _weighted(chosen: Array, record: Array, passed: DatasetBuilder) -> Array:
    """Each part's samples as often as its weight says: whole copies, and a random part of them for the rest."""
    weights = passed.data.weights
    if not weights:
        return chosen
    part, rng = np.array(passed.part)[record[chosen]], np.random.default_rng([passed.seed, 1])
    copies = []
    for number, weight in enumerate(weights):
        own = chosen[part == number]
        rest = rng.permutation(own)[: round((weight % 1) * len(own))]
        copies += [own] * int(weight) + [np.sort(rest)]
    return np.concatenate(copies)


# ---- The report


def _report(passed: DatasetBuilder, sides: dict[str, TokenDataset]) -> dict[str, Any]:
    """What became of the data, as report.json keeps it."""
    return {
        "files": passed.shapes,
        "read": passed.read,
        "removed": dict(passed.removed.most_common()),
        "first_malformed": passed.first_bad,
        "truncated": len(passed.truncated),
        "truncation": passed.data.truncation,
        "max_seq_length": passed.limit,
        "samples_lost": passed.samples_lost,
        "target_tokens_lost": passed.target_tokens_lost,
        "cut_off_replies": passed.cut_off,
        "near_leaks": passed.near_leaks,
        "near_leaks_are": "removed" if passed.data.near_leaks == "remove" else "kept",
        **{name: _describe_side(samples, passed) for name, samples in sides.items()},
    }


def _describe_side(samples: TokenDataset, passed: DatasetBuilder) -> dict[str, Any]:
    lengths = samples.lengths
    described: dict[str, Any] = {
        "records": len(np.unique(samples.records)),
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "target_tokens": int(np.array(passed.targets, np.int64)[samples.chosen].sum()),
        "length": {f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in PERCENTILES}
        if len(samples)
        else {},
    }
    if passed.stratum:
        strata = Counter(str(passed.stratum[record]) for record in np.unique(samples.records).tolist())
        described["strata"] = dict(sorted(strata.items()))
    return described


def describe_data(report: dict[str, Any]) -> list[str]:
    """The report as lines for the terminal."""
    lines = [f"data      read {f['records']:,} records as {f['shape']} from {f['file']}" for f in report["files"]]
    lines += [f"warning: {reason}: left out" for reason in report["first_malformed"]]
    if report["cut_off_replies"]:
        lines.append(f"warning: {report['cut_off_replies']:,} records end in a reply that stops in mid-sentence")
    if report["near_leaks"] and report["near_leaks_are"] == "kept":
        said = "training records ask nearly what a validation record asks"
        lines.append(f"warning: {report['near_leaks']:,} {said}: data.near_leaks=remove leaves them out")
    rows = [["records read", f"{report['read']:,}", ""]]
    rows += [[f"left out: {kind}", f"{count:,}", ""] for kind, count in report["removed"].items()]
    sides = [report["training"], report["validation"]]
    for name in ("records", "samples", "tokens", "target_tokens"):
        rows.append([name.replace("_", " "), *(f"{side[name]:,}" for side in sides)])
    for name in (f"p{p}" for p in PERCENTILES):
        label = "longest" if name == "p100" else f"length, {name[1:]} %"
        rows.append([label, *(f"{side['length'][name]:,}" if side["length"] else "-" for side in sides)])
    for value in dict.fromkeys(value for side in sides for value in side.get("strata", {})):
        shares = [f"{side['strata'].get(value, 0) / max(side['records'], 1):.1%}" for side in sides]
        rows.append([f"share of {value}", *shares])
    if "steps" in report:  # known to a run only
        rows.append(["steps an epoch", f"{report['steps_per_epoch']:,}", ""])
        rows.append(["steps, epochs", f"{report['steps']:,}, {report['epochs']:.3g}", ""])
    if report["truncated"]:
        rows.append([f"truncated ({report['truncation']})", f"{report['truncated']:,}", ""])
    if report["samples_lost"]:
        rows.append(["samples lost to length", f"{report['samples_lost']:,}", ""])
    if report["target_tokens_lost"]:
        rows.append(["target tokens lost to length", f"{report['target_tokens_lost']:,}", ""])
    return [*lines, markdown_table(["", "training", "validation"], rows)]
