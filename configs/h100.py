"""One H100 or A100 with 80 GB: Mistral-7B-Instruct-v0.3 with QLoRA, in the usual settings; other configs build on it.

For whoever rents a large GPU and wants a first result to compare others with. Planned, not measured: 68.0 GB, 24.4 GB
with checkpointing=full (10 GB of it because the base is dequantized once: `quantization.dequantize`), 32.2 GFLOP
per token. Change first: `data.train_file`; `quantization.bits=16` (configs/gpu_80gb.py), which fits too;
`data.packing=true` for short samples. configs/experiments/ has variations.
"""

from nanoft import config as c

# Expected time, until it is measured: 12,473 tokens per second are published for LoRA on Llama-3-8B, one H100,
# sequences of 4,096 tokens (NeMo AutoModel, Performance Summary). 10,000 records of 500 tokens, 90 % of them in
# training, for 3 epochs are 13.5 million tokens: 13,500,000 / 12,473 = 1,082 s, 18 minutes.

config = c.Config(
    model=c.ModelConfig(name="mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16", max_seq_length=4096),
    lora=c.LoRAConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",)),
    quantization=c.QuantizationConfig(bits=4, type="nf4", double=True),
    data=c.DataConfig(train_file="train.jsonl", validation_split=0.1),
    training=c.TrainingConfig(
        micro_batch_size=4,
        gradient_accumulation_steps=4,
        # auto: nothing is recomputed, because all activations fit; full: all blocks but the last, for 50 % more work
        checkpointing="auto",
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
    logging=c.LoggingConfig(report_to="auto"),
    evaluation=c.EvaluationConfig(prompt_batch_size=32),
    system=c.SystemConfig(device="cuda", memory_gb=80),
)
