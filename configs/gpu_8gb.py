"""A GPU with 8 GB (RTX 2070, 3060 Ti, 3070, 4060): Qwen2.5-3B-Instruct with QLoRA, 2048 tokens.

For whoever has a laptop or a small card, perhaps with a screen on it. Planned, not measured: 7.1 GB with as few blocks
recomputed as needed, 3.2 GB with checkpointing=full, 13.3 GFLOP per token. Change first: `data.train_file`;
`training.checkpointing=full` if other programs use the card; 7 billion parameters (configs/gpu_12gb.py) fit too, if no
screen is connected to the card.
"""

from nanoft.config import load_file

config = load_file("gpu_12gb.py", beside=__file__).override(
    model={"name": "Qwen/Qwen2.5-3B-Instruct"}, training={"optimizer": "adamw_8bit_paged"}, system={"memory_gb": 8}
)
