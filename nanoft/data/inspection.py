"""The data as the model sees it: checks of the tokens, a preview of samples, and the window of a step.

Many fine-tuning runs fail because of their data: turns do not end with a token that stops generation, BOS appears
twice, samples have no targets. For each there is one check, one line, and one fix.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator

import numpy as np

from nanoft import UserError
from nanoft.batches import Batches, Sample, TokenDataset
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset
from nanoft.data.filters import is_preferred, prompt_lengths
from nanoft.runtime.command import Check

SAMPLES_CHECKED = 2000  # evenly spread


def check_embeddings(corpus: PreparedDataset, vocab_size: int, positions: int, config: Config) -> None:
    """Raise a UserError if a token id or a learned position (0: none) lies outside the model's embedding."""
    sides, more = [side for side in (corpus.training, corpus.validation) if len(side)], config.sampled_tokens
    longest = max(int((prompt_lengths(side) + more if more else side.lengths).max()) for side in sides)
    longest, what = min(longest, config.model.max_seq_length), "prompts and answers" if more else "samples"
    if 0 < positions < longest:
        raise UserError(f"model.max_seq_length: {what} have up to {longest} tokens: set it to the base's {positions}")
    largest = int(corpus.used_ids[-1])
    if largest >= vocab_size:
        found = f"its vocabulary has {vocab_size:,} tokens, but its tokenizer gives the id {largest:,}"
        raise UserError(f"model.name: {found}: tokenizer.json belongs to another model: download the model again")


