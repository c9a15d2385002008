"""One H100 or A100 with 80 GB: Mistral-7B-Instruct-v0.3 with QLoRA, in the usual settings; other configs build on it.

For whoever rents a large GPU and wants a first result to compare others with. Planned, not measured: 41.6 GB, 19.8 GB
with every block recomputed (10 GB of it because the base is dequantized once: `quantization.dequantize`), 32.2 GFLOP
per token. Change first: `data.train_file`; `quantization.bits=16` (configs/gpu_80gb.py), which fits too;
`data.packing=true` for short samples. configs/experiments/ has variations.
"""

from nanoft import config as c

config = c.Config(
    model=c.ModelConfig(name="mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16", max_seq_length=4096),
    lora=c.LoRAConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",)),
    quantization=c.QuantizationConfig(bits=4, type="nf4", double=True),
    data=c.DataConfig(train_file="train.jsonl", validation_split=0.05),
    training=c.TrainingConfig(
        micro_batch_size=2,
        gradient_accumulation_steps=8,
        num_epochs=3,
        optimizer="adamw_paged",
        learning_rate=2e-4,
        lr_scheduler="cosine",
        warmup_ratio=0.03,
        weight_decay=0.01,
        max_grad_norm=0.3,
        log_steps=10,
        eval_steps=100,
        save_steps=500,
        keep_checkpoints=3,
    ),
    evaluation=c.EvaluationConfig(prompt_batch_size=32),
    system=c.SystemConfig(device="cuda", memory_gb=80),
)
