"""Batches against brute force: targets, windows, packing, the length rule, and a position that can be resumed."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from templates import CHATML, STYLES, TINY, Style, save

from nanoft import UserError
from nanoft.batches import Batch, Batches, LengthReport, collate, in_order, make_samples, pack
from nanoft.chat import ChatTokenizer, Sample
from nanoft.records import Conversation

PAD = 9


def make(lengths: list[int], seed: int = 0) -> list[Sample]:
    """Samples of random ids, PAD among them, with random targets, also on the first and the last token."""
    rng = np.random.default_rng(seed)
    return [
        Sample(rng.integers(5, 15, n).astype(np.int32), rng.random(n) < 0.5, record) for record, n in enumerate(lengths)
    ]


def random_lengths(count: int, seed: int = 0, longest: int = 40) -> list[int]:
    return np.random.default_rng(seed).integers(2, longest, count).tolist()


def records_of(window: list[Batch]) -> list[int]:
    return [record for batch in window for record in batch.records]


def describe(batch: Batch) -> list[Any]:
    tensors = (batch.ids, batch.positions, batch.segments, batch.rows, batch.targets)
    return [None if tensor is None else tensor.tolist() for tensor in tensors] + [batch.tokens, batch.records]


def talk(*turns: tuple[str, str], line: int = 1) -> Conversation:
    return Conversation([{"role": role, "content": content} for role, content in turns], None, "data.jsonl", line)


@pytest.fixture(scope="module")
def chat() -> ChatTokenizer:
    return ChatTokenizer.from_directory(TINY)


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
    found = [(int(at) // width, int(at) % width, int(to)) for at, to in zip(batch.rows, batch.targets, strict=True)]
    assert found == predictions(rows, batch)
    assert batch.target_tokens == len(found) == sum(int(sample.is_target[1:].sum()) for sample in samples)
    assert batch.tokens == sum(len(sample.ids) for sample in samples)
    assert batch.records == list(range(8))
    assert (batch.segments is None) == (batch.positions is None) == (grouping == [1] * 8)
    assert (batch.ids.dtype, batch.rows.dtype, batch.targets.dtype) == (torch.int64,) * 3


def test_packed_rows_number_their_documents() -> None:
    a, b, c = make([3, 2, 4])
    batch = collate([[a, b], [c]], PAD)
    assert batch.positions is not None
    assert batch.segments is not None
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    single = collate([[a], [b]], PAD)
    assert (single.positions, single.segments) == (None, None)


def test_first_token_of_a_document_is_never_predicted() -> None:
    whole = [Sample(np.array([5, 6], np.int32), np.array([True, True]), n) for n in range(4)]
    for rows in ([whole], [[sample] for sample in whole]):
        batch = collate(rows, PAD)
        assert batch.targets.tolist() == [6, 6, 6, 6]
        assert batch.ids.ravel()[batch.rows].tolist() == [5, 5, 5, 5]


def test_a_target_that_is_the_pad_token_is_kept() -> None:
    sample = Sample(np.array([5, PAD], np.int32), np.array([False, True]), 0)
    longer = Sample(np.array([5, 6, 7, 8], np.int32), np.array([False] * 4), 1)
    batch = collate([[sample], [longer]], PAD)
    assert (batch.rows.tolist(), batch.targets.tolist()) == ([0], [PAD])


def test_on_the_cpu_a_batch_stays_itself() -> None:
    batch = collate([make([4])], PAD)
    assert batch.to(torch.device("cpu")) is batch


# ---- Windows


@pytest.mark.parametrize("pack_length", [None, 64])
def test_windows_do_not_depend_on_how_they_are_cut(pack_length: int | None) -> None:
    samples = make(random_lengths(53))
    cuts = [(1, 8), (2, 4), (8, 1)]
    runs = [Batches(samples, size, steps, 3, PAD, pack_length) for size, steps in cuts]
    for _ in range(2 * runs[0].windows_in_epoch()):
        windows = [run.next_window() for run in runs]
        expected = [records_of(window) for window in windows]
        assert expected[0] == expected[1] == expected[2]
        assert len({sum(batch.target_tokens for batch in window) for window in windows}) == 1
        for (size, steps), window in zip(cuts, windows, strict=True):
            assert len(window) <= steps
            assert all(len(batch.ids) <= size for batch in window)


@pytest.mark.parametrize("pack_length", [None, 64])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 50])
def test_each_epoch_has_each_sample_once(count: int, pack_length: int | None) -> None:
    run = Batches(make(random_lengths(count)), 4, 2, 0, PAD, pack_length)
    orders = []
    for epoch in range(3):
        windows = []
        assert run.index == 0
        for _ in range(run.windows_in_epoch()):
            assert run.epoch == epoch
            windows.append(run.next_window())
        orders.append([records_of(window) for window in windows])
        assert sorted(itertools.chain(*orders[-1])) == list(range(count))
        assert all(sum(len(batch.ids) for batch in window) == 8 for window in windows[:-1])
        assert windows[-1]
    if count == 50:
        assert orders[0] != orders[1] != orders[2]


def test_last_window_is_the_rest() -> None:
    run = Batches(make([3] * 11), 2, 2, 0, PAD)
    assert run.windows_in_epoch() == 3
    assert [len(records_of(run.next_window())) for _ in range(6)] == [4, 4, 3] * 2


def test_short_rows_come_first_in_a_window() -> None:
    run = Batches(make(random_lengths(40)), 2, 4, 0, PAD)
    for _ in range(5):
        lengths = [len(run.samples[record].ids) for record in records_of(run.next_window())]
        assert lengths == sorted(lengths)


def test_order_is_a_function_of_the_seed() -> None:
    samples = make(random_lengths(40))
    first, again, other = (Batches(samples, 4, 2, seed, PAD) for seed in (5, 5, 6))
    orders = [[records_of(run.next_window()) for _ in range(10)] for run in (first, again, other)]
    assert orders[0] == orders[1] != orders[2]
    torch.manual_seed(0)
    np.random.seed(0)  # global state must not matter
    assert [records_of(w) for w in map(Batches(samples, 4, 2, 5, PAD).window, range(5))] == orders[0][:5]


def test_without_shuffling_the_order_is_the_one_given() -> None:
    run = Batches(make([4] * 10), 2, 2, 0, PAD, shuffle=False)
    for _ in range(2):
        assert list(itertools.chain(*(records_of(run.next_window()) for _ in range(3)))) == list(range(10))


@pytest.mark.parametrize("pack_length", [None, 64])
def test_seek_is_the_same_as_consuming(pack_length: int | None) -> None:
    samples = make(random_lengths(45))
    run = Batches(samples, 3, 2, 1, PAD, pack_length)
    positions, windows = [], []
    for _ in range(20):
        positions.append((run.epoch, run.index))
        windows.append([describe(batch) for batch in run.next_window()])
    assert positions[-1][0] >= 2
    jumping = Batches(samples, 3, 2, 1, PAD, pack_length)
    for at in [7, 19, 0, 12, 3, 18]:
        jumping.seek(*positions[at])
        assert [describe(batch) for batch in jumping.next_window()] == windows[at]
        if at < 19:
            assert (jumping.epoch, jumping.index) == positions[at + 1]


# ---- Packing


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_each_sample_once_within_the_capacity(seed: int) -> None:
    lengths = np.array([*random_lengths(300, seed, longest=64), 64, 64])
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows = pack(order, lengths, 64)
    assert all(row for row in rows)
    assert Counter(itertools.chain(*rows)) == Counter(order)
    used = [int(lengths[row].sum()) for row in rows]
    assert max(used) == 64
    assert sum(used) / (64 * len(rows)) > 0.9  # little is left empty


def test_packing_takes_the_fullest_row_that_fits() -> None:
    assert sorted(map(sorted, pack([0, 1, 2, 3], np.array([6, 5, 4, 5]), 10))) == [[0, 2], [1, 3]]
    assert sorted(pack([0, 1, 2, 3], np.array([6, 5, 4, 5]), 10, open_rows=0)) == [[0], [1], [2], [3]]
    assert pack([], np.array([]), 10) == []


def test_packed_and_unpacked_epochs_have_the_same_targets() -> None:
    samples = make(random_lengths(60))

    def epoch(pack_length: int | None) -> tuple[int, int, Counter[int]]:
        run = Batches(samples, 2, 2, 0, PAD, pack_length)
        batches = [batch for n in range(run.windows_in_epoch()) for batch in run.window(n)]
        assert (pack_length is None) == all(batch.segments is None for batch in batches)
        targets = Counter(int(token) for batch in batches for token in batch.targets)
        return sum(b.tokens for b in batches), sum(b.target_tokens for b in batches), targets

    assert epoch(None) == epoch(80)


# ---- Length rule

LONG = talk(("user", "I want euros for my 921 rupees, " * 4), ("assistant", "Yes, please."), line=1)
SHORT = talk(("user", "Go"), ("assistant", "Yes"), line=2)


def targets_of(sample: Sample) -> list[int]:
    return sample.ids[sample.is_target].tolist()


def test_samples_that_fit_are_untouched(chat: ChatTokenizer) -> None:
    samples, report = make_samples([LONG, SHORT], chat, 512, "drop")
    whole = [s for n, c in enumerate([LONG, SHORT]) for s in chat.encode(chat.render_samples(c.messages, n))]
    assert [s.ids.tolist() for s in samples] == [s.ids.tolist() for s in whole]
    lengths, targets = [len(s.ids) for s in whole], [len(targets_of(s)) for s in whole]
    assert report == LengthReport(2, 0, 0, 0, sum(targets), 0, sum(lengths), max(lengths))
    assert make_samples([LONG], chat, max(lengths), "drop")[1].kept == 1  # exactly the limit fits


def test_drop_counts_what_is_lost(chat: ChatTokenizer) -> None:
    (long, short), _ = make_samples([LONG, SHORT], chat, 512, "drop")
    kept, report = make_samples([LONG, SHORT], chat, len(long.ids) - 1, "drop")
    assert [sample.record for sample in kept] == [1]
    lost = len(targets_of(long))
    assert report == LengthReport(1, 0, 1, 0, len(targets_of(short)), lost, len(short.ids), len(short.ids))


STARTS = {  # who writes BOS: template and tokenizer, tokenizer, template, nobody
    "tiny": None,
    "zephyr": STYLES["zephyr"],
    "template only": Style("{{ bos_token }}" + CHATML, "<s>", "<|im_end|>", "<|im_end|>"),
    "no BOS": STYLES["chatml"],
}


@pytest.mark.parametrize("start", STARTS)
def test_cutting_the_prompt_keeps_targets_and_bos(tmp_path: Path, start: str) -> None:
    style = STARTS[start]
    directory = save(tmp_path, style, adds_bos=start == "zephyr") if style else TINY
    chat = ChatTokenizer.from_directory(directory)
    (whole,), _ = make_samples([LONG], chat, 512, "prompt")
    targets = targets_of(whole)
    length = len(whole.ids)
    least = length - int(whole.is_target.argmax()) + 1  # one token before the first target, and all from there on
    for limit in range(length - 1, least - 1, -1):
        (sample,), report = make_samples([LONG], chat, limit, "prompt")
        assert len(sample.ids) == len(sample.is_target) == limit
        assert targets_of(sample) == targets
        assert not sample.is_target[0]
        assert (report.truncated, report.dropped, report.target_tokens) == (1, 0, len(targets))
        head = 0 if start == "no BOS" else 1
        assert sample.ids[:head].tolist() == ([chat.bos_id] if head else [])
        assert sample.ids[head:].tolist() == whole.ids[length - limit + head :].tolist()
        assert collate([[sample]], PAD).targets.tolist() == targets  # none is lost to having nothing before it
    with pytest.raises(UserError, match=f"none of 1 samples fits model.max_seq_length={least - 1}"):
        make_samples([LONG], chat, least - 1, "prompt")


def test_targets_that_are_too_long_are_dropped_whole(chat: ChatTokenizer) -> None:
    endless = talk(("user", "Go"), ("assistant", "Yes, please. " * 50))
    kept, report = make_samples([endless, SHORT], chat, 32, "prompt")
    assert [sample.record for sample in kept] == [1]
    assert (report.truncated, report.dropped) == (0, 1)
    assert report.target_tokens_lost > 100


def test_several_samples_of_one_record(tmp_path: Path) -> None:
    chat = ChatTokenizer.from_directory(save(tmp_path, STYLES["qwen"]))
    turns = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    samples, report = make_samples([SHORT, turns], chat, 512, "drop")
    assert [sample.record for sample in samples] == [0, 1, 1]
    assert report.kept == 3


def test_plain_text_becomes_a_sample(chat: ChatTokenizer) -> None:
    text = Conversation([], "I would like to hear Summer.", "data.jsonl", 1)
    (sample,), report = make_samples([text], chat, 512, "drop")
    assert report.target_tokens == len(sample.ids) - 1
    assert chat.decode(sample.ids.tolist()) == text.text


def test_samples_without_a_target(tmp_path: Path) -> None:
    """A template that swallows an answer: few such records are counted, more stop the run and one is named."""
    template = "{% for m in messages %}{% if m.content != 'nothing' %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    chat = ChatTokenizer.from_directory(save(tmp_path, Style(template, None, "<|im_end|>", "<|im_end|>")))
    swallowed = talk(("user", "Q"), ("assistant", "nothing"), line=77)
    samples, report = make_samples([SHORT] * 19 + [swallowed], chat, 512, "drop")
    assert (len(samples), report.kept, report.without_target, report.dropped) == (19, 19, 1, 0)
    with pytest.raises(UserError, match=r"^data\.jsonl:77: the sequence has no target token"):
        make_samples([SHORT] * 18 + [swallowed], chat, 512, "drop")


def test_a_record_that_the_template_refuses_is_named(chat: ChatTokenizer) -> None:
    refused = talk(("user", "a"), ("user", "b"), ("assistant", "c"), line=12)
    with pytest.raises(UserError, match=r"^data\.jsonl:12: the chat template refuses these messages: .*alternate"):
        make_samples([SHORT, refused], chat, 512, "drop")


def test_describe() -> None:
    report = LengthReport(1_500, 0, 0, 0, 4_000, 0, 123_456, 99)
    assert report.describe(512, "drop") == [
        "123,456 in 1,500 samples, 4,000 of them targets, longest 99",
        "longer than 512: 0 truncated, 0 dropped (data.truncation=drop: over-long samples dropped); "
        "no target token lost",
    ]
    report = LengthReport(10, 2, 3, 4, 50, 1_017, 70, 12)
    assert report.describe(12, "prompt")[1] == (
        "longer than 12: 2 truncated, 3 dropped (data.truncation=prompt: oldest prompt tokens cut); "
        "4 without a target left out; 1,017 target tokens lost"
    )


# ---- Evaluation order


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_in_order_covers_everything_once(batch_size: int) -> None:
    samples = make(random_lengths(30))
    batches = list(in_order(samples, batch_size, PAD))
    records = [record for batch in batches for record in batch.records]
    assert sorted(records) == list(range(30))
    lengths = [len(samples[record].ids) for record in records]
    assert lengths == sorted(lengths)
    assert [len(batch.records) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert sum(batch.target_tokens for batch in batches) == sum(int(s.is_target[1:].sum()) for s in samples)
