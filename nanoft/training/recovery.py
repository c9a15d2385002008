"""Recover from a step that cannot be taken, as the except clauses in train.py ask for:

OutOfMemory       the same window again in micro-batches of half the size: same gradient, less memory
SkipStep          skip the window
GradientOverflow  skip and count it; in float16 it is expected now and then
RollBack          return to the newest checkpoint, with a lower learning rate, and skip the windows that failed
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from nanoft import TrainingFailed, UserError, guard
from nanoft.checkpoint import Checkpoint, CheckpointCorrupted
from nanoft.guard import Diverged, GradientOverflow, History, RollBack, SkipStep
from nanoft.perplexity import evaluating
from nanoft.runtime.memory import OutOfMemory, release_memory
from nanoft.training.memory_plan import out_of_memory_error
from nanoft.training.progress import log_save
from nanoft.training.state import TrainContext, TrainState, restore_from


def halve_micro_batch(ctx: TrainContext, state: TrainState, error: OutOfMemory) -> TrainState:
    """Split the same windows into micro-batches of half the size; TrainingFailed if it is already 1."""
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
    """Skip a window, without a step; after an overflow of float16, the loss scale is halved."""
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
        where = "the first bad weight or output cannot be located in a sharded model"
        if ctx.config.training.sharding == "none":
            with ctx.autocast(), evaluating(ctx.model):  # without a balance loss
                where = guard.diagnose(ctx.model, batch.ids, batch.positions, batch.documents, batch.target_positions)
        raise Diverged(
            f"{seen.skips} consecutive windows failed after step {state.step}, even after {seen.rollbacks} rollbacks: "
            f"{where}: lower training.learning_rate ({ctx.config.training.learning_rate:g}), or check the records "
            "named in train.log"
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
            raise UserError("there is no earlier checkpoint")
        return saved

    try:
        back = replace(restore_from(ctx, choose), micro_batch_rows=state.micro_batch_rows)
    except (UserError, CheckpointCorrupted) as reason:
        raise TrainingFailed(f"after step {state.step}, rolling back failed: {reason}") from None
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
    """Log and print the records of a window with a bad loss or gradient."""
    records = [ctx.corpus.location(record) for batch in bad.window for record in dict.fromkeys(batch.records)]
    figures = {"loss": str(bad.loss), "grad_norm": str(bad.grad_norm), "window": bad.window.position}
    ctx.run.log("warning", state.step, what=what, **figures, records=records)
    first = ", ".join(Path(record).name for record in records[:4])
    done = "the step is taken anyway" if what == "spike" else "window skipped"
    ctx.run.print(f"warning: after step {state.step}: {bad.reason}: {done}: {first}")
