"""Saving checkpoints while training goes on, and logging what becomes of each save."""

from __future__ import annotations

from dataclasses import asdict

from nanoft.checkpoint import SaveResult
from nanoft.kernels import sharding
from nanoft.optim import optimizer_tensors
from nanoft.runtime import distributed
from nanoft.runtime.device import rng_state
from nanoft.training.progress import is_due, report_failure
from nanoft.training.state import TrainContext, TrainState


def save(ctx: TrainContext, state: TrainState) -> None:
    """Start writing a checkpoint in the background. It becomes the best one only when it is on the disk."""
    ctx.run.sync()
    log_save(ctx, state, ctx.writer.collect(wait=True))
    tensors = {ctx.weights_file: ctx.trained_weights(), "optimizer": optimizer_tensors(ctx.optimizer, ctx.trained)}
    tensors = {name: sharding.gather_full(named) for name, named in tensors.items()}
    contents = {**asdict(state), "rng": rng_state()}
    best = (state.best_step, state.best_loss) if state.best_step else None
    ctx.writer.start(state.step, tensors, contents, best)


def save_if_due(ctx: TrainContext, state: TrainState) -> None:
    """Save every training.save_steps, at the best step so far, and again some time after a save that failed."""
    log_save(ctx, state, ctx.writer.collect())
    retry = distributed.all_reduce_any(ctx.writer.overdue())
    if is_due(ctx, state, ctx.config.training.save_steps) or state.best_step == state.step or retry:
        save(ctx, state)


def log_save(ctx: TrainContext, state: TrainState, outcome: SaveResult | None) -> None:
    """Log a finished save. A save that failed is a warning: there will be another."""
    if outcome is None:
        return
    if outcome.error is None:
        where = str(outcome.path.relative_to(ctx.run.directory))
        seconds = {"seconds": outcome.seconds, "waited_seconds": outcome.waited_seconds}
        ctx.run.log("checkpoint", outcome.step, path=where, **seconds)
        return
    if state.best_step == outcome.step:  # its weights are lost: the best one is the one before, which is on the disk
        state.best_step, state.best_loss = ctx.checkpoints.best() or (0, float("inf"))
    report_failure(ctx, state, f"saving step {outcome.step}", outcome.error)


def ensure_final_checkpoint(ctx: TrainContext, state: TrainState) -> None:
    """A checkpoint of where the run stands, whatever was saved before.

    Raises:
        OSError: the disk refuses; earlier checkpoints are untouched.
    """

    def last_saved(must_work: bool) -> int:
        outcome = ctx.writer.collect(wait=True)
        log_save(ctx, state, outcome)
        if must_work and outcome is not None and outcome.error is not None:
            raise outcome.error
        return ctx.writer.last_step

    if distributed.broadcast_from_rank0(lambda: last_saved(False)) != state.step:
        save(ctx, state)
        distributed.broadcast_from_rank0(lambda: last_saved(True))
