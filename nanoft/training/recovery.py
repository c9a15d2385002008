"""TODO."""

from __future__ import annotations

from nanoft.training.memory_plan import out_of_memory_error
from nanoft.training.state import TrainContext, TrainState

# ---- Said, and made smaller


def halve_micro_batch(job: TrainContext, state: TrainState) -> None:
    """Out of memory: go on from where `state` stands with micro-batches of half the rows; the window stays the same.

    Raises:
        TrainingFailed: they have one row; says what would help.
    """
    rows = job.batches.micro_batch_size
    if rows == 1:
        raise out_of_memory_error(job.config, rows)
    job.optimizer.zero_grad(set_to_none=True)
    job.batches.micro_batch_size = state.micro_batch_rows = (rows + 1) // 2
    job.batches.seek(state.epoch, state.window)
    if job.run.has_metrics:
        job.run.log("warning", state.step, what="out of memory", micro_batch_rows=state.micro_batch_rows)
    job.run.print(
        f"warning: out of memory after step {state.step} with micro-batches of {rows} rows: again with "
        f"{state.micro_batch_rows}; same samples a step, same loss"
    )
