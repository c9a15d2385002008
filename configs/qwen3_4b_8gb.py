"""A GPU with 8 GB (RTX 2070, 3060 Ti, 3070, 4060): Qwen3-4B-Instruct-2507 with QLoRA, 2048 tokens.

For whoever wants a current small model on a laptop or a small card. Planned, not measured: 7.1 GB, 3.9 GB with
checkpointing=full, 20.7 GFLOP per token. Change first: `data.train_file`; `training.checkpointing=full` if other
programs
use the card.
"""

from nanoft.config import load_file

config = load_file("gpu_8gb.py", beside=__file__).override(model={"name": "Qwen/Qwen3-4B-Instruct-2507"})
