"""configs/h100.py with 64 rows a step instead of 16: steadier gradients, a quarter of the steps.

For whoever sees the training loss jump from step to step. The learning rate grows with the root of the batch, 2e-4
sqrt(64 / 16) = 4e-4. Memory is that of h100.py, for a micro-batch is no larger. Planned, not measured: 41.6 GB, and
19.8 GB with every block computed again. Time: 32.2 GFLOP a token; tokens a second: not measured. Change first:
`training.learning_rate=2e-4`, if the loss of the first steps after the warm-up rises.
"""

from pathlib import Path

from nanoft.config import load_file

config = load_file(Path(__file__).parent.parent / "h100.py").override(
    {
        "training.gradient_accumulation_steps": 32,
        "training.learning_rate": 4e-4,
        "training.eval_steps": 25,
        "training.save_steps": 125,
    }
)
