"""Before the first step: does the model see what you think it sees, and will it fit?

Most failed fine-tunings were lost before they began: the turn never ends in a token that stops an answer, BOS stands
twice, the prompt in use is not the prompt in training, the stop token's row of a frozen head was never trained, memory
runs out at the longest batch after an hour, or the disk at the first save. Each of these is one check, one line, and
one thing to do about it.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanoft import UserError
from nanoft.batches import Batch, Batches, Sample, TokenDataset, eval_batches
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset
from nanoft.io.tensor_files import write_tensors
from nanoft.model import Decoder
from nanoft.objectives import Objective
from nanoft.optim import optimizer_tensors
from nanoft.runtime import distributed
from nanoft.runtime.device import preserve_rng_state
from nanoft.runtime.memory import Shortage, peak_memory_gb
from nanoft.tracking.run import Run
from nanoft.training.memory_plan import MARGIN, describe_recompute, find_machine, minimum_plan, suggest_savings
from nanoft.training.recovery import halve_micro_batch
from nanoft.training.state import Tensors, TrainContext, TrainState, trained_weights

LOOKED_AT = 2000  # samples, evenly spread
RENDERED = 32  # conversations, rendered again
Autocast = Callable[[], AbstractContextManager[Any]]
CHECKS = ("room", "stop", "bos", "targets", "prompt", "head", "disk")  # of checks that can be forced
WEAK, STRONG = 0.25, 4.0  # norm of a row of the head, relative to the median row


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is as it should be, what was found, and what to do if not."""

    name: str
    passed: bool
    found: str
    fix: str = ""

    def line(self) -> str:
        return f"preflight {self.name:9} {'ok  ' if self.passed else 'FAIL'}  {self.found}" + (
            "" if self.passed else f": {self.fix} (or --force {self.name})"
        )


def require_passed(checks: Sequence[Check], forced: Sequence[str]) -> None:
    """Stop at what failed, unless it is forced by name.

    Raises:
        UserError: names the first check that failed, and its fix.
    """
    failed = [check for check in checks if not check.passed and check.name not in forced]
    if failed:
        raise UserError(
            f"preflight: {failed[0].name}: {failed[0].found}: {failed[0].fix} (or --force {failed[0].name})"
        )


def check_room(config: Config, length: int = 0) -> Check:
    """Whether there is memory, by the plan, before anything is loaded: for the model, and one row of so many tokens."""
    needed, there = minimum_plan(config, length).peak, find_machine(config).room / MARGIN
    what = f"the model and a row of {length:,} tokens take" if length else "the model alone takes"
    found = f"{what} {needed / 1e9:.2f} GB at least, and {there / 1e9:.2f} GB are there"
    return Check("room", needed <= there, found, "" if needed <= there else f"set {suggest_savings(config, 1, length)}")


def check_ids(corpus: PreparedDataset, vocab_size: int) -> None:
    """Every token is in the model's vocabulary: one that is not would read beyond the embedding.

    Raises:
        UserError: names the largest that is not.
    """
    tokens, at_once = corpus.training.tokens, 1 << 24
    pieces = (tokens[at : at + at_once] for at in range(0, len(tokens), at_once))
    largest = max((int(np.maximum(piece, ~piece).max()) for piece in pieces), default=0)  # targets stand as ~id
    if largest >= vocab_size:
        raise UserError(
            f"model.name: its vocabulary has {vocab_size:,} tokens, and its tokenizer gives the id {largest:,}: "
            "tokenizer.json is another model's: fetch the directory again"
        )


def check_data(corpus: PreparedDataset, chat: ChatTokenizer, train_on: str) -> list[Check]:
    """Everything that can be told from the tokens alone."""
    spread = np.linspace(0, len(corpus.training) - 1, min(LOOKED_AT, len(corpus.training))).astype(int)
    samples = [corpus.training[int(at)] for at in spread]
    return [
        _check_stop(samples, corpus, chat, train_on),
        _check_bos(samples, chat),
        _check_targets(samples, corpus),
        _check_prompt(corpus, chat, train_on),
    ]


