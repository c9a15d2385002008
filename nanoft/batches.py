"""From samples to batches: order, packing, collation, and a position that can be resumed.

The unit of training is the window: all micro-batches of one optimizer step. The samples of a window are a pure function
of (seed, epoch, index), so a run resumes at any window without replaying earlier ones, and they do not depend on how
the window is split into micro-batches. Within a window, rows are sorted by length, which saves padding.

A row of a batch is one unit: a sample, or the two answers of a preference pair, which are never split. With packing, a
row holds several units. If a row has several samples, each token has its place in its document (`positions`), and
documents do not attend to each other (`documents`). All samples are in one array of numbers, usually a memory-mapped
file, so a million of them cost nothing until they are used; a target token is stored as its complement ~id, which is
negative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoft.attention import Documents
from nanoft.runtime import distributed

Array = np.ndarray[Any, Any]
MEGABATCH = 50  # windows within which rows are sorted by length when grouping


@dataclass(frozen=True)
class Sample:
    """One training sequence, and the record it came from."""

    ids: np.ndarray[Any, np.dtype[np.int32]]  # (n,)
    is_target: np.ndarray[Any, np.dtype[np.bool_]]  # (n,)
    record: int
    turn: int | None = None  # the message that is the only target; None: several messages, or plain text
    label: float = 1.0  # of an answer: 1 desirable, 0 not; of a pair: the margin of its first answer


@dataclass(eq=False, repr=False)
class TokenDataset(Sequence[Sample]):
    """Many samples in one array, which is shared by selections of them."""

    tokens: Array  # (total,) int32: ids, targets as ~id
    starts: Array  # (n + 1,) int64: the start of each sample, and the end of the last one
    all_records: Array  # (n,): the record that each sample came from
    chosen: Array  # (m,) int64: the samples of this selection, in order
    all_labels: Array  # (n,) float32
    unit_size: int = 1  # consecutive samples that belong together: 2 for pairs, the better answer first

    def __post_init__(self) -> None:
        self.records, self.labels = self.all_records[self.chosen], self.all_labels[self.chosen]
        self.begins = self.starts[self.chosen]
        self.lengths = self.starts[self.chosen + 1] - self.begins

    @classmethod
    def of(cls, samples: Sequence[Sample], unit_size: int = 1) -> TokenDataset:
        """From a few samples in memory."""
        if isinstance(samples, TokenDataset):
            return samples
        starts = np.cumsum([0, *(len(sample.ids) for sample in samples)])
        records = np.array([sample.record for sample in samples], dtype=np.int64)
        parts = [encode_targets(sample) for sample in samples]
        tokens = np.concatenate([np.empty(0, np.int32), *parts])
        labels = np.array([sample.label for sample in samples], np.float32)
        return cls(tokens, starts, records, np.arange(len(samples)), labels, unit_size)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, (int, np.integer)):
            begin = int(self.begins[at])
            ids, is_target = decode_targets(np.asarray(self.tokens[begin : begin + int(self.lengths[at])]))
            return Sample(ids, is_target, int(self.records[at]), label=float(self.labels[at]))
        return self.select(self.chosen[at])

    def select(self, chosen: Array) -> TokenDataset:
        """Other samples of the same array."""
        return TokenDataset(self.tokens, self.starts, self.all_records, chosen, self.all_labels, self.unit_size)

    def unit_lengths(self) -> Array:
        """(units,): tokens of each unit."""
        return self.lengths.reshape(-1, self.unit_size).sum(axis=1)

    def members(self, units: Array) -> Array:
        """(len(units) * unit_size,): the places of the samples of units."""
        return (units[:, None] * self.unit_size + np.arange(self.unit_size)).ravel()

    def units(self, which: Any) -> TokenDataset:
        """A selection of whole units, by a slice or by their numbers."""
        return self[self.members(np.arange(len(self) // self.unit_size)[which])]


def encode_targets(sample: Sample) -> Array:
    """A sample as one array: ids, targets as ~id."""
    return np.where(sample.is_target, ~sample.ids, sample.ids)


def decode_targets(tokens: Array) -> tuple[Array, Array]:
    """(ids, is_target) of such an array: negative values are targets, with inverted bits."""
    return tokens ^ (tokens >> 31), tokens < 0


@dataclass(frozen=True)
class Batch:
    """One micro-batch as the model's input; computed on the CPU, so that nothing waits for the device."""

    ids: Tensor  # (b, s) int64
    positions: Tensor | None  # (b, s): place in its document; None: 0, 1, 2, ...
    documents: Documents | None  # their bounds, if rows are packed
    target_positions: Tensor  # (n,) int64: flat positions whose next token is a target
    targets: Tensor  # (n,) int64: those next tokens
    sequence: Tensor  # (n,) int64: which of the samples each belongs to
    tokens: int  # without padding
    samples: TokenDataset  # in the order of the batch

    @property
    def records(self) -> list[int]:
        return self.samples.records.tolist()

    @property
    def units(self) -> int:
        return len(self.samples) // self.samples.unit_size

    @property
    def target_tokens(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Batch:
        """Copy to the device; to CUDA from pinned memory, so that the copy overlaps with computation.

        On Metal, a non-blocking copy may read memory that has been freed meanwhile (pytorch/pytorch#189690).
        """
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Any:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

        moved = {name: move(part) for name, part in vars(self).items() if isinstance(part, Tensor)}
        if self.documents is not None:
            moved["documents"] = Documents(self.documents.lengths, move(self.documents.bounds))
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Window:
    """All micro-batches of one optimizer step, on all ranks, and its place in the order of training."""

    micro_batches: list[Batch]
    position: list[int]  # [epoch, index]
    next_position: list[int]  # of the window after it

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.micro_batches)

    @property
    def tokens(self) -> int:  # without padding
        return sum(batch.tokens for batch in self)

    @property
    def target_tokens(self) -> int:
        return sum(batch.target_tokens for batch in self)

    @property
    def units(self) -> int:
        return sum(batch.units for batch in self)

    @property
    def samples(self) -> TokenDataset:
        """All samples of the window in the order of the data, however it is split."""
        chosen = np.concatenate([batch.samples.chosen for batch in self])
        return self.micro_batches[0].samples.select(np.sort(chosen))


