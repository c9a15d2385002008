"""A Mac with an M-series chip and 32 GB: Mistral-7B-Instruct-v0.3 with QLoRA on Metal, 2048 tokens.

For whoever trains on a laptop. macOS gives the GPU about 22.9 of the 32 GB. Planned, not measured: 18.5 GB, 7.5 GB with
checkpointing=full, 30.3 GFLOP per token. Change first: `data.train_file`; `model.name=Qwen/Qwen2.5-3B-Instruct` for
16 GB of memory; `quantization.bits=16` with no other program open, which avoids dequantizing weights at each use.
docs/metal.md says what to try first.
"""

from nanoft.config import load_file

# Expected time, until it is measured: 250 tokens per second are published for LoRA on 4 of Mistral-7B's 32 layers on an
# M1 Max with 32 GB (mlx-lm, LORA.md); adapters on all layers take longer. 1,000 records of 500 tokens, 90 % of them in
# training, for 3 epochs are 1.35 million tokens: 1,350,000 / 250 = 5,400 s, at least 1.5 hours.
config = load_file("gpu_12gb.py", beside=__file__).override(
    model={"dtype": "bfloat16"},
    # checkpointing stays auto: the activations of 2 x 2,048 tokens fit, and full adds 50 % more work
    training={"micro_batch_size": 2, "gradient_accumulation_steps": 8, "optimizer": "adamw"},
    system={"device": "mps", "memory_gb": 22.9},
)