def utilization(batches: Batches) -> float:
    """Share of the tokens of an epoch's micro-batches that are not padding."""
    lengths, padded, multiple = batches.row_lengths[batches.order], 0, batches.pad_to_multiple_of
    for start in range(0, len(lengths), batches.window_rows):
        window = np.sort(lengths[start : start + batches.window_rows])
        for at in range(0, len(window), batches.micro_batch_size):
            piece = window[at : at + batches.micro_batch_size]
            padded += -(-int(piece[-1]) // multiple) * multiple * len(piece)
    return int(lengths.sum()) / max(padded, 1)


def check_data(corpus: PreparedDataset, chat: ChatTokenizer, train_on: str) -> list[Check]:
    spread = np.linspace(0, len(corpus.training) - 1, min(SAMPLES_CHECKED, len(corpus.training))).astype(int)
    samples = [corpus.training[int(at)] for at in spread]
    without, sums = sum(not sample.is_target.any() for sample in samples), corpus.report["training"]
    share = f"{sums['target_tokens'] / sums['tokens']:.1%} of the tokens are targets"
    doubled = sum(len(s.ids) > 1 and s.ids[0] == s.ids[1] == chat.bos_id for s in samples)
    first = sum(s.ids[0] == chat.bos_id for s in samples)
    begins = f"{first:,} of {len(samples):,} samples begin with one BOS, {doubled} with two"
    begins = begins if chat.bos_id is not None else "the tokenizer has no BOS"
    fix = "remove {{ bos_token }} from the chat template, or the BOS from the tokenizer's post-processor"
    return [
        _check_stop(samples, corpus, chat, train_on),
        Check.of("bos", not doubled, begins, fix),
        Check.of("targets", not without, f"{share}; samples without any: {without}", "check data.truncation"),
    ]


def _check_stop(samples: list[Sample], corpus: PreparedDataset, chat: ChatTokenizer, train_on: str) -> Check:
    """Check that every trained turn ends with a stop token, except truncated turns and chunks of a text."""
    last: list[int] = []
    for sample in samples:
        after = np.append(sample.is_target[1:], False)
        ends = sample.ids[sample.is_target & ~after].tolist()  # of each run of targets
        if train_on == "all":
            ends = [token for token in sample.ids[sample.is_target].tolist() if token in chat.stop_ids][-1:] or ends
        last += ends
    cut = corpus.report["answers_cut"] + corpus.report["chunks"] - corpus.report["chunked_texts"]
    odd = [token for token in last if token not in chat.stop_ids]
    shown = f"; one ends with {chat.decode(odd[:1], keep_special=True)!r}" if odd else ""
    stops = ", ".join(repr(chat.decode([token], keep_special=True)) for token in chat.stop_ids)
    found = f"{len(last) - len(odd):,} of {len(last):,} turns end with a stop token ({stops}){shown}"
    fix = "the tuned model would not stop: add the template's end of turn to eos_token_id in generation_config.json"
    return Check.of("stop", len(odd) <= cut, found, fix)


def show_step(
    batches: Batches, corpus: PreparedDataset, chat: ChatTokenizer, step: int | None, skipped: set[tuple[int, int]]
) -> Iterator[str]:
    """The window of an optimizer step (default: the first) as lines; `skipped`: (epoch, index) of skipped windows."""
    if step is not None and not 1 <= step <= corpus.report["steps"]:
        raise UserError(f"--show-step: {step}: this run has the steps 1 to {corpus.report['steps']}")
    size = batches.windows_in_epoch()
    trained_on = (place for place in map(divmod, itertools.count(), itertools.repeat(size)) if place not in skipped)
    epoch, index = next(itertools.islice(trained_on, (step or 1) - 1, None))
    batches.seek(epoch)
    yield f"step {step or 1}: window {index + 1:,} of {size:,} in epoch {epoch + 1}"
    yield from show_window(batches, index, corpus, chat, color=sys.stdout.isatty())


def show_window(
    batches: Batches, index: int, corpus: PreparedDataset, chat: ChatTokenizer, color: bool
) -> Iterator[str]:
    """A window of the current epoch as the model sees it: document boundaries, targets, special tokens, counts."""
    for number, (rows, batch) in enumerate(zip(batches.rows(index), batches.window(index), strict=True), start=1):
        height, width = batch.ids.shape
        counts = f"{batch.tokens:,} tokens, {batch.target_tokens:,} targets, {height * width - batch.tokens:,} padding"
        yield f"micro-batch {number}: {height}x{width}, {counts}"
        for row, members in enumerate(rows, start=1):
            for document, place in enumerate(members.tolist(), start=1):
                sample = batches.samples[place]
                where = f"row {row}" + (f", document {document} of {len(members)}" if len(members) > 1 else "")
                where += f": {answer_kind(corpus, batches.samples, place)}{corpus.location(sample.record)}"
                counts = f"{len(sample.ids):,} tokens, {int(sample.is_target[1:].sum()):,} targets"
                yield f"  ── {where}, {counts}"
                yield chat.highlight_targets(sample, color)


def answer_kind(corpus: PreparedDataset, samples: TokenDataset, at: int) -> str:
    """The role of a sample's answer in a preference objective, as a prefix of its location."""
    kinds = {"pairs": ("rejected: ", "chosen: "), "labels": ("undesirable: ", "desirable: ")}
    return kinds.get(corpus.learns, ("", ""))[int(is_preferred(samples)[at])]


def preview(corpus: PreparedDataset, chat: ChatTokenizer, seed: int) -> str:
    """The shortest, the longest, a truncated and three random samples (of pairs, both answers): text, ids and mask."""
    samples = corpus.training
    cut, chance = np.flatnonzero(np.isin(samples.chosen, corpus.truncated)), random.Random(seed)
    chosen = [
        ("shortest", int(samples.lengths.argmin())),
        ("longest", int(samples.lengths.argmax())),
        *(("truncated", int(place)) for place in cut[:1]),
        *(("random", chance.randrange(len(samples))) for _ in range(3)),
    ]
    lines, size = [], samples.unit_size
    for name, at in ((name, at) for name, one in chosen for at in range(one - one % size, one - one % size + size)):
        sample = samples[at]
        counts = f"{len(sample.ids)} tokens, {int(sample.is_target.sum())} targets"
        lines.append(f"==== {name}: {answer_kind(corpus, samples, at)}{corpus.location(sample.record)}, {counts}")
        lines += [chat.highlight_targets(sample, color=False), "ids   " + " ".join(map(str, sample.ids.tolist()))]
        lines += ["mask  " + " ".join(map(str, sample.is_target.astype(int).tolist())), ""]
    return "\n".join(lines)