class Batches:
    """The samples of a run in the order of training: windows of micro-batches, epoch after epoch."""

    def __init__(
        self,
        samples: Sequence[Sample],
        micro_batch_size: int,
        accumulation_steps: int,
        seed: int,
        pad_id: int,
        pack_length: int | None = None,  # tokens of a packed row, per sample of a unit; None: one unit per row
        group_by_length: bool = False,  # windows of rows of similar length, in random order
        pad_to_multiple_of: int = 1,  # the width of a micro-batch is rounded up to it
        shuffle: bool = True,  # False: every epoch has the order of `samples`
    ):
        self.samples, self.pad_id, self.seed = TokenDataset.of(samples), pad_id, seed
        self.micro_batch_size, self.window_rows = micro_batch_size, micro_batch_size * accumulation_steps
        self.group_by_length, self.pad_to_multiple_of, self.shuffle = group_by_length, pad_to_multiple_of, shuffle
        self._lengths = lengths = self.samples.unit_lengths()
        self.is_packed = pack_length is not None
        one_per_row: tuple[Array, Array] = np.arange(len(lengths)), np.arange(len(lengths) + 1)
        fill, per_unit = pack if shuffle else pack_in_order, self.samples.unit_size
        slots, self._bounds = fill(lengths, pack_length * per_unit) if pack_length is not None else one_per_row
        self._slots = slots  # (n,) the unit in each slot; row r has the slots bounds[r]:bounds[r + 1]
        self._slots_by_length = np.argsort(lengths[slots], kind="stable")
        self.row_lengths = np.add.reduceat(lengths[slots], self._bounds[:-1]) if len(slots) else np.empty(0, np.int64)
        self.epoch = 0  # the epoch of `window` and `rows`
        self._members, self.order = self._arrange(0)

    def windows_in_epoch(self) -> int:
        """Optimizer steps of an epoch, the same in each; the last window may be smaller than the others."""
        return -(-len(self.row_lengths) // self.window_rows)

    def next_window(self, epoch: int, index: int, skipped: Sequence[list[int]] = ()) -> Window:
        """The first window at or after a position that is not among the skipped [epoch, index]; a pure function."""
        while [epoch, index] in skipped:
            epoch, index = self._following(epoch, index)
        self.seek(epoch)
        return Window(self.window(index), [epoch, index], [*self._following(epoch, index)])

    def _following(self, epoch: int, index: int) -> tuple[int, int]:
        return (epoch, index + 1) if index + 1 < self.windows_in_epoch() else (epoch + 1, 0)

    def window(self, index: int) -> list[Batch]:
        """The micro-batches of one window of the current epoch, short rows first."""
        return [collate(self.samples, piece, self.pad_id, self.pad_to_multiple_of) for piece in self.rows(index)]

    def rows(self, index: int) -> list[list[Array]]:
        """The same window as indices into `samples`, (samples of the row,) for each row of each micro-batch."""
        rows = self.order[index * self.window_rows : (index + 1) * self.window_rows]
        return self._micro_batches(rows[np.argsort(self.row_lengths[rows], kind="stable")])

    def longest(self) -> Batch:
        """A micro-batch of the longest rows, which needs the most memory."""
        longest = np.argsort(-self.row_lengths, kind="stable")[: self.micro_batch_size]
        return collate(self.samples, self._micro_batches(longest)[0], self.pad_id, self.pad_to_multiple_of)

    def _micro_batches(self, rows: Array) -> list[list[Array]]:
        units = [self._members[self._bounds[row] : self._bounds[row + 1]] for row in rows.tolist()]
        members = [self.samples.members(row) for row in units]
        return [members[at : at + self.micro_batch_size] for at in range(0, len(members), self.micro_batch_size)]

    def seek(self, epoch: int) -> None:
        """Arrange the samples in the order of an epoch; costs one shuffle, whatever was consumed before."""
        if epoch != self.epoch:
            self._members, self.order = self._arrange(epoch)
            self.epoch = epoch

    def _arrange(self, epoch: int) -> tuple[Array, Array]:
        """(units by slot, order of the rows) of an epoch.

        Rows are packed once, by length only; every epoch permutes units of equal length among their slots. So the
        number of windows is constant, but the units that share a row vary.
        """
        if not self.shuffle:
            return self._slots, np.arange(len(self.row_lengths))
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.row_lengths))
        members = self._slots
        if self.is_packed:
            members = np.empty_like(self._slots)
            members[self._slots_by_length] = np.lexsort((rng.random(len(members)), self._lengths))
        return members, self._group(order, rng) if self.group_by_length else order

    def _group(self, order: Array, rng: np.random.Generator) -> Array:
        """Sort by length within MEGABATCH windows, so that the rows of each have similar lengths; then shuffle them."""
        size = self.window_rows
        near = np.arange(len(order)) // (MEGABATCH * size)
        order = order[np.lexsort((self.row_lengths[order], near))]
        full = len(order) // size
        windows = np.lexsort((rng.random(full), np.arange(full) // MEGABATCH))
        return np.concatenate([order[: full * size].reshape(full, size)[windows].ravel(), order[full * size :]])


def pack(lengths: Array, capacity: int) -> tuple[Array, Array]:
    """Best fit decreasing: place the longest sample first, each into the fullest row with room for it.

    A bin-packing heuristic that needs at most 11/9 of the minimum number of rows (Johnson 1974, "Fast algorithms for
    bin packing"). A bit set, whose bit c says that a row with c free tokens exists, finds the fullest fitting row.

    Returns:
        slots: (n,) the samples of all rows. bounds: (rows + 1,) the start of each row among them.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> rows
    free = 0  # bit c: with_room[c] is not empty
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the fullest row
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
            rows[row].append(sample)
        else:
            room, row = capacity, len(rows)
            rows.append([sample])
        with_room[room - length].append(row)
        free |= 1 << (room - length)
    slots = np.array([sample for row in rows for sample in row], dtype=np.int64)
    return slots, np.cumsum([0, *(len(row) for row in rows)])


def pack_in_order(lengths: Array, capacity: int) -> tuple[Array, Array]:
    """Next fit: place each sample into the newest row, or a new one if it has no room; returns the same as `pack`."""
    bounds, free = [0], capacity
    for sample, length in enumerate(lengths.tolist()):
        if length > free:
            bounds.append(sample)
            free = capacity
        free -= length
    return np.arange(len(lengths)), np.array([*bounds, len(lengths)])


def collate(samples: TokenDataset, rows: Sequence[Any], pad_id: int, pad_to_multiple_of: int = 1) -> Batch:
    """One batch of rows, each given as the indices of its samples, padded on the right to the longest row.

    A token's target is its next token, if that is a target in the same document; the first token is not predicted.
    """
    counts = [len(row) for row in rows]
    members = np.concatenate(rows).astype(np.int64)
    lengths = samples.lengths[members]
    row_of = np.repeat(np.arange(len(rows)), counts)
    row_lengths = np.bincount(row_of, lengths, len(rows)).astype(np.int64)
    width = -(-int(row_lengths.max()) // pad_to_multiple_of) * pad_to_multiple_of  # rounded up

    total = int(lengths.sum())
    ends = np.cumsum(lengths)  # of each document, without padding
    position = np.arange(total) - np.repeat(ends - lengths, lengths)  # 0, 1, 2, ... in each document
    source = np.repeat(samples.begins[members], lengths) + position
    padding_before = row_of * width - (np.cumsum(row_lengths) - row_lengths)[row_of]
    place = np.arange(total) + np.repeat(padding_before, lengths)  # in the flattened batch
    ids, is_target = decode_targets(samples.tokens[source])
    is_target &= position > 0

    shape = (len(rows), width)
    packed = max(counts) > 1
    predicts = place[is_target] - 1  # the token before a target
    return Batch(
        ids=_scattered(shape, place, ids, pad_id),
        positions=_scattered(shape, place, position, 0) if packed else None,
        documents=_documents(lengths, row_lengths, counts, width) if packed else None,
        target_positions=torch.from_numpy(predicts),
        targets=torch.from_numpy(ids[is_target].astype(np.int64)),
        sequence=torch.from_numpy(np.repeat(np.arange(len(members)), lengths)[is_target]),
        tokens=total,
        samples=samples[members],
    )


def _scattered(shape: tuple[int, int], place: Array, values: Array, fill: int) -> Tensor:
    """`values` at the flat places, `fill` elsewhere."""
    filled = np.full(shape, fill, dtype=np.int64)
    filled.ravel()[place] = values
    return torch.from_numpy(filled)


def _documents(lengths: Array, row_lengths: Array, counts: list[int], width: int) -> Documents:
    """The documents of all rows in order; the padding at the end of a row counts as one."""
    with_padding = np.insert(lengths, np.cumsum(counts), width - row_lengths)
    with_padding = with_padding[with_padding > 0]
    bounds = np.concatenate(([0], np.cumsum(with_padding))).astype(np.int32)
    return Documents(tuple(with_padding.tolist()), torch.from_numpy(bounds))


def share_of_rank(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Every N-th batch, for this rank of N; a rank with one batch less gets an extra batch without targets."""
    count, size, none = 0, distributed.world_size(), torch.empty(0, dtype=torch.int64)
    for count, batch in enumerate(batches, start=1):
        if (count - 1) % size == distributed.process_rank():
            yield batch
    if 0 < count % size <= distributed.process_rank():
        blank: dict[str, Any] = dict.fromkeys(("target_positions", "targets", "sequence"), none)
        yield dataclasses.replace(batch, **blank, tokens=0, samples=batch.samples[:0])


def eval_batches(samples: Sequence[Sample], batch_size: int, pad_id: int) -> Iterable[Batch]:
    """Every unit once, sorted by length to minimize padding: for evaluation."""
    samples = TokenDataset.of(samples)
    ordered = samples.members(np.argsort(samples.unit_lengths(), kind="stable")).reshape(-1, samples.unit_size)
    for start in range(0, len(ordered), batch_size):
        yield collate(samples, list(ordered[start : start + batch_size]), pad_id)
