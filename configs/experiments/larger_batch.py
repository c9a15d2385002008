"""configs/h100.py with 64 sequences per step instead of 16: less noisy gradients, a quarter of the steps.

For whoever sees the training loss jump from step to step. The learning rate grows with the root of the batch size: 2e-4
sqrt(64 / 16) = 4e-4. Planned, not measured: 68.0 GB, 24.4 GB with checkpointing=full, as in h100.py; 32.2 GFLOP per
token. Change first: `training.learning_rate=2e-4`, if the loss rises right after the warm-up.
"""

from nanoft.config import load_file

config = load_file("../h100.py", beside=__file__).override(
    training={"gradient_accumulation_steps": 16, "learning_rate": 4e-4, "eval_steps": 25, "save_steps": 125}
)
