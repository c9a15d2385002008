"""Batches against brute force: targets, windows, packing, order, and a position that can be resumed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoft import batches
from nanoft.batches import Batch, Batches, Sample, TokenDataset, Window, pack, pack_in_order
from nanoft.data.inspection import utilization
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from nanoft.training.self_test import gradient_error, relative_error
from tiny_models import make_reference

PAD = 9


def make(lengths: list[int], seed: int = 0) -> list[Sample]:
    """Samples of random ids, PAD among them, with random targets, also on the first and the last token."""
    rng = np.random.default_rng(seed)
    return [
        Sample(rng.integers(5, 15, n).astype(np.int32), rng.random(n) < 0.5, record) for record, n in enumerate(lengths)
    ]


def random_lengths(count: int, seed: int = 0, longest: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(2, longest, count).tolist()


def records_of(window: Iterable[Batch]) -> list[int]:
    return [record for batch in window for record in batch.records]


def describe(batch: Batch) -> list[Any]:
    bounds = None if batch.documents is None else batch.documents.bounds
    tensors = (batch.ids, batch.positions, bounds, batch.target_positions, batch.targets)
    return [None if tensor is None else tensor.tolist() for tensor in tensors] + [batch.tokens, batch.records]


def collate(rows: list[list[Sample]], pad_id: int, multiple: int = 1) -> Batch:
    """Rows of samples that are in memory."""
    counts = itertools.accumulate(map(len, rows), initial=0)
    places = [np.arange(start, start + len(row)) for start, row in zip(counts, rows, strict=False)]
    return batches.collate(TokenDataset.of([sample for row in rows for sample in row]), places, pad_id, multiple)


# ---- Collation


def predictions(rows: list[list[Sample]], batch: Batch) -> list[tuple[int, int, int]]:
    """By the definition: (row, column, next token) for each token whose next one is a target of its document."""
    expected = []
    for r, row in enumerate(rows):
        start = 0
        for sample in row:
            for i in range(len(sample.ids) - 1):
                if sample.is_target[i + 1]:
                    expected.append((r, start + i, int(sample.ids[i + 1])))
            start += len(sample.ids)
    return expected


@pytest.mark.parametrize("grouping", [[1, 1, 1, 1, 1, 1, 1, 1], [3, 1, 4], [8], [1, 7]])
def test_collate_against_brute_force(grouping: list[int]) -> None:
    samples = make([7, 1, 12, 2, 5, 12, 1, 9])
    parts = iter(samples)
    rows = [list(itertools.islice(parts, count)) for count in grouping]
    batch = collate(rows, PAD)
    width = batch.ids.shape[1]
    assert width == max(sum(len(sample.ids) for sample in row) for row in rows)
    for r, row in enumerate(rows):
        flat = [int(token) for sample in row for token in sample.ids]
        assert batch.ids[r].tolist() == flat + [PAD] * (width - len(flat))
    pairs = zip(batch.target_positions, batch.targets, strict=True)
    found = [(int(at) // width, int(at) % width, int(to)) for at, to in pairs]
    assert found == predictions(rows, batch)
    assert batch.target_tokens == len(found) == sum(int(sample.is_target[1:].sum()) for sample in samples)
    assert batch.tokens == sum(len(sample.ids) for sample in samples)
    assert batch.records == list(range(8))
    assert (batch.documents is None) == (batch.positions is None) == (grouping == [1] * 8)
    assert (batch.ids.dtype, batch.target_positions.dtype, batch.targets.dtype) == (torch.int64,) * 3


def test_packed_rows_say_where_their_documents_lie() -> None:
    a, b, c = make([3, 2, 4])
    batch = collate([[a, b], [c]], PAD)
    assert batch.positions is not None
    assert batch.documents is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.documents.lengths == (3, 2, 4, 1)  # the last one is padding
    assert batch.documents.bounds.tolist() == [0, 3, 5, 9, 10]
    assert batch.documents.bounds.dtype == torch.int32
    single = collate([[a], [b]], PAD)
    assert (single.positions, single.documents) == (None, None)


def test_first_token_of_a_document_is_never_predicted() -> None:
    whole = [Sample(np.array([5, 6], np.int32), np.array([True, True]), n) for n in range(4)]
    for rows in ([whole], [[sample] for sample in whole]):
        batch = collate(rows, PAD)
        assert batch.targets.tolist() == [6, 6, 6, 6]
        assert batch.ids.ravel()[batch.target_positions].tolist() == [5, 5, 5, 5]


def test_a_target_that_is_the_pad_token_is_kept() -> None:
    sample = Sample(np.array([5, PAD], np.int32), np.array([False, True]), 0)
    longer = Sample(np.array([5, 6, 7, 8], np.int32), np.array([False] * 4), 1)
    batch = collate([[sample], [longer]], PAD)
    assert (batch.target_positions.tolist(), batch.targets.tolist()) == ([0], [PAD])


def test_on_the_cpu_a_batch_stays_itself() -> None:
    batch = collate([make([4])], PAD)
    assert batch.to(torch.device("cpu")) is batch


# ---- Windows


def windows_of(run: Batches) -> Iterator[Window]:
    """All windows in order from the beginning, without end."""
    position = [0, 0]
    while True:
        yield (window := run.next_window(*position))
        position = window.next_position


@pytest.mark.parametrize("pack_length", [None, 64])
def test_windows_do_not_depend_on_how_they_are_cut(pack_length: int | None) -> None:
    samples = make(random_lengths(53))
    cuts = [(1, 8), (2, 4), (8, 1)]
    runs = [Batches(samples, size, steps, 3, PAD, pack_length) for size, steps in cuts]
    for windows in itertools.islice(zip(*map(windows_of, runs), strict=True), 2 * runs[0].windows_in_epoch()):
        expected = [records_of(window) for window in windows]
        assert expected[0] == expected[1] == expected[2]
        assert len({sum(batch.target_tokens for batch in window) for window in windows}) == 1
        for (size, steps), window in zip(cuts, windows, strict=True):
            assert len(window.micro_batches) <= steps
            assert all(len(batch.ids) <= size for batch in window)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("pack_length", [None, 64])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 50])
def test_each_epoch_has_each_sample_once(count: int, pack_length: int | None, grouped: bool) -> None:
    run = Batches(make(random_lengths(count)), 4, 2, 0, PAD, pack_length, group_by_length=grouped)
    orders, every = [], windows_of(run)
    for epoch in range(3):
        windows = list(itertools.islice(every, run.windows_in_epoch()))
        assert [window.position for window in windows] == [[epoch, index] for index in range(len(windows))]
        orders.append([records_of(window) for window in windows])
        assert sorted(itertools.chain(*orders[-1])) == list(range(count))
        assert all(sum(len(batch.ids) for batch in window) == 8 for window in windows[:-1])
        assert windows[-1].micro_batches
    if count == 50:
        assert orders[0] != orders[1] != orders[2]


def test_last_window_is_the_rest() -> None:
    run = Batches(make([3] * 11), 2, 2, 0, PAD)
    assert run.windows_in_epoch() == 3
    assert [len(records_of(window)) for window in itertools.islice(windows_of(run), 6)] == [4, 4, 3] * 2


def test_short_rows_come_first_in_a_window() -> None:
    run = Batches(make(random_lengths(40)), 2, 4, 0, PAD)
    for window in itertools.islice(windows_of(run), 5):
        lengths = [len(run.samples[record].ids) for record in records_of(window)]
        assert lengths == sorted(lengths)


def test_order_is_a_function_of_the_seed() -> None:
    samples = make(random_lengths(40))
    first, again, other = (Batches(samples, 4, 2, seed, PAD) for seed in (5, 5, 6))
    orders = [[*map(records_of, itertools.islice(windows_of(run), 10))] for run in (first, again, other)]
    assert orders[0] == orders[1] != orders[2]
    torch.manual_seed(0)
    np.random.seed(0)  # global state must not matter
    assert [records_of(w) for w in map(Batches(samples, 4, 2, 5, PAD).window, range(5))] == orders[0][:5]


@pytest.mark.parametrize("pack_length", [None, 64])
def test_without_shuffling_every_epoch_has_the_order_of_the_samples(pack_length: int | None) -> None:
    run = Batches(make(random_lengths(53)), 2, 4, 0, PAD, pack_length, shuffle=False)
    windows = list(itertools.islice(windows_of(run), 3 * run.windows_in_epoch()))
    for epoch in range(3):
        every = [sorted(records_of(window)) for window in windows if window.position[0] == epoch]
        assert list(itertools.chain(*every)) == list(range(53))
        assert all(len(part) == 8 for part in every[:-1]) or pack_length


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("pack_length", [None, 64])
def test_a_window_is_a_function_of_its_position(pack_length: int | None, grouped: bool) -> None:
    samples = make(random_lengths(45))
    run = Batches(samples, 3, 2, 1, PAD, pack_length, group_by_length=grouped)
    windows = list(itertools.islice(windows_of(run), 20))
    assert windows[-1].position[0] >= 2
    jumping = Batches(samples, 3, 2, 1, PAD, pack_length, group_by_length=grouped)
    for at in [7, 19, 0, 12, 3, 18]:
        window = jumping.next_window(*windows[at].position)
        assert [*map(describe, window)] == [*map(describe, windows[at])]
        assert window.next_position == windows[at].next_position
        if at < 19:
            assert window.next_position == windows[at + 1].position


def test_skipped_windows_are_passed_over() -> None:
    run = Batches(make([3] * 11), 2, 2, 0, PAD)  # three windows per epoch
    window = run.next_window(0, 1, [[0, 1], [0, 2], [1, 1], [1, 0]])
    assert (window.position, window.next_position) == ([1, 2], [2, 0])
    assert records_of(window) == records_of(run.next_window(1, 2))


# ---- Packing


def unpacked(slots: Any, bounds: Any) -> list[list[int]]:
    return [slots[start:end].tolist() for start, end in itertools.pairwise(bounds.tolist())]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 64), max_size=200))
def test_packing_keeps_each_sample_once_within_the_capacity(lengths: list[int]) -> None:
    rows = unpacked(*pack(np.array(lengths, dtype=np.int64), 64))
    assert all(row for row in rows)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used, default=0) <= 64
    fewest = -(-sum(lengths) // 64)
    assert len(rows) <= 11 / 9 * max(fewest, sum(length > 32 for length in lengths)) + 4  # Johnson's bound


def brute_force_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [capacity - sum(lengths[i] for i in row) for row in rows]
        fitting = [r for r in range(len(rows)) if room[r] >= lengths[sample]]
        if fitting:
            rows[min(fitting, key=lambda r: room[r])].append(sample)
        else:
            rows.append([sample])
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_best_fit_decreasing(seed: int) -> None:
    """Rows of equal room are interchangeable: the fill of the rows is compared."""
    lengths = random_lengths(120, seed, longest=64)
    fill = sorted(sum(lengths[i] for i in row) for row in unpacked(*pack(np.array(lengths), 64)))
    assert fill == sorted(sum(lengths[i] for i in row) for row in brute_force_best_fit(lengths, 64))


def test_packing_of_nothing_and_of_what_fills_a_row() -> None:
    assert unpacked(*pack(np.array([], dtype=np.int64), 10)) == []
    assert unpacked(*pack(np.array([10, 10]), 10)) == [[0], [1]]
    assert sorted(map(sorted, unpacked(*pack(np.array([6, 5, 4, 5]), 10)))) == [[0, 2], [1, 3]]


@given(st.lists(st.integers(1, 10), max_size=30))
def test_packing_in_order_begins_a_row_when_the_next_sample_does_not_fit(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for sample, length in enumerate(lengths):
        if not rows or sum(lengths[i] for i in rows[-1]) + length > 10:
            rows.append([])
        rows[-1].append(sample)
    assert [row for row in unpacked(*pack_in_order(np.array(lengths, np.int64), 10)) if row] == rows


def test_who_shares_a_row_changes_and_the_number_of_windows_does_not() -> None:
    run = Batches(make(random_lengths(200, longest=20)), 2, 2, 0, PAD, 64)
    shared = []
    for epoch in range(3):
        run.seek(epoch)
        windows = run.windows_in_epoch()
        rows = [row for index in range(windows) for piece in run.rows(index) for row in piece]
        shared.append({frozenset(row.tolist()) for row in rows})
    assert len(shared[0] & shared[1]) < len(shared[0]) / 4
    assert len({len(rows) for rows in shared}) == 1


def test_packed_and_unpacked_epochs_have_the_same_targets() -> None:
    samples = make(random_lengths(60))

    def epoch(pack_length: int | None) -> tuple[int, int, Counter[int]]:
        run = Batches(samples, 2, 2, 0, PAD, pack_length)
        batches = [batch for n in range(run.windows_in_epoch()) for batch in run.window(n)]
        assert (pack_length is None) == all(batch.documents is None for batch in batches)
        targets = Counter(int(token) for batch in batches for token in batch.targets)
        return sum(b.tokens for b in batches), sum(b.target_tokens for b in batches), targets

    assert epoch(None) == epoch(80)


def test_packed_logits_and_gradients_are_those_of_the_documents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reference("mistral", tmp_path, vocab_size=32)
    samples = make([5, 9, 3, 1, 12, 7])

    def flow(rows: list[list[Sample]]) -> dict[str, torch.Tensor]:
        """The gradient of the summed loss."""
        model = load_model(tmp_path, torch.device("cpu"), torch.float32)
        batch = collate(rows, PAD)
        hidden = model(batch.ids, batch.positions, batch.documents, target_positions=batch.target_positions)
        token_nll(hidden, model.head, batch.targets).sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    alone = flow([[sample] for sample in samples])
    for rows in ([samples[:3], samples[3:]], [samples]):
        assert gradient_error(flow(rows), alone) < 1e-5
    model = load_model(tmp_path, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        assert packed_error(model, TokenDataset.of(samples)) < 1e-5
        forward = model.forward  # the test of the test: documents that see each other
        monkeypatch.setattr(model, "forward", lambda ids, positions=None, documents=None: forward(ids, positions))
        assert packed_error(model, TokenDataset.of(samples)) > 1e-2


def packed_error(model: Decoder, documents: TokenDataset) -> float:
    """Logits of every token, and the loss: all documents packed into one row against each by itself."""
    whole, losses = [np.arange(len(documents))], torch.zeros(2, dtype=torch.float64)
    batch = batches.collate(documents, whole, PAD)
    packed = model(batch.ids, batch.positions, batch.documents)  # (1, all tokens, hidden)
    worst = 0.0
    for place, in_pack in enumerate(packed.split(documents.lengths.tolist(), dim=1)):
        one = batches.collate(documents, [[place]], PAD)
        alone = model(one.ids)
        worst = max(worst, relative_error(model.logits(in_pack), model.logits(alone)))
        for i, hidden in enumerate((in_pack, alone)):
            losses[i] += token_nll(hidden[0, one.target_positions], model.head, one.targets).sum()
    return max(worst, relative_error(losses[0], losses[1]))


# ---- Padding


def test_grouping_by_length_pads_less_and_keeps_the_windows_random() -> None:
    samples = make(random_lengths(1000, longest=200))
    plain, grouped = (Batches(samples, 4, 2, 0, PAD, group_by_length=on) for on in (False, True))
    assert plain.windows_in_epoch() == grouped.windows_in_epoch() == 125
    assert utilization(grouped) > 0.97 > 0.9 > utilization(plain)
    longest = [max(len(batch.ids[0]) for batch in grouped.window(index)) for index in range(50)]
    assert longest != sorted(longest)
    assert abs(np.corrcoef(longest, range(50))[0, 1]) < 0.5  # not from short to long


@pytest.mark.parametrize("pack_length", [None, 64])
def test_utilization_is_what_the_batches_have(pack_length: int | None) -> None:
    run = Batches(make(random_lengths(100)), 4, 2, 0, PAD, pack_length, pad_to_multiple_of=8)
    batches_of_epoch = [batch for index in range(run.windows_in_epoch()) for batch in run.window(index)]
    used = sum(batch.tokens for batch in batches_of_epoch)
    assert utilization(run) == used / sum(batch.ids.numel() for batch in batches_of_epoch)
    assert all(batch.ids.shape[1] % 8 == 0 for batch in batches_of_epoch)
    assert {len(batch.ids) for batch in batches_of_epoch[:-2]} == {4}


def test_padding_to_a_multiple_changes_nothing_else() -> None:
    rows = [[sample] for sample in make([7, 1, 12, 5])]
    exact, wide = collate(rows, PAD), collate(rows, PAD, 16)
    assert (exact.ids.shape, wide.ids.shape) == ((4, 12), (4, 16))
    assert torch.equal(exact.ids, wide.ids[:, :12])
    assert (wide.ids[:, 12:] == PAD).all()
    assert torch.equal(exact.targets, wide.targets)
    assert torch.equal(wide.ids.ravel()[wide.target_positions + 1], wide.targets)


def test_the_longest_micro_batch() -> None:
    run = Batches(make([3, 9, 4, 8, 7, 2]), 2, 2, 0, PAD)
    assert sorted(run.longest().records) == [1, 3]


# ---- Samples


def test_samples_in_one_array_are_those_put_in() -> None:
    put_in = make(random_lengths(20))
    samples = TokenDataset.of(put_in)
    for part, expected in ((samples, put_in), (samples[3:9], put_in[3:9]), (samples[[5, 2]], [put_in[5], put_in[2]])):
        assert len(part) == len(expected)
        for found, sample in zip(part, expected, strict=True):
            assert found.ids.tolist() == sample.ids.tolist()
            assert found.is_target.tolist() == sample.is_target.tolist()
            assert (found.record, found.ids.dtype, found.is_target.dtype) == (sample.record, np.int32, np.bool_)
        assert part.lengths.tolist() == [len(sample.ids) for sample in expected]
    assert len(TokenDataset.of([])) == 0
    with pytest.raises(IndexError):
        samples[20]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    size=st.integers(1, 4),
    steps=st.integers(1, 3),
    packed=st.booleans(),
    order=st.sampled_from(["shuffled", "grouped", "of the files"]),
    stop=st.integers(0, 60),
)
def test_a_run_that_is_resumed_anywhere_goes_on_as_if_it_had_not_stopped(
    lengths: list[int], size: int, steps: int, packed: bool, order: str, stop: int
) -> None:
    options = {"group_by_length": order == "grouped", "shuffle": order != "of the files"}

    def fresh() -> Batches:
        return Batches(make(lengths), size, steps, 7, PAD, 32 if packed else None, **options)

    *_, last = itertools.islice(windows_of(fresh()), stop + 1)
    resumed = fresh().next_window(*last.position)
    assert [*map(describe, resumed)] == [*map(describe, last)]
    assert resumed.next_position == last.next_position


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_batches_equally_and_lose_none(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(batches.eval_batches(make([3] * count), 1, PAD))
    monkeypatch.setattr(batches.distributed, "world_size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(batches.distributed, "process_rank", lambda rank=rank: rank)
        shares.append(list(batches.share_of_rank(every)))
    assert {len(share) for share in shares} == {-(-count // size)}
    dealt = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert [batch.records for batch in dealt[:count]] == [batch.records for batch in every]
    assert all((batch.tokens, batch.target_tokens, batch.records) == (0, 0, []) for batch in dealt[count:])
