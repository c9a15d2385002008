"""configs/h100.py for 20 steps on 500 records: does everything work, before a run takes hours?

For whoever has new data or a new machine. It has every part of a run: preflight, steps, evaluation, checkpoint,
report. Planned, not measured: 68.0 GB, 24.4 GB with checkpointing=full, as in h100.py; 32.2 GFLOP per token. Change
first: nothing; when it has passed, run configs/h100.py.
"""

from nanoft.config import load_file

config = load_file("../h100.py", beside=__file__).override(
    data={"max_samples": 500},
    training={"max_steps": 20, "log_steps": 1, "eval_steps": 10, "save_steps": 10},
    evaluation={"max_samples": 50, "prompts": 10},
)
