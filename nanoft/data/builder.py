"""One pass over the data files: filter, render, tokenize and split the records, and write them to the cache.

read -> check -> seen before? -> render -> encode -> fits? -> token ids on disk      one pass, streamed
near duplicates -> split -> leaks -> weights                                         on a few numbers per record
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nanoft import UserError
from nanoft.batches import Array, Sample, TokenDataset, encode_targets
from nanoft.config import DataConfig
from nanoft.data import filters
from nanoft.data.chat_tokenizer import ChatTokenizer, Rendered, TemplateRefusal
from nanoft.data.formats import CONTROL, DETECT_FROM, MALFORMED, Conversation, Learns, Message, Rejected, read_file
from nanoft.data.preferences import EQUAL, UNLABELED
from nanoft.data.tokenizer_files import MAX_ID
from nanoft.data.truncation import chunk, fit
from nanoft.io.bars import Bar

PERCENTILES = (50, 90, 99, 100)
REFUSED = "refused by the chat template"
TOKENS, REJECTED, REPORT = "tokens.bin", "rejected.jsonl", "report.json"
NEAR_EQUAL = 0.9  # share of common tokens from which the answers of a pair count as nearly equal
NEAR = 0.8  # Jaccard similarity of near-equal prompts, unless data.near_duplicates is set
FULL_TEXT, PROMPT = "full_text.sig", "prompt.sig"  # MinHash signatures, while building
Version = tuple[list[Message], float]  # the messages of a sample, and its label


class DatasetBuilder:
    """Writes a data set to a directory; only a few numbers per record and per sample stay in memory."""

    def __init__(
        self, directory: Path, data: DataConfig, tokenizer: ChatTokenizer, max_length: int, seed: int,
        learns: Learns = "turns",
    ):  # fmt: skip
        self.directory, self.data, self.tokenizer, self.learns = directory, data, tokenizer, learns
        self.max_length, self.seed = max_length, seed
        self.removed: Counter[str] = Counter()
        self.first_malformed: list[str] = []
        self.notes: dict[str, tuple[int, str]] = {}  # note -> number of records, location of the first
        self.shapes: list[dict[str, Any]] = []
        self.read = self.target_tokens_lost = self.samples_lost = self.near_leaks = 0
        self.chunked_texts = self.chunks = self.shared_prompts = 0
        self.held_out = ""  # how many records, and by which criterion
        self.seen: set[int] = set()  # content hashes; the lowest bit is the side of the split
        self.in_flight: dict[int, tuple[Conversation, Iterator[Version]]] = {}  # rendered but not yet encoded
        self.unit: list[tuple[Sample, list[Message]]] = []  # the first answer of a pair, until the second is encoded
        self.near_equal = self.answers_cut = 0  # pairs with nearly equal answers; samples whose answer lost its end
        self.lost: dict[int, tuple[str, str]] = {}  # records that lost a sample -> kind, reason
        # per record; arrays of type Q hold keys of the split
        self.file, self.line, self.time = array("l"), array("q"), array("d")
        self.prompt, self.normalized_prompt, self.content, self.group = (array("Q") for _ in range(4))
        self.stratum: list[Any] = []
        # per sample
        self.starts, self.record, self.truncated, self.targets = array("q", [0]), array("l"), array("q"), array("l")
        self.labels = array("f")
        self.is_used = np.zeros(MAX_ID, np.bool_)  # which token ids occur

    def build(self, parts: list[list[Path]]) -> None:
        self.files = [(number, file) for number, files in enumerate(parts) for file in files]
        self.validation_part = len(parts) - 1 if self.data.validation_file is not None else -1
        with contextlib.ExitStack() as stack:
            self.tokens = stack.enter_context(open(self.directory / TOKENS, "wb", buffering=1 << 20))
            self.rejected = stack.enter_context(open(self.directory / REJECTED, "w", encoding="utf-8"))
            data, signed = self.data, [FULL_TEXT] if self.data.near_duplicates else []
            holds_out = data.validation_file or data.validation_split or data.validation_size
            signed += [PROMPT] if holds_out and data.near_leaks != "ignore" else []
            self.signatures = {name: stack.enter_context(open(self.directory / name, "wb")) for name in signed}
            size = sum(os.path.getsize(file) for _, file in self.files)
            stack.callback(gc.set_threshold, *gc.get_threshold())
            gc.set_threshold(100_000)  # records are freed without it
            with Bar(desc="tokenizing", total=size, unit="B") as self.bar:
                for sample in self.tokenizer.encode(self._render()):
                    self._add_sample(sample)
            for stream in (self.tokens, *self.signatures.values()):
                stream.flush()
            self._check_records()
            is_training, is_validation = self._split()
        self._write(is_training, is_validation)

    def _reject(self, kind: str, reason: str, file: str, line: int) -> None:
        self.removed[kind] += 1
        entry = {"kind": kind, "reason": reason, "file": file, "line": line}
        self.rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if kind in (MALFORMED, REFUSED) and len(self.first_malformed) < 5:
            self.first_malformed.append(f"{file}:{line}: {reason}")

    def _reject_record(self, record: int, kind: str, reason: str) -> None:
        self._reject(kind, reason, str(self.files[self.file[record]][1]), self.line[record])

    def _render(self) -> Iterator[Rendered]:
        for number, (part, file) in enumerate(self.files):
            for item in self._read(file, part == self.validation_part):
                record, bad = self._add_record(item, number), (MALFORMED, "none of its messages is a target")
                self._note(item, *item.notes)
                self._note_control_tokens(item)
                versions = self._versions(item)
                self.in_flight[record] = item, iter(versions) if self.learns != "turns" else itertools.cycle(versions)
                if item.text is not None:
                    yield self.tokenizer.text_sample(item.text, record, item.prompt_characters)
                    continue
                try:
                    given = item.tools, self.data.train_on, item.template_args
                    made = [self.tokenizer.render_samples(m, record, *given) for m, _ in versions]
                    if self.learns != "turns" and any(len(pieces) > 1 for pieces in made):
                        raise TemplateRefusal("the chat template rewrites the earlier turns of an answer")
                    if all(any(piece.spans for piece in pieces) for pieces in made):
                        self._note(item, *made[0][0].notes)
                        yield from itertools.chain(*made)
                        continue
                except TemplateRefusal as error:
                    bad = REFUSED, str(error)
                del self.in_flight[record]
                self._reject(*bad, item.file, item.line)
            self._check_control_tokens()

    def _versions(self, item: Conversation) -> list[Version]:
        """What becomes a sample, with its label: the best answer paired with each worse one, or every answer once."""
        if self.learns == "pairs":
            return [(messages, item.label) for worse in item.worse for messages in (item.messages, worse)]
        return [(item.messages, item.label), *((worse, 0.0) for worse in item.worse)]

    def _note_control_tokens(self, item: Conversation) -> None:
        shape = self.shapes[-1]
        if found := self.tokenizer.control.find(item.full_text()):
            self._note(item, "a control token of this tokenizer is encoded as text (data.control_tokens)")
            shape.setdefault("first_control_token", f"{item.file}:{item.line}: {found!r}")
            shape["control_tokens"] += 1
        if shape["records"] >= DETECT_FROM:
            self._check_control_tokens()

    def _check_control_tokens(self) -> None:
        """Raise a UserError if most texts of a file without chats have control tokens: the user has to choose."""
        shape, count = self.shapes[-1], self.shapes[-1]["control_tokens"]
        is_chat = shape["shape"].partition(":")[0] in ("messages", "sharegpt")
        if self.data.control_tokens is None and not is_chat and 2 * count > shape["records"]:
            what = f"is a control token of this tokenizer, as in {count:,} of {shape['records']:,} records"
            fix = "set data.control_tokens=parse to read it as the token, or data.control_tokens=text as characters"
            raise UserError(f"{shape['first_control_token']} {what}: {fix}")

    def _note(self, item: Conversation, *notes: str) -> None:
        for note in notes:
            count, first = self.notes.get(note, (0, f"{item.file}:{item.line}"))
            self.notes[note] = count + 1, first

    def _read(self, file: Path, is_validation: bool) -> Iterator[Conversation]:
        kept, start, images = 0, self.bar.n, self.tokenizer.control.images

        def advance(position: int) -> None:
            self.bar.update(start + position - self.bar.n)

        for item in read_file(file, self.data, advance, learns=self.learns):
            if isinstance(item, str):
                self.shapes.append({"file": str(file), "shape": item, "records": 0, "control_tokens": 0})
                continue
            self.read += 1
            self.shapes[-1]["records"] += 1
            if isinstance(item, Rejected):
                self._reject(item.kind, item.reason, item.file, item.line)
            elif images and (found := images.search(item.full_text())):
                self._reject(MALFORMED, f"{found[0]} stands for an image: only text is supported", item.file, item.line)
            elif unwanted := self._unwanted(item, is_validation):
                self._reject(*unwanted, item.file, item.line)
            else:
                kept += 1
                yield item
            if kept == self.data.max_samples:
                return

    def _unwanted(self, item: Conversation, is_validation: bool) -> tuple[str, str] | None:
        """(kind, reason) why a valid record is dropped; None if it is kept."""
        count, shortest, longest = item.characters(), self.data.min_characters, self.data.max_characters
        if count < shortest:
            return "too short", f"{count} characters, fewer than data.min_characters={shortest}"
        if longest and count > longest:
            return "too many characters", f"{count} characters, more than data.max_characters={longest}"
        if self.data.deduplicate:
            mark = item.content_hash << 1 | is_validation
            if mark in self.seen:
                return "duplicate", "equals an earlier record"
            self.seen.add(mark)
        return None

    def _add_record(self, item: Conversation, file: int) -> int:
        """Store what the split depends on; return the record's number."""
        data, prompt = self.data, item.prompt()
        key = functools.partial(filters.split_key, seed=self.seed)
        self.file.append(file)
        self.line.append(item.line)
        self.prompt.append(key(prompt))
        self.normalized_prompt.append(key(filters.normalized(prompt)))
        self.content.append(key(str(item.content_hash)))
        if data.split_group:
            self.group.append(key(item.fields[data.split_group]))
        if data.split_time:
            self.time.append(_time(item, data.split_time))
        if strata := data.stratify_field:
            length_bin = 1 << (max(item.characters(), 1).bit_length() - 1)  # 512 to 1023 characters: 512
            self.stratum.append(length_bin if strata == "length" else item.fields[strata])
        if filters.looks_truncated(item):
            self._note(item, "the last answer stops in mid-sentence")
        if CONTROL.search(text := item.full_text()):
            self._note(item, "control characters are kept")
        if filters.is_garbled(text):
            self._note(item, "a text looks like UTF-8 decoded with another encoding (Ã©, â€™), or has U+FFFD")
        if item.label and any(map(filters.repeats_itself, item.answers())):  # rejected answers may well repeat
            self._note(item, "an answer repeats one phrase over and over")
        for name, stream in self.signatures.items():
            compared = item.prompt(system=False) if name == PROMPT else item.full_text(system=False)
            stream.write(filters.minhash(compared).tobytes())
        return len(self.file) - 1

    def _add_sample(self, sample: Sample) -> None:
        while (oldest := next(iter(self.in_flight))) < sample.record:
            del self.in_flight[oldest]
        (conversation, versions), data = self.in_flight[sample.record], self.data
        is_plain = conversation.text is not None and not conversation.prompt_characters
        if is_plain and data.chunk and len(sample.ids) > self.max_length:
            pieces = chunk(sample, self.max_length, self.tokenizer.bos_id)
            self.chunked_texts, self.chunks = self.chunked_texts + 1, self.chunks + len(pieces)
            for piece in pieces:
                self._add_unit([piece], [[]], conversation)
            return
        messages, label = next(versions)
        self.unit.append((sample if label == sample.label else replace(sample, label=label), messages))
        if len(self.unit) == (2 if self.learns == "pairs" else 1):
            samples, contents = zip(*self.unit, strict=True)
            self.unit = []
            self._add_unit([*samples], [*contents], conversation)

    def _add_unit(self, samples: list[Sample], versions: list[list[Message]], conversation: Conversation) -> None:
        """Write the samples of a unit, truncated if necessary, or record why they are lost."""
        data, targets = self.data, [int(np.count_nonzero(sample.is_target)) for sample in samples]
        fitted: list[Sample] | None = None
        if all(targets) and not _are_equal(samples):
            with contextlib.suppress(TemplateRefusal):  # the template needs what was removed
                limits = self.tokenizer, self.max_length, data.truncation, data.train_on
                fitted = fit(samples, versions, conversation, *limits)
        if fitted and _are_equal(fitted):
            fitted = None  # truncated before they differ
        kept = [int(np.count_nonzero(sample.is_target)) for sample in fitted or []]
        self.target_tokens_lost += sum(targets) - sum(kept)
        shortest = min((len(sample.ids) for sample in fitted or []), default=0)
        if not all(targets):
            lost = MALFORMED, "the sequence has no target tokens"
        elif _are_equal(samples):
            lost = EQUAL, "both answers have the same tokens"
        elif not fitted:
            reason = f"{max(len(sample.ids) for sample in samples)} tokens, more than"
            lost = "too long", f"{reason} model.max_seq_length={self.max_length} (data.truncation={data.truncation})"
        elif shortest < data.min_tokens:
            lost = "too few tokens", f"{shortest} tokens, fewer than data.min_tokens={data.min_tokens}"
        elif min(kept) < data.min_target_tokens:
            what = f"fewer than data.min_target_tokens={data.min_target_tokens}"
            lost = "too few target tokens", f"{min(kept)} target tokens, {what}"
            if samples[0].record not in self.lost:
                self._note(conversation, f"a sample has {what} and is skipped")
        else:
            self.near_equal += len(fitted) == 2 and filters.overlap(*fitted) >= NEAR_EQUAL
            for sample, whole, count in zip(fitted, samples, kept, strict=True):
                if sample is not whole:
                    if len(sample.ids) < len(whole.ids):
                        self.truncated.append(len(self.record))
                    self.answers_cut += bool(sample.ids[sample.is_target][-1] != whole.ids[whole.is_target][-1])
                self.tokens.write(encode_targets(sample).tobytes())
                self.is_used[sample.ids.astype(np.int64)] = True  # int32 indices take ten times as long
                self.starts.append(self.starts[-1] + len(sample.ids))
                self.record.append(sample.record)
                self.targets.append(count)
                self.labels.append(sample.label)
            return
        self.samples_lost += len(samples)
        self.lost.setdefault(samples[0].record, lost)

    def _check_records(self) -> None:
        """Reject records without a remaining sample; raise if too many are malformed, or if no record is left."""
        for record in sorted(self.lost.keys() - set(self.record)):
            self._reject_record(record, *self.lost[record])
        bad, refused, limit = self.removed[MALFORMED], self.removed[REFUSED], self.data.max_bad_records
        if bad + refused > limit * self.read:
            first, *others = self.first_malformed
            what, fix = f"{bad:,} of {self.read:,} records are malformed", ": repair them"
            if refused > bad:
                what, fix = f"the chat template refuses {refused:,} of {self.read:,} records", ""
            counted = f"{what}, more than data.max_bad_records={limit} allows{fix}"
            raise UserError("; ".join([f"{first} ({counted}", *others]) + ")")
        if not self.record:
            reasons = ", ".join(f"{count} {kind}" for kind, count in self.removed.most_common()) or "there were none"
            fix = f": none fits model.max_seq_length={self.max_length}: raise it" if self.removed["too long"] else ""
            fix += ", or set data.truncation=prompt" if fix and self.data.truncation != "prompt" else ""
            fix += ": set data.label_field to the label, or training.objective=sft" * bool(self.removed[UNLABELED])
            raise UserError(f"data: none of {self.read} records is left ({reasons}){fix}")

    def _split(self) -> tuple[Array, Array]:
        """(is_training, is_validation) of each record: near duplicates removed, split, leaks removed."""
        data, prompts = self.data, np.array(self.normalized_prompt, np.uint64)
        used = np.isin(np.arange(len(prompts)), self.record)  # records with a sample
        is_validation = used & (self._parts() == self.validation_part)
        pool = used & ~is_validation
        signed = {name: np.memmap(self.directory / name, np.uint32, "r") for name in self.signatures}
        signatures = {name: values.reshape(-1, filters.COMPONENTS) for name, values in signed.items()}
        if data.near_duplicates:
            near = filters.near_matches(signatures[FULL_TEXT], data.near_duplicates, pool)
            reason = f"shares {data.near_duplicates:.0%} of its 5-grams with an earlier record"
            self._remove(near, "near duplicate", reason)
            pool &= ~near
        count, is_own = int(pool.sum()), data.validation_file is None
        size = self._held_out_size(count) if is_own else int(is_validation.sum())
        # If a prompt is too frequent to be held out or to count as a leak, its records compare by prompt and answer.
        is_frequent = filters.is_frequent(prompts, pool, size if is_own else min(size, count / 2))
        content = np.array(self.content, np.uint64)
        if is_own:
            is_validation[pool] = self._hold_out(pool, np.where(is_frequent, content, self.prompt)[pool], size)
        is_training = pool & ~is_validation
        shared, leaks = is_training & np.isin(prompts, prompts[is_validation]), np.zeros_like(pool)
        if data.leaks == "remove":
            leaks = shared & (~is_frequent | np.isin(content, content[is_validation]))
        if data.leaks != "ignore":
            self.shared_prompts = int((shared & ~leaks).sum())
        if PROMPT in signatures:
            threshold, remaining = data.near_duplicates or NEAR, is_training & ~shared
            near = filters.near_matches(signatures[PROMPT], threshold, remaining, is_validation & ~is_frequent)
            if data.near_leaks == "remove":
                leaks |= near
            else:
                self.near_leaks = int(near.sum())
        self._remove(leaks, "leak", "its prompt equals, or nearly equals, that of a validation record")
        if is_own and size:
            how = "equal prompts together"
            if is_frequent[pool].any():
                how += f", except prompts that more than {size:,} records have"
            how = f"the newest by {data.split_time}" if data.split_time else how
            how = f"by {data.split_group}" if data.split_group else how
            self.held_out = f"held out {is_validation.sum():,} of {count:,} records for validation: {how}"
        return is_training & ~leaks, is_validation

    def _parts(self) -> Array:  # (records,)
        return np.array([part for part, _ in self.files])[self.file]

    def _remove(self, which: Array, kind: str, reason: str) -> None:
        for record in np.flatnonzero(which).tolist():
            self._reject_record(record, kind, reason)

    def _held_out_size(self, count: int) -> int:
        at_least = int(self.data.validation_split > 0 and count > 1)
        size = self.data.validation_size or max(round(self.data.validation_split * count), at_least)
        if size >= count > 1:
            raise UserError(f"data.validation_size: {size} of only {count} records: leave some for training")
        return size

    def _hold_out(self, pool: Array, keys: Array, size: int) -> Array:
        """Which records of the pool to hold out; those with equal keys stay together."""
        data, strata = self.data, np.zeros(len(pool), np.int64)
        if data.split_time:  # the keys are places in time, the newest first
            keys = np.argsort(np.lexsort((keys, -np.array(self.time)[pool])))
        elif self.stratum:
            values = {value: number for number, value in enumerate(sorted(set(self.stratum), key=str))}
            strata = np.array([values[value] for value in self.stratum])
        if data.split_group:
            keys = np.array(self.group, np.uint64)[pool]
        return filters.hold_out(keys, strata[pool], size)

    def _write(self, is_training: Array, is_validation: Array) -> None:
        record = np.array(self.record, np.int64)
        training, rng = np.flatnonzero(is_training[record]), np.random.default_rng([self.seed, 1])
        part, size = self._parts()[record[training]], 2 if self.learns == "pairs" else 1
        copies: list[Array] = []
        for number, weight in enumerate(self.data.weights):  # whole copies, and a random subset for the fraction
            own = training[part == number].reshape(-1, size)  # whole units
            rest = np.sort(rng.permutation(len(own))[: round((weight % 1) * len(own))])
            copies += [own.ravel()] * int(weight) + [own[rest].ravel()]
        training = np.concatenate(copies) if copies else training
        arrays: dict[str, Array] = {
            "starts": np.array(self.starts, np.int64),
            "records": record,
            "labels": np.array(self.labels, np.float32),
            "truncated": np.array(self.truncated, np.int64),
            "training": training,
            "validation": np.flatnonzero(is_validation[record]),
            "record_file": np.array(self.file, np.int32),
            "record_line": np.array(self.line, np.int64),
            "used_ids": np.flatnonzero(self.is_used),
        }
        if not len(arrays["training"]):
            leaks = f" ({self.removed['leak']} of them are leaks)" if self.removed["leak"] else ""
            fix = "set data.leaks=warn to keep them" if leaks else "see the settings of data.validation_..."
            raise UserError(f"data: no record is left for training{leaks}: {fix}")
        for name, values in arrays.items():
            np.save(self.directory / f"{name}.npy", values)
        for path in self.directory.glob("*.sig"):
            path.unlink()
        tokens = np.memmap(self.directory / TOKENS, dtype=np.int32, mode="r")
        shared = tokens, arrays["starts"], record
        names = ("training", "validation")
        sides = {name: TokenDataset(*shared, arrays[name], arrays["labels"], size) for name in names}
        counted = ("read", "first_malformed", "samples_lost", "target_tokens_lost", "held_out", "shared_prompts")
        report = {
            "files": self.shapes,
            "removed": dict(self.removed.most_common()),
            "truncated": len(self.truncated),
            "truncation": self.data.truncation,
            "max_seq_length": self.max_length,
            **{name: getattr(self, name) for name in (*counted, "chunked_texts", "chunks", "near_leaks")},
            "answers_cut": self.answers_cut,
            **({"near_equal": self.near_equal} if self.learns == "pairs" else {}),
            "notes": [[note, count, first] for note, (count, first) in self.notes.items()],
            "leaks": self.data.leaks,
            **{name: self._describe(samples) for name, samples in sides.items()},
        }
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (self.directory / REPORT).write_text(text + "\n", encoding="utf-8")

    def _describe(self, samples: TokenDataset) -> dict[str, Any]:
        lengths, records = samples.lengths, np.unique(samples.records)
        percentiles = PERCENTILES if len(samples) else ()
        described: dict[str, Any] = {
            "records": len(records),
            "samples": len(samples),
            "tokens": int(lengths.sum()),
            "target_tokens": int(np.array(self.targets, np.int64)[samples.chosen].sum()),
            "length": {f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in percentiles},
        }
        if self.learns in ("pairs", "labels"):
            described |= self._describe_answers(samples)
        if self.stratum:
            described["strata"] = dict(sorted(Counter(str(self.stratum[r]) for r in records.tolist()).items()))
        return described

    def _describe_answers(self, samples: TokenDataset) -> dict[str, Any]:
        """The number of preferred answers, and the mean length of these and of the others, in tokens."""
        lengths, is_good = np.array(self.targets, np.int64)[samples.chosen], filters.is_preferred(samples)
        is_paired = samples.unit_size == 2
        unit, good, bad = ("pairs", "chosen", "rejected") if is_paired else ("desirable", "desirable", "undesirable")
        answers: dict[str, Any] = {unit: int(is_good.sum())}
        for kind, own in ((good, is_good), (bad, ~is_good)):
            answers[f"tokens per {kind} answer"] = round(float(lengths[own].mean()), 1) if own.any() else 0
        longer = float((lengths[::2] > lengths[1::2]).mean()) if is_paired and len(samples) else 0.0
        return {"answers": answers, "chosen_longer": longer}


def _time(item: Conversation, name: str) -> float:
    """A number or an ISO 8601 date as seconds; later is larger."""
    value = item.fields[name]
    try:
        with contextlib.suppress(ValueError):
            return float(value)
        date = datetime.fromisoformat(value)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        what = f"{value!r:.40} is neither a number nor a date like 2024-02-29 (data.split_time)"
        raise UserError(f"{item.file}:{item.line}: {name}: {what}") from None


def _are_equal(samples: list[Sample]) -> bool:
    return len(samples) == 2 and np.array_equal(samples[0].ids, samples[1].ids)
