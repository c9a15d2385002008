"""One H100 or A100 with 80 GB: Mistral-7B-Instruct-v0.3 with QLoRA, in the settings that are usual for it.

For whoever rents one large GPU and wants a first result that others can be compared with. Planned, not measured: 41.6
GB, and 19.8 GB with every block computed again; ten of them go to the base, which is kept unpacked where there is room
(`quantization.dequantize`). Time: 32.2 GFLOP a token; tokens a second: not measured. Change first: `data.train_file`;
then `quantization.bits=16` (configs/gpu_80gb.py), which 80 GB have room for; with short samples, `data.packing=true`.
configs/experiments/ has variations.
"""

from nanoft.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LoRAConfig,
    ModelConfig,
    QuantizationConfig,
    SystemConfig,
    TrainingConfig,
)

config = Config(
    model=ModelConfig(name="mistralai/Mistral-7B-Instruct-v0.3", dtype="bfloat16", max_seq_length=4096),
    lora=LoRAConfig(rank=16, alpha=32.0, dropout=0.05, target_modules=("all-linear",)),
    quantization=QuantizationConfig(bits=4, type="nf4", double=True),
    data=DataConfig(train_file="train.jsonl", validation_split=0.05),
    training=TrainingConfig(
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
    evaluation=EvaluationConfig(prompt_batch_size=32),
    system=SystemConfig(device="cuda", memory_gb=80),
)
