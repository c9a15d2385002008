"""DPO of Mistral-7B-Instruct-v0.3 with LoRA on one GPU with 80 GB: pairs of answers, in the usual settings.

For whoever has pairs of better and worse answers. The reference is the model itself with the adapter switched off, so
that there is one copy of the weights. Planned, not measured: 41.6 GB, 19.8 GB with checkpointing=full, 30.3 GFLOP
per token. Change first: `data.train_file`; `lora.start_from` if the answers to compare come from an adapter of yours;
`preference.beta` and `training.learning_rate` (docs/preference.md); `training.objective=kto` for single answers.
"""

from nanoft.config import load_file

config = load_file("gpu_80gb.py", beside=__file__).override(
    model={"max_seq_length": 2048},
    lora={"dropout": 0.0},  # it would add noise to what is compared
    data={"train_file": "pairs.jsonl"},
    preference={"beta": 0.1},
    training={
        "objective": "dpo",
        "micro_batch_size": 2,  # pairs: 4 sequences
        "gradient_accumulation_steps": 8,
        "num_epochs": 1,
        "learning_rate": 5e-6,
        "warmup_ratio": 0.1,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    },
)
