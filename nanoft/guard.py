"""What to do when a step goes wrong.

One NaN in a gradient turns every parameter into NaN at the next optimizer step, and nothing brings them back. So each
step is judged before it is taken: a loss or gradient norm that is not finite means that this window is skipped, with
parameters, optimizer and schedule untouched; too many in a row mean that the run has diverged.
"""

from __future__ import annotations

import math
from typing import Literal

from nanoft import TrainingFailed
from nanoft.runtime import is_out_of_memory

Verdict = Literal["ok", "skip", "stop"]


class Guard:
    """Judges each optimizer step from its loss and gradient norm."""

    def __init__(self, max_bad_steps: int):
        self.max_bad_steps = max_bad_steps
        self.bad_in_a_row = 0

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """`ok`: take the step; `skip`: leave it out; `stop`: the run has diverged."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.bad_in_a_row = 0
            return "ok"
        self.bad_in_a_row += 1
        return "stop" if self.bad_in_a_row >= self.max_bad_steps else "skip"


def explain_out_of_memory(error: BaseException, micro_batch_size: int, max_length: int) -> TrainingFailed | None:
    """Turn an out-of-memory error into advice; None if the error is something else."""
    if not is_out_of_memory(error):
        return None
    smaller = max(1, micro_batch_size // 2)
    advice = [f"model.max_seq_length={max_length // 2}", "quantization.bits=4"]
    if smaller < micro_batch_size:
        advice.insert(0, f"training.micro_batch_size={smaller} with twice the gradient_accumulation_steps")
    return TrainingFailed(f"out of memory with micro-batch {micro_batch_size}: try {', or '.join(advice)}")
