"""A Mac with an M-series chip and 32 GB: Mistral-7B-Instruct-v0.3 with QLoRA on Metal, 2048 tokens.

For whoever trains on a laptop. macOS gives the GPU about 22.9 of the 32 GB. Planned, not measured: 18.5 GB, 7.5 GB with
every block recomputed, 30.3 GFLOP per token. Change first: `data.train_file`; `model.name=Qwen/Qwen2.5-3B-Instruct` for
16 GB of memory; `quantization.bits=16` with no other program open, which avoids dequantizing weights at each use.
docs/metal.md says what to try first.
"""

from nanoft.config import load_file

config = load_file("gpu_12gb.py", beside=__file__).override(
    training={"micro_batch_size": 2, "gradient_accumulation_steps": 8, "optimizer": "adamw"},
    system={"device": "mps", "memory_gb": 22.9},
)
