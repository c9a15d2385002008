"""A GPU with 16 GB: Gemma 3 4B (instruction-tuned, text only) with QLoRA, 4096 tokens.

For whoever has longer texts; the terms of the model must be accepted on the Hub. Planned, not measured: 13.7 GB, 5.1 GB
with checkpointing=full, 17.4 GFLOP per token. Change first: `data.train_file`.
"""

from nanoft.config import load_file

config = load_file("gemma3_4b_8gb.py", beside=__file__).override(
    model={"max_seq_length": 4096}, system={"memory_gb": 15.5}
)
