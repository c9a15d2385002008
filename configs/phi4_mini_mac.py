"""A Mac with an M-series chip and 16 GB: Phi-4-mini-instruct with QLoRA on Metal, 2048 tokens.

For whoever trains a small model on a laptop. macOS gives the GPU about 11.5 of the 16 GB. Planned, not measured: 8.3 GB
with as few blocks recomputed as needed, 4.3 GB with checkpointing=full, 15.7 GFLOP per token. Change first:
`data.train_file`; docs/metal.md says what to try next.
"""

from nanoft.config import load_file

config = load_file("m4.py", beside=__file__).override(
    model={"name": "microsoft/Phi-4-mini-instruct"},
    training={"micro_batch_size": 1, "gradient_accumulation_steps": 16},
    system={"memory_gb": 11.5},
)