def _check_stop(samples: list[Sample], corpus: PreparedDataset, chat: ChatTokenizer, train_on: str) -> Check:
    """Every trained turn ends in a token that stops an answer; one that was cut has no end."""
    last: list[int] = []
    for sample in samples:
        after = np.append(sample.is_target[1:], False)
        ends = sample.ids[sample.is_target & ~after].tolist()  # of each run of targets
        if train_on == "all":
            ends = [token for token in sample.ids[sample.is_target].tolist() if token in chat.stop_ids][-1:] or ends
        last += ends
    cut = corpus.report["truncated"] if corpus.report["truncation"] in ("response", "proportional") else 0
    odd = [token for token in last if token not in chat.stop_ids]
    shown = f"; one ends in {chat.decode(odd[:1], keep_special=True)!r}" if odd else ""
    stops = ", ".join(repr(chat.decode([token], keep_special=True)) for token in chat.stop_ids)
    return Check(
        "stop",
        len(odd) <= cut,
        f"{len(last) - len(odd):,} of {len(last):,} turns end in a stop token ({stops}){shown}",
        "the tuned model would not stop; put the template's end of turn into generation_config.json's eos_token_id",
    )


def _check_bos(samples: list[Sample], chat: ChatTokenizer) -> Check:
    """BOS stands at the beginning only."""
    if chat.bos_id is None:
        return Check("bos", True, "the tokenizer has none")
    doubled = sum(bool(len(s.ids) > 1 and s.ids[0] == s.ids[1] == chat.bos_id) for s in samples)
    first = sum(bool(s.ids[0] == chat.bos_id) for s in samples)
    fix = "take {{ bos_token }} out of the chat template, or the BOS out of the tokenizer's post-processor"
    return Check(
        "bos", not doubled, f"{first:,} of {len(samples):,} samples begin with one BOS, {doubled} with two", fix
    )


def _check_targets(samples: list[Sample], corpus: PreparedDataset) -> Check:
    """There is something to learn in every sample."""
    without = sum(not s.is_target.any() for s in samples)
    share = corpus.report["training"]["target_tokens"] / corpus.report["training"]["tokens"]
    return Check(
        "targets", not without, f"{share:.1%} of the tokens are targets; samples without any: {without}", "data"
    )


def _check_prompt(corpus: PreparedDataset, chat: ChatTokenizer, train_on: str) -> Check:
    """What the model is given in use is what stood before its answers in training."""
    looked_at, differing, extra = 0, 0, ""
    for conversation in corpus.conversations(corpus.training, RENDERED):
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]
        if not answers or train_on == "all":
            continue
        messages = conversation.messages[: answers[0] + 1]
        plain = [{key: value for key, value in m.items() if key not in ("weight", "train")} for m in messages]
        (sample, *_) = chat.encode_now(chat.render_samples(plain, 0, conversation.tools))
        before = sample.ids[: int(sample.is_target.argmax())].tolist()
        prompt = chat.encode_prompt(plain[:-1], conversation.tools)
        looked_at += 1
        if before != prompt:
            differing += 1
            extra = chat.decode(before[len(prompt) :], keep_special=True)
    found = f"{looked_at - differing} of {looked_at} prompts are the same in training and in use"
    if extra:
        found += f"; in training {extra!r:.60} follows"
    return Check(
        "prompt",
        not differing,
        found,
        "the template adds it to the answers; for Qwen3 set data.template_args={enable_thinking: false}",
    )


def check_head(model: Decoder, chat: ChatTokenizer, samples: TokenDataset) -> Check:
    """A frozen head whose row for the stop token was never trained cannot learn to stop."""
    ends = {
        int(s.ids[s.is_target][-1]) for s in (samples[at] for at in range(min(100, len(samples)))) if s.is_target.any()
    }
    stops = sorted(ends & set(chat.stop_ids))
    norms = distributed.full_tensor(model.head.detach()).float().norm(dim=1)
    median = norms.median().item()
    ratios = {chat.decode([token], keep_special=True): norms[token].item() / median for token in stops}
    found = ", ".join(f"{token!r}: {ratio:.2f}" for token, ratio in ratios.items()) or "no stop token in use"
    return Check(
        "head",
        all(WEAK <= ratio <= STRONG for ratio in ratios.values()),
        f"norm of the stop token's row of the head, relative to the median row: {found}",
        "the base has not learned this token: use a template whose end of turn it knows, or training.method=full",
    )


