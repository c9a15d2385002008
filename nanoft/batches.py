"""Samples to batches: length rules, order, packing, collation, and a position that can be resumed.

The unit of training is the window: all micro-batches of one optimizer step. Which samples a window holds is a pure
function of (seed, epoch, index), so a run can go on from any window without replaying what came before, and a window
holds the same samples however it is cut into micro-batches. Inside a window rows are sorted by length, so that a
micro-batch pads little.

A row is one sample, or several one behind another when packing; then each token carries its document's number
(`segments`) and its place in that document (`positions`), and documents do not see each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoft import UserError
from nanoft.chat import ChatTokenizer, Rendered, Sample
from nanoft.records import Conversation


@dataclass(frozen=True)
class LengthReport:
    """What the length rule did; printed, because tokens that are silently lost are how datasets shrink unnoticed."""

    kept: int
    truncated: int
    dropped: int
    without_target: int
    target_tokens: int
    target_tokens_lost: int  # of dropped samples; truncation takes prompt tokens only
    tokens: int
    longest: int

    def describe(self, limit: int, truncation: str) -> list[str]:
        """Two lines: what there is, and what the rule did to it."""
        rule = {"prompt": "oldest prompt tokens cut", "drop": "over-long samples dropped"}[truncation]
        without = f"; {self.without_target:,} without a target left out" if self.without_target else ""
        lost = f"{self.target_tokens_lost:,} target tokens lost" if self.target_tokens_lost else "no target token lost"
        return [
            f"{self.tokens:,} in {self.kept:,} samples, {self.target_tokens:,} of them targets, longest {self.longest}",
            f"longer than {limit:,}: {self.truncated:,} truncated, {self.dropped:,} dropped "
            f"(data.truncation={truncation}: {rule}){without}; {lost}",
        ]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as the model takes it; everything is computed on the CPU, so nothing waits for the device."""

    ids: Tensor  # (b, s) int64
    positions: Tensor | None  # (b, s): place in its document; None: 0, 1, 2, ...
    segments: Tensor | None  # (b, s): document, 0 for padding; None: one document a row
    rows: Tensor  # (n,) int64: flat positions whose next token is a target
    targets: Tensor  # (n,) int64: those next tokens
    tokens: int  # without padding
    records: list[int]  # the record of each sample

    @property
    def target_tokens(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """Copy to the device; from pinned memory the copy overlaps with computing."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor | None) -> Any:
            if tensor is None:
                return None
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        names = ("ids", "positions", "segments", "rows", "targets")
        return dataclasses.replace(self, **{name: move(getattr(self, name)) for name in names})


def make_samples(
    conversations: list[Conversation], chat: ChatTokenizer, max_length: int, truncation: str, max_bad: float = 0.05
) -> tuple[list[Sample], LengthReport]:
    """Tokenise conversations and apply the length rule.

    Args:
        max_length: tokens that a sample may have.
        truncation: "prompt" cuts the oldest prompt tokens of an over-long sample and keeps every target token;
            "drop" leaves such a sample out. A sample whose targets alone are too long is dropped either way.
    Raises:
        UserError: no sample is left, a template that cannot be used, or more than `max_bad` samples without a target.
    """
    kept: list[Sample] = []
    counts = dict.fromkeys(("truncated", "dropped", "without_target", "target_tokens_lost"), 0)
    first_without: int | None = None
    for sample in chat.encode(_render(conversations, chat)):
        if not sample.is_target.any():
            counts["without_target"] += 1
            first_without = sample.record if first_without is None else first_without
            continue
        fitted = sample if len(sample.ids) <= max_length else _shorten(sample, max_length, truncation, chat.bos_id)
        counts["truncated"] += fitted is not None and len(fitted.ids) < len(sample.ids)
        if fitted is None:
            counts["dropped"] += 1
            counts["target_tokens_lost"] += int(sample.is_target.sum())
        else:
            kept.append(fitted)
    if first_without is not None and counts["without_target"] > max_bad * len(conversations):
        where = conversations[first_without]
        raise UserError(
            f"{where.file}:{where.line}: the sequence has no target token: nothing could be learned from it"
        )
    if not kept:
        raise UserError(
            f"data: none of {len(conversations)} samples fits model.max_seq_length={max_length}: raise it, or set "
            "data.truncation=prompt"
        )
    lengths = [len(sample.ids) for sample in kept]
    targets = sum(int(sample.is_target.sum()) for sample in kept)
    return kept, LengthReport(len(kept), tokens=sum(lengths), longest=max(lengths), target_tokens=targets, **counts)


def _render(conversations: list[Conversation], chat: ChatTokenizer) -> Iterator[Rendered]:
    for record, conversation in enumerate(conversations):
        if conversation.text is not None:
            yield chat.text_sample(conversation.text, record)
            continue
        try:
            yield from chat.render_samples(conversation.messages, record)
        except UserError as error:
            raise UserError(f"{conversation.file}:{conversation.line}: {error}") from None


def _shorten(sample: Sample, max_length: int, truncation: str, bos_id: int | None) -> Sample | None:
    """Drop the oldest prompt tokens behind BOS; None if that is not allowed or not enough."""
    first_target = int(sample.is_target.argmax())
    head = 1 if sample.ids[0] == bos_id else 0
    excess = len(sample.ids) - max_length
    if truncation == "drop" or excess > first_target - 1:  # one token stays, BOS or not, to predict the first target
        return None
    keep = np.r_[0:head, head + excess : len(sample.ids)]
    return Sample(sample.ids[keep], sample.is_target[keep], sample.record)


class Batches:
    """The samples of a run in the order of training: windows of micro-batches, epoch after epoch."""

    def __init__(
        self,
        samples: list[Sample],
        micro_batch_size: int,
        accumulation_steps: int,
        seed: int,
        pad_id: int,
        pack_length: int | None = None,
        shuffle: bool = True,
    ):
        """
        Args:
            pack_length: tokens that a row of several samples may have; None: one sample a row.
            shuffle: a new order every epoch; otherwise the order given.
        """
        self.samples, self.pad_id, self.seed = samples, pad_id, seed
        self.micro_batch_size, self.window_rows = micro_batch_size, micro_batch_size * accumulation_steps
        self.pack_length, self.shuffle = pack_length, shuffle
        self.lengths = np.array([len(sample.ids) for sample in samples])
        self.epoch, self.index = 0, 0  # the window that comes next
        self._rows = self._arrange(0)

    def windows_in_epoch(self) -> int:
        """Optimizer steps of the current epoch; the last window may be smaller than the others."""
        return -(-len(self._rows) // self.window_rows)

    def next_window(self) -> list[Batch]:
        """All micro-batches of the next optimizer step, and one step further."""
        window = self.window(self.index)
        self.index += 1
        if self.index >= self.windows_in_epoch():
            self.seek(self.epoch + 1, 0)
        return window

    def window(self, index: int) -> list[Batch]:
        """The micro-batches of one window of the current epoch, short rows first."""
        rows = self._rows[index * self.window_rows : (index + 1) * self.window_rows]
        rows = sorted(rows, key=lambda row: int(self.lengths[row].sum()))
        pieces = [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]
        return [collate([[self.samples[i] for i in row] for row in piece], self.pad_id) for piece in pieces]

    def seek(self, epoch: int, index: int) -> None:
        """Go to a window; costs one shuffle, whatever was consumed before."""
        if epoch != self.epoch:
            self._rows = self._arrange(epoch)
        self.epoch, self.index = epoch, index

    def _arrange(self, epoch: int) -> list[list[int]]:
        """The rows of an epoch, each a list of sample numbers."""
        count = len(self.samples)
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        if self.pack_length is None:
            return [[int(i)] for i in order]
        return pack(order.tolist(), self.lengths, self.pack_length)


def pack(order: list[int], lengths: Any, capacity: int, open_rows: int = 32) -> list[list[int]]:
    """Put samples one behind another into rows of at most `capacity` tokens: each into the fullest row it fits."""
    closed: list[list[int]] = []
    rows: list[tuple[int, list[int]]] = []  # (tokens left, samples)
    for sample in order:
        length = int(lengths[sample])
        fitting = [row for row in rows if row[0] >= length]
        left, members = min(fitting, key=lambda row: row[0], default=(capacity, []))
        if fitting:
            rows.remove((left, members))
        rows.append((left - length, [*members, sample]))
        if len(rows) > open_rows:
            fullest = min(rows, key=lambda row: row[0])
            rows.remove(fullest)
            closed.append(fullest[1])
    return closed + [members for _, members in rows]


def collate(rows: list[list[Sample]], pad_id: int) -> Batch:
    """Rows of samples to one batch, padded on the right to the longest row.

    A token's target is its next token, if that is a target of the same document: the first token of a document is
    predicted by nothing.
    """
    width = max(sum(len(sample.ids) for sample in row) for row in rows)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    segments = np.zeros((len(rows), width), dtype=np.int64)
    is_target = np.zeros((len(rows), width), dtype=np.bool_)
    for r, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, start=1):
            end = start + len(sample.ids)
            ids[r, start:end], segments[r, start:end] = sample.ids, number
            positions[r, start:end] = np.arange(end - start)
            is_target[r, start + 1 : end] = sample.is_target[1:]
            start = end
    predicts = np.flatnonzero(np.append(is_target.ravel()[1:], False))  # shift left: who predicts a target
    packed = any(len(row) > 1 for row in rows)
    return Batch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions) if packed else None,
        segments=torch.from_numpy(segments) if packed else None,
        rows=torch.from_numpy(predicts),
        targets=torch.from_numpy(ids.ravel()[predicts + 1]),
        tokens=int((segments > 0).sum()),
        records=[sample.record for row in rows for sample in row],
    )


def in_order(samples: list[Sample], batch_size: int, pad_id: int) -> Iterable[Batch]:
    """Every sample once, sorted by length so that batches pad little: for evaluation."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids))
    for start in range(0, len(ordered), batch_size):
        yield collate([[sample] for sample in ordered[start : start + batch_size]], pad_id)
