"""Before the first step of a job: say what will happen, and try whether it can.

The longest micro-batch, an evaluation batch and a save are rehearsed for real, with fewer rows if memory is short; what
cannot work ends here, in a line, and not after hours.
"""

from __future__ import annotations

import itertools
import sys

from nanoft import UserError, kernels, parallel, runtime
from nanoft.batches import Batches
from nanoft.chat import ChatTokenizer
from nanoft.config import questionable
from nanoft.corpus import Corpus
from nanoft.job import Job, State, Tensors, halve, trained_weights
from nanoft.lora import describe_adapters
from nanoft.metrics import Run, clock
from nanoft.nf4 import Linear4bit, Linear8bit
from nanoft.optim import optimizer_tensors
from nanoft.plan import kept
from nanoft.preflight import (
    Check,
    check_data,
    check_head,
    judge,
    preview,
    rehearse,
    rehearse_evaluation,
    rehearse_save,
    show_window,
)
from nanoft.weights import quantization_of


def announce(job: Job, state: State, total_steps: int, seconds_a_step: float) -> None:
    """Say what will happen before it happens: where, what is trained, how long it will take."""
    c, say = job.config, job.run.say
    kinds = (Linear4bit, Linear8bit)
    packed = sum(m.in_features * m.out_features for m in job.model.modules() if isinstance(m, kinds))
    total = sum(p.numel() for p in job.model.parameters()) + packed
    trainable = sum(p.numel() for _, p in job.trained)
    adapter = f"{'DoRA' if c.lora.dora else 'LoRA'} rank {c.lora.rank}"
    kind = "every parameter" if c.training.method == "full" else adapter
    book, double = quantization_of(c) or ("", False)
    base = book.upper() + (", double quantisation" if double else "") + ("" if packed else ", unpacked once")
    many = f"{parallel.ranks()} x " if parallel.ranks() > 1 else ""
    many = f"model split over {many}" if c.training.sharding == "full" else many
    say(f"device    {many}{runtime.describe(job.device)}; computing in {str(job.dtype).removeprefix('torch.')}")
    say(f"model     {c.model.name}" + (f"; base in {base}" if book else ""))
    say(f"training  {kind}: {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    for line in describe_adapters(job.adapters):
        say(f"          {line}")
    say(f"kernels   {kernels.describe(job.model)}")
    say(f"attention {job.model.attention_backend(job.dtype, job.config.model.max_seq_length, job.batches.is_packed)}")
    for warning in questionable(c):
        say(f"warning: {warning}")
    if c.logging.show_example:
        say(f"example   {job.chat.mark(job.batches.samples[0], colour=sys.stdout.isatty())}")
    if state.step:
        say(f"resuming  after step {state.step} of {total_steps}")
    left, epochs = total_steps - state.step, job.corpus.report["epochs"]
    duration = clock(left * seconds_a_step)
    say(f"plan      {left:,} steps ({epochs:.3g} epochs) of {c.effective_batch_size()} rows, about {duration}")


def preflight_checks(job: Job, state: State, forced: list[str]) -> float:
    """Look at the data, the head, memory and disk before the first step; returns the seconds that a step takes.

    Raises:
        UserError: a check fails and is not forced.
    """
    head = []
    if job.adapters and not job.config.model.random_init:
        head.append(check_head(job.model, job.chat, job.corpus.training))
    parallel.tell(lambda: check_samples(job, forced, head))
    seconds_a_token, batches = rehearse_step(job, state), job.batches
    measured, predicted = runtime.peak_memory_gb(job.device), job.plan.peak / 1e9
    job.run.say(f"memory    {kept(job.plan)}; predicted {predicted:.2f} GB, measured {measured:.2f} GB")
    if len(job.validation):
        size, pad_id = job.config.evaluation.batch_size, job.chat.pad_id
        with runtime.Shortage(job.device) as short_of_memory:
            job.run.say(rehearse_evaluation(job.model, job.validation, size, pad_id, job.autocast).line())
        if short_of_memory:
            job.run.say(f"warning: out of memory with evaluation.batch_size={size}: smaller batches will be taken")
    weights = parallel.gathered(trained_weights(job))
    moments = parallel.gathered(optimizer_tensors(job.optimizer, job.trained))
    parallel.tell(lambda: check_saving(job, forced, weights, moments))
    seconds = seconds_a_token * batches.samples.lengths.sum() / batches.windows_in_epoch()
    return float(seconds / parallel.ranks())


def check_samples(job: Job, forced: list[str], head: list[Check]) -> None:
    """What the model will see: said, judged, and written down."""
    checks = [*check_data(job.corpus, job.chat, job.config.data.train_on), *head]
    (job.run.directory / "preview.txt").write_text(
        preview(job.corpus, job.chat, job.config.system.seed), encoding="utf-8"
    )
    for check in checks:
        job.run.say(check.line())
    judge(checks, forced)


def check_saving(job: Job, forced: list[str], weights: Tensors, moments: Tensors) -> None:
    """Whether a checkpoint can be written: said, and judged."""
    saved = rehearse_save(job.run.directory, weights, moments, job.config.training.keep_checkpoints)
    job.run.say(saved.line())
    judge([saved], forced)


def rehearse_step(job: Job, state: State) -> float:
    """Forward and backward over the longest micro-batch, with fewer rows if memory is short; seconds a token."""
    while True:
        longest = job.batches.longest()
        with runtime.Shortage(job.device), parallel.alike(job.device):
            fits, seconds = rehearse(job.model, longest, job.autocast)
            job.run.say(fits.line())
            return seconds / longest.tokens
        halve(job, state)


def show(run: Run, batches: Batches, corpus: Corpus, chat: ChatTokenizer, step: int | None, total_steps: int) -> None:
    """The window of an optimizer step (the first, if none is given) as the model sees it."""
    if step is not None and not 1 <= step <= total_steps:
        raise UserError(f"--show-step: {step}: this run has the steps 1 to {total_steps}")
    left_out, size = run.left_out(), batches.windows_in_epoch()
    taken = (place for place in map(divmod, itertools.count(), itertools.repeat(size)) if place not in left_out)
    epoch, index = next(itertools.islice(taken, (step or 1) - 1, None))
    batches.seek(epoch, index)
    run.say(f"step {step or 1}: window {index + 1:,} of {size:,} in epoch {epoch + 1}")
    for line in show_window(batches, index, corpus, chat, colour=sys.stdout.isatty()):
        run.say(line)