def rehearse(objective: Objective, model: Decoder, batch: Batch, autocast: Autocast) -> tuple[Check, float]:
    """Forward and backward over the longest micro-batch, and the seconds that it takes; nothing is changed.

    The optimizer's state is laid out already, so its memory is counted, whatever kind it is.
    """
    batch, seconds = batch.to(model.head.device), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with preserve_rng_state():
        for _ in range(2):  # the first one warms up, and leaves its gradients
            started = time.perf_counter()
            with autocast():
                loss = objective.loss(model, batch)
            loss.backward()
            loss.item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    for parameter in trained:
        parameter.grad = None
    return Check("batch", True, f"the longest, {tuple(batch.ids.shape)}: forward and backward fit"), min(seconds)


def rehearse_evaluation(job: TrainContext) -> Check:
    """The loss of the longest evaluation batch."""
    samples, size = job.validation, job.config.evaluation.batch_size
    longest = samples[np.argsort(-samples.lengths, kind="stable")[:size]]
    with job.autocast():
        job.objective.evaluate(job.model, eval_batches(longest, size, job.chat.pad_id))
    return Check("eval", True, f"{len(longest)} rows of up to {longest.lengths.max()} tokens fit")


def rehearse_save(directory: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], keep: int) -> Check:
    """Write the weights of a checkpoint and take them away again; then room for those that will lie there at once.

    Raises:
        UserError: the directory cannot be written.
    """
    aside = directory / f".preflight-{os.getpid()}"
    try:
        write_tensors(aside, weights)
        size = aside.stat().st_size
    except OSError as error:
        raise UserError(f"output.dir: {directory}: cannot be written: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
    return check_disk(directory, size + sum(tensor.nbytes for tensor in moments.values()), keep)


def check_disk(directory: Path, size: int, keep: int) -> Check:
    """Room for the checkpoints that will lie there at once, besides those that do."""
    there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(directory).free, max(size * (keep + 2) - there, 0)
    found = f"{needed / 1e9:.2f} GB more for {keep + 2} checkpoints, {free / 1e9:.2f} GB free in {directory}"
    return Check(
        "disk", free > needed, found, "free some, lower training.keep_checkpoints, or choose another output.dir"
    )


# ---- For people to look at


def show_window(
    batches: Batches, index: int, corpus: PreparedDataset, chat: ChatTokenizer, color: bool
) -> Iterator[str]:
    """A window of the current epoch as the model sees it: borders of documents, targets, special tokens, counts."""
    for number, (rows, batch) in enumerate(zip(batches.rows(index), batches.window(index), strict=True), start=1):
        height, width = batch.ids.shape
        padding = height * width - batch.tokens
        yield (
            f"micro-batch {number}: {height}x{width}, {batch.tokens:,} tokens, {batch.target_tokens:,} targets, "
            f"{padding:,} padding"
        )
        for row, members in enumerate(rows, start=1):
            for document, place in enumerate(members.tolist(), start=1):
                sample = batches.samples[place]
                where = f"row {row}" + (f", document {document} of {len(members)}" if len(members) > 1 else "")
                counts = f"{len(sample.ids):,} tokens, {int(sample.is_target[1:].sum()):,} targets"
                yield f"  ── {where}: {corpus.location(sample.record)}, {counts}"
                yield chat.highlight_targets(sample, color)


def preview(corpus: PreparedDataset, chat: ChatTokenizer, seed: int) -> str:
    """The shortest, the longest, a truncated and three random samples: ids, text and mask."""
    samples = corpus.training
    cut = np.flatnonzero(np.isin(samples.chosen, corpus.truncated))
    chance = random.Random(seed)
    chosen = [
        ("shortest", int(samples.lengths.argmin())),
        ("longest", int(samples.lengths.argmax())),
        *(("truncated", int(place)) for place in cut[:1]),
        *(("random", chance.randrange(len(samples))) for _ in range(3)),
    ]
    return "\n".join(itertools.chain.from_iterable(_describe(name, samples[at], corpus, chat) for name, at in chosen))


def _describe(name: str, sample: Sample, corpus: PreparedDataset, chat: ChatTokenizer) -> list[str]:
    targets = int(sample.is_target.sum())
    return [
        f"==== {name}: {corpus.location(sample.record)}, {len(sample.ids)} tokens, {targets} targets",
        chat.highlight_targets(sample, color=False),
        "ids   " + " ".join(map(str, sample.ids.tolist())),
        "mask  " + " ".join(str(int(value)) for value in sample.is_target),
        "",
    ]


def preflight_checks(job: TrainContext, state: TrainState, forced: list[str]) -> float:
    """Look at the data, the head, memory and disk before the first step; returns the seconds that a step takes.

    Raises:
        UserError: a check fails and is not forced.
    """
    head = []
    if job.adapters and not job.config.model.random_init:
        head.append(check_head(job.model, job.chat, job.corpus.training))
    distributed.broadcast_from_rank0(lambda: check_samples(job, forced, head))
    seconds_a_token, batches = rehearse_step(job, state), job.batches
    measured, predicted = peak_memory_gb(job.device), job.plan.peak / 1e9
    job.run.print(f"memory    {describe_recompute(job.plan)}; predicted {predicted:.2f} GB, measured {measured:.2f} GB")
    if len(job.validation):
        size = job.config.evaluation.batch_size
        with Shortage(job.device) as short_of_memory:
            job.run.print(rehearse_evaluation(job).line())
        if short_of_memory:
            job.run.print(f"warning: out of memory with evaluation.batch_size={size}: smaller batches will be taken")
    weights = distributed.gather_full(trained_weights(job))
    moments = distributed.gather_full(optimizer_tensors(job.optimizer, job.trained))
    distributed.broadcast_from_rank0(lambda: check_saving(job, forced, weights, moments))
    seconds = seconds_a_token * batches.samples.lengths.sum() / batches.windows_in_epoch()
    return float(seconds / distributed.world_size())


def check_samples(job: TrainContext, forced: list[str], head: list[Check]) -> None:
    """What the model will see: said, judged, and written down."""
    checks = [*check_data(job.corpus, job.chat, job.config.data.train_on), *head]
    (job.run.directory / "preview.txt").write_text(
        preview(job.corpus, job.chat, job.config.system.seed), encoding="utf-8"
    )
    for check in checks:
        job.run.print(check.line())
    require_passed(checks, forced)


def check_saving(job: TrainContext, forced: list[str], weights: Tensors, moments: Tensors) -> None:
    """Whether a checkpoint can be written: said, and judged."""
    saved = rehearse_save(job.run.directory, weights, moments, job.config.training.keep_checkpoints)
    job.run.print(saved.line())
    require_passed([saved], forced)


def rehearse_step(job: TrainContext, state: TrainState) -> float:
    """Forward and backward over the longest micro-batch, with fewer rows if memory is short; seconds a token."""
    while True:
        longest = job.batches.longest()
        with Shortage(job.device), distributed.same_exception(job.device):
            fits, seconds = rehearse(job.objective, job.model, longest, job.autocast)
            job.run.print(fits.line())
            return seconds / longest.tokens
        halve_micro_batch(job, state)


def show_step(
    run: Run, batches: Batches, corpus: PreparedDataset, chat: ChatTokenizer, step: int | None, total_steps: int
) -> None:
    """The window of an optimizer step (the first, if none is given) as the model sees it."""
    if step is not None and not 1 <= step <= total_steps:
        raise UserError(f"--show-step: {step}: this run has the steps 1 to {total_steps}")
    left_out, size = run.skipped_windows(), batches.windows_in_epoch()
    taken = (place for place in map(divmod, itertools.count(), itertools.repeat(size)) if place not in left_out)
    epoch, index = next(itertools.islice(taken, (step or 1) - 1, None))
    batches.seek(epoch, index)
    run.print(f"step {step or 1}: window {index + 1:,} of {size:,} in epoch {epoch + 1}")
    for line in show_window(batches, index, corpus, chat, color=sys.stdout.isatty()):
        run.print(line)
