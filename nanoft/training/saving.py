"""TODO."""

from __future__ import annotations

from dataclasses import asdict

from nanoft.checkpoint import SaveResult
from nanoft.optim import optimizer_tensors
from nanoft.runtime import distributed
from nanoft.runtime.device import rng_state
from nanoft.runtime.memory import read_memory
from nanoft.training.state import TrainContext, TrainState, trained_weights, weights_file

# ---- Saved


def save(job: TrainContext, state: TrainState) -> None:
    """Begin to write a checkpoint; when it is on the disk, and only then, it may be called the best."""
    job.run.sync()
    report_save(job, state, job.saves.collect(wait=True))
    tensors = {weights_file(job): trained_weights(job), "optimizer": optimizer_tensors(job.optimizer, job.trained)}
    tensors = {name: distributed.gather_full(named) for name, named in tensors.items()}
    contents = {**asdict(state), "rng": rng_state()}
    best = (state.best_step, state.best_loss) if state.best_step else None
    job.saves.start(state.step, tensors, contents, best)


def report_save(job: TrainContext, state: TrainState, outcome: SaveResult | None) -> None:
    """Log what became of a save. One that failed is no end of training, and there will be another."""
    if outcome is None:
        return
    if outcome.error is None:
        where = str(outcome.path.relative_to(job.run.directory))
        seconds = {"seconds": outcome.seconds, "waited_seconds": outcome.waited_seconds}
        job.run.log("checkpoint", outcome.step, path=where, **seconds)
        return
    if state.best_step == outcome.step:  # its weights are lost: the best is the one before, whose are not
        state.best_step, state.best_loss = job.checkpoints.best() or (0, float("inf"))
    report_failure(job, state, f"saving step {outcome.step}", outcome.error)


def ensure_final_checkpoint(job: TrainContext, state: TrainState) -> None:
    """A checkpoint of where the run stands, whatever was saved before.

    Raises:
        OSError: the disk refuses; what was saved before is untouched.
    """

    def last_saved(refused: bool) -> int:
        outcome = job.saves.collect(wait=True)
        report_save(job, state, outcome)
        if refused and outcome is not None and outcome.error is not None:
            raise outcome.error
        return job.saves.last_step

    if distributed.broadcast_from_rank0(lambda: last_saved(False)) != state.step:
        save(job, state)
        distributed.broadcast_from_rank0(lambda: last_saved(True))


def log_memory(job: TrainContext, state: TrainState, stage: str) -> None:
    """What is held and what may be, at a stage of the run."""
    job.run.log("memory", state.step, stage=stage, **read_memory(job.device).figures())


def report_failure(job: TrainContext, state: TrainState, what: str, error: Exception) -> None:
    """Something that training can do without went wrong."""
    job.run.log("warning", state.step, what=f"{what} failed", error=f"{type(error).__name__}: {error}")
    job.run.print(f"warning: {what} failed after step {state.step}: {type(error).__name__}: {error}")
