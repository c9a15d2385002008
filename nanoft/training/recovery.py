"""What happens instead of a step that cannot be taken: the clauses of the ladder in train.py.

OutOfMemory       the same window again in micro-batches of half the size: same gradient, less memory
SkipStep          the window is not trained on
GradientOverflow  the same, and counted; in float16 it is expected now and then
RollBack          back to the newest checkpoint, at a lower learning rate, without the windows that did it
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from nanoft import TrainingFailed, UserError, guard
from nanoft.checkpoint import Checkpoint, CheckpointCorrupted
from nanoft.guard import Diverged, GradientOverflow, History, RollBack, SkipStep
from nanoft.runtime.memory import OutOfMemory, release_memory
from nanoft.training.memory_plan import out_of_memory_error
from nanoft.training.progress import log_save
from nanoft.training.state import TrainContext, TrainState, restore_from


def halve_micro_batch(ctx: TrainContext, state: TrainState, error: OutOfMemory) -> TrainState:
    """Split the same windows into micro-batches of half the size; TrainingFailed if that is 1 already."""
    release_memory(ctx.device, error)
    ctx.optimizer.zero_grad(set_to_none=True)
    if state.updates:  # part of a step may have been taken; a checkpoint has whole ones
        state = back_to_checkpoint(ctx, state)
    rows = ctx.batches.micro_batch_size
    if rows == 1:
        raise out_of_memory_error(ctx.planner, rows) from None
    ctx.batches.micro_batch_size = state.micro_batch_rows = (rows + 1) // 2
    if ctx.run.has_metrics:
        ctx.run.log("warning", state.step, what="out of memory", micro_batch_rows=state.micro_batch_rows)
    ctx.run.print(
        f"warning: out of memory after step {state.step} with micro-batch size {rows}: retrying with "
        f"{state.micro_batch_rows}; same samples per step, same loss"
    )
    return state


def skip_window(ctx: TrainContext, state: TrainState, bad: SkipStep) -> None:
    """Pass over a window, without a step; after an overflow of float16, the next has half the loss scale."""
    is_overflow = isinstance(bad, GradientOverflow)
    state.overflow_steps += is_overflow
    warn_of_window(ctx, state, "overflow" if is_overflow else "step skipped", bad)
    ctx.optimizer.zero_grad(set_to_none=True)
    state.skip(bad.window)


def roll_back(ctx: TrainContext, state: TrainState, bad: RollBack) -> TrainState:
    """Restore the newest checkpoint, lower the learning rate, skip the bad windows; Diverged if done too often."""
    skip_window(ctx, state, bad)
    if state.guard.rollbacks >= ctx.config.guard.max_rollbacks:
        batch, seen = bad.window.micro_batches[-1].to(ctx.device), state.guard
        where = "the first bad weight or output was not searched for, because the model is sharded"
        if ctx.config.training.sharding == "none":
            with ctx.autocast():
                where = guard.diagnose(ctx.model, batch.ids, batch.positions, batch.documents, batch.target_positions)
        raise Diverged(
            f"{seen.skips} windows in a row could not be used after step {state.step}, and {seen.rollbacks} rollbacks "
            f"did not help: {where}: lower training.learning_rate ({ctx.config.training.learning_rate:g}), or look at "
            "the records in train.log"
        ) from None
    return back_to_checkpoint(ctx, state, guard.after_rollback(ctx.config.guard, state.guard))


def back_to_checkpoint(ctx: TrainContext, state: TrainState, history: History | None = None) -> TrainState:
    """Restore the newest valid checkpoint; what the guard has learned since then stays.

    If the last rollback led to that checkpoint, and no step could be taken from it, the one before it is used.
    `history` is the guard's after a rollback; None if it did not ask for this.
    """

    def choose() -> Checkpoint:
        log_save(ctx, state, ctx.writer.collect(wait=True))
        again = history is not None and state.step == state.guard.back_at
        saved = ctx.checkpoints.newest(state.step if again else math.inf)[0] or ctx.checkpoints.newest()[0]
        if saved is None:
            raise UserError("no checkpoint could be saved before")
        return saved

    try:
        back = replace(restore_from(ctx, choose), micro_batch_rows=state.micro_batch_rows)
    except (UserError, CheckpointCorrupted) as reason:
        raise TrainingFailed(f"after step {state.step} the run had to roll back, and could not: {reason}") from None
    back.guard = replace(history, back_at=back.step) if history else guard.after_restore(back.guard, state.guard)
    scale, skipped = back.guard.lr_scale, back.guard.skipped_windows
    ctx.model.train()
    ctx.checkpoints.delete_after(back.step)
    ctx.run.open_metrics(back.step, [back.epoch, back.window], skipped, rolled_back=True)
    ctx.run.log("warning", back.step, what="rolled back", since=state.step, rate=scale, left_out=skipped)
    at = f", at {scale:g} of the learning rate" if scale < 1 else ""
    ctx.run.print(f"warning: rolled back from step {state.step} to the checkpoint of step {back.step}{at}")
    return back


def warn_of_window(ctx: TrainContext, state: TrainState, what: str, bad: SkipStep) -> None:
    """Name the records of a window whose loss or gradient is not as it should be."""
    records = [ctx.corpus.location(record) for batch in bad.window for record in dict.fromkeys(batch.records)]
    figures = {"loss": str(bad.loss), "grad_norm": str(bad.grad_norm), "window": bad.window.position}
    ctx.run.log("warning", state.step, what=what, **figures, records=records)
    first = ", ".join(Path(record).name for record in records[:4])
    done = "the step is taken anyway" if what == "spike" else "window skipped"
    ctx.run.print(f"warning: after step {state.step}: {bad.reason}: {done}: {first}")
