"""Write golden_preference.safetensors: losses of TRL's trainers, and their adapters after two optimizer steps.

    pip install trl==1.16.0
    python tests/golden_preference.py

The model is random and tiny, in float32; a step has two pairs, one in each micro-batch, where TRL normalizes as nanoft
does (KTO: four answers in one micro-batch, whose mean divergence is then that of the step). ORPO's likelihood term is
restricted to the answer, as in the paper; TRL takes prompt and answer. Conservative DPO is TRL's `aot` with one pair.
"""

from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

FILE = Path(__file__).with_suffix(".safetensors")
PAD, END, VOCAB = 0, 1, 32
PER_STEP = 2  # pairs, of twice as many as KTO's answers
TARGETS, RANK, ALPHA, LEARNING_RATE = ("q_proj", "down_proj"), 2, 4.0, 0.01
# Settings of `preference` -> the trainer, and its settings.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}, "DPO", {"loss_type": ["sigmoid"]}),
    "cdpo": ("dpo", {"label_smoothing": 0.1}, "DPO", {"loss_type": ["aot"], "label_smoothing": 0.1}),
    "robust": (
        "dpo",
        {"loss": "robust", "label_smoothing": 0.1, "beta": 0.3},
        "DPO",
        {"loss_type": ["robust"], "label_smoothing": 0.1, "beta": 0.3},
    ),
    "ipo": ("dpo", {"loss": "ipo"}, "DPO", {"loss_type": ["ipo"]}),
    "sft": (
        "dpo",
        {"sft_weight": 0.5},
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    "orpo": ("orpo", {"beta": 0.2}, "ORPO", {"beta": 0.2}),
    "simpo": (
        "simpo",
        {"beta": 2.0, "gamma": 0.5},
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0},
    ),
    "kto": (
        "kto",
        {"desirable_weight": 1.2, "undesirable_weight": 0.9},
        "KTO",
        {"desirable_weight": 1.2, "undesirable_weight": 0.9, "per_device_train_batch_size": 4},
    ),
}


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected answer of two steps; answers end in END, prompts have one length."""
    chance = np.random.default_rng(5)
    draw = lambda count: [*chance.integers(2, VOCAB, count).tolist()]  # noqa: E731
    return [(draw(4), [*draw(2 + n), END], [*draw(5 - n), END]) for n in range(2 * PER_STEP)]


def answers() -> list[tuple[list[int], list[int], bool]]:
    """The same for KTO: prompt, answer, and whether it is desirable; prompts differ."""
    chance = np.random.default_rng(6)
    both = [answer for pair in pairs() for answer in pair[1:]]
    prompts = chance.integers(2, VOCAB, (len(both), 4)).tolist()
    return [(prompt, answer, n % 3 != 1) for n, (prompt, answer) in enumerate(zip(prompts, both, strict=True))]


def random_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers for a parameter of this name, in PEFT's spelling or without its prefix; norms are near 1."""
    seed = zlib.crc32(name.removeprefix("base_model.model.").encode())
    values = 0.3 * np.random.default_rng(seed).standard_normal(tuple(shape), np.float32)
    return torch.from_numpy(values) + (len(shape) == 1)


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Fill what is trained: of a model without adapters, everything."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(random_weight(name.replace(".default", ""), p.shape))


def make_base(directory: Path) -> MistralForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": VOCAB}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": None, "max_position_embeddings": 64}
    special = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": None, "attn_implementation": "eager"}
    model = MistralForCausalLM(MistralConfig(**shape, **heads, **special))
    draw_weights(model)
    model.save_pretrained(directory)
    return model


def make_tokenizer() -> Any:
    """Each token is a word: its number."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "</s>": END, **{str(n): n for n in range(2, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def text(ids: list[int]) -> str:
    return " ".join("</s>" if n == END else str(n) for n in ids)


def make_trainer(kind: str, settings: dict[str, Any], scratch: Path) -> Any:
    """One of TRL's trainers on the data and the model, with an adapter that has an effect from the start."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class OnAnswers(ORPOTrainer):  # type: ignore[misc]
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            chosen, rejected, chosen_logits, rejected_logits, _ = super().concatenated_forward(model, batch)
            return chosen, rejected, chosen_logits, rejected_logits, -chosen.mean()

    trainers = {
        "DPO": (DPOConfig, DPOTrainer),
        "KTO": (KTOConfig, KTOTrainer),
        "CPO": (CPOConfig, CPOTrainer),
        "ORPO": (ORPOConfig, OnAnswers),
    }
    make_config, make = trainers[kind]
    options: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1 if kind == "KTO" else PER_STEP,
        "max_steps": 2,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "max_length": 32,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(scratch / "trl"),
        "remove_unused_columns": False,
    }
    if kind == "KTO":
        rows: list[dict[str, Any]] = [
            {"prompt": text(prompt), "completion": f" {text(answer)}", "label": good}
            for prompt, answer, good in answers()
        ]
    else:
        rows = [
            {"prompt": text(prompt), "chosen": f" {text(chosen)}", "rejected": f" {text(rejected)}"}
            for prompt, chosen, rejected in pairs()
        ]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    trainer = make(
        model=make_base(scratch / "base"),
        args=make_config(**{**options, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        peft_config=lora,
    )
    draw_weights(trainer.model)
    return trainer


def write() -> None:
    golden: dict[str, Tensor] = {}
    for case, (_, _, kind, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(kind, settings, Path(scratch))
            compute, losses, seen = trainer.compute_loss, [], []

            def record(model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
                loss = compute(model, inputs, *more, **options)  # noqa: B023
                losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())  # noqa: B023
                names = [n for n in ("input_ids", "chosen_input_ids", "rejected_input_ids") if n in inputs]
                seen.extend([n for n in row.tolist() if n != PAD] for name in names for row in inputs[name])  # noqa: B023
                return loss

            trainer.compute_loss = record
            trainer.train()
            if kind == "KTO":
                expected = [[*prompt, *answer] for prompt, answer, _ in answers()]
            else:
                expected = [[*prompt, *answer] for prompt, *both in pairs() for answer in both]
            assert seen == expected, f"{case}: TRL trained on other tokens: {seen}"
            golden[f"{case}.losses"] = torch.stack(losses).reshape(2, -1).mean(1)  # of each step
            for name, p in trainer.model.named_parameters():
                if p.requires_grad:
                    short = name.removeprefix("base_model.model.").replace(".default", "")
                    golden[f"{case}.{short}"] = p.detach().clone()
    save_file(golden, FILE)
    print(f"{FILE}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    write()
