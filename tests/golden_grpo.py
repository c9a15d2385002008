"""Write golden_grpo.safetensors: losses and gradients of TRL's GRPOTrainer on given answers, and their probabilities.

    pip install trl==1.16.0
    python tests/golden_grpo.py

The model is the one of golden_preference.py. The loss is taken with the adapter that has sampled, and with a later one
(LATER), where ratios differ from 1. The reference is the model without adapter. TRL's own KL has no ratio in its
gradient unless `use_bias_correction_kl` is set, as it is here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import golden_preference as golden
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

FILE = Path(__file__).with_suffix(".safetensors")
GROUP, LIMIT = 4, 7  # answers to each prompt, tokens of an answer
REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [2.0, -1.0, 0.25, 0.0]]  # of each prompt's answers
LATER = 0.3  # how far the later adapter is from the one that has sampled
KL = {"beta": 0.3, "use_bias_correction_kl": True}
# Settings of `rl` -> those of GRPOConfig.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({}, {}),
    "grpo": ({"loss_normalization": "grpo"}, {"loss_type": "grpo"}),
    "dr_grpo": (
        {"loss_normalization": "dr_grpo", "advantage_scale": "none"},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "clip": ({"clip_low": 0.05, "clip_high": 0.28}, {"epsilon": 0.05, "epsilon_high": 0.28}),
    "kl": ({"beta": 0.3}, KL),
    "kl, grpo": ({"beta": 0.3, "loss_normalization": "grpo"}, {**KL, "loss_type": "grpo"}),
    "sequence": ({"ratio": "sequence"}, {"importance_sampling_level": "sequence"}),
    "sequence, kl": ({"ratio": "sequence", "beta": 0.3}, {**KL, "importance_sampling_level": "sequence"}),
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "masked": ({"mask_truncated": True}, {"mask_truncated_completions": True}),
    "masked, grpo": (
        {"mask_truncated": True, "loss_normalization": "grpo"},
        {"mask_truncated_completions": True, "loss_type": "grpo"},
    ),
}


def answers() -> list[tuple[list[int], list[int], bool]]:
    """Prompt, answer, and whether the model ended it; lengths differ."""
    chance, made = np.random.default_rng(7), []
    for n in range(len(REWARDS)):
        prompt = chance.integers(2, golden.VOCAB, 3 + n).tolist()
        for length in chance.permutation([2, 4, LIMIT, LIMIT])[:GROUP].tolist():
            stopped = length < LIMIT
            ids = chance.integers(2, golden.VOCAB, length).tolist()
            made.append((prompt, [*ids[:-1], golden.END] if stopped else ids, stopped))
    return made


def later_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    return golden.random_weight(name, shape) + LATER * golden.random_weight(f"{name}, later", shape)


def advantages(scale: str) -> Tensor:
    rewards = torch.tensor(REWARDS)
    centered = rewards - rewards.mean(1, keepdim=True)
    return (centered if scale == "none" else centered / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def padded(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    """(ids, mask), each (rows, longest)."""
    width = max(map(len, rows))
    ids = [[golden.PAD] * (width - len(r)) + r if left else r + [golden.PAD] * (width - len(r)) for r in rows]
    seen = [[0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in rows]
    return torch.tensor(ids), torch.tensor(seen)


def make_trainer(settings: dict[str, Any], scratch: Path) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    options: dict[str, Any] = {
        "per_device_train_batch_size": len(REWARDS) * GROUP,
        "num_generations": GROUP,
        "max_completion_length": LIMIT,
        "beta": 0.0,
        "loss_type": "dapo",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": str(scratch / "trl"),
    }
    lora = LoraConfig(
        r=golden.RANK, lora_alpha=golden.ALPHA, target_modules=list(golden.TARGETS), task_type="CAUSAL_LM"
    )
    trainer = GRPOTrainer(
        model=golden.make_base(scratch / "base"),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(**{**options, **settings}),
        train_dataset=Dataset.from_list([{"prompt": golden.text(p)} for p, *_ in answers()[::GROUP]]),
        processing_class=golden.make_tokenizer(),
        peft_config=lora,
    )
    golden.draw_weights(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def write() -> None:
    found: dict[str, Tensor] = {}
    prompt_ids, prompt_mask = padded([prompt for prompt, *_ in answers()], left=True)
    ids, every = padded([answer for _, answer, _ in answers()], left=False)
    for case, (_, settings) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(settings, Path(scratch))
            model = trainer.model
            mask = every.clone()
            if trainer.mask_truncated_completions:
                mask[[not stopped for *_, stopped in answers()]] = 0
            inputs = {
                "prompt_ids": prompt_ids,
                "prompt_mask": prompt_mask,
                "completion_ids": ids,
                "completion_mask": mask,
                "advantages": advantages(settings.get("scale_rewards", "group")),
                "num_items_in_batch": mask.sum(),
            }

            def logps() -> Tensor:
                every_id, seen = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, every], 1)
                with torch.no_grad():
                    return trainer._get_per_token_logps_and_entropies(model, every_id, seen, ids.shape[1])[0]  # noqa: B023

            inputs["old_per_token_logps"] = logps()
            with model.disable_adapter():
                inputs["ref_per_token_logps"] = logps()
            found[f"{case}.logps"] = inputs["old_per_token_logps"][every.bool()]
            for when in ("first", "later"):
                if when == "later":
                    for name, p in model.named_parameters():
                        if p.requires_grad:
                            p.data.copy_(later_weight(name.replace(".default", ""), p.shape))
                model.zero_grad()
                loss = trainer._compute_loss(model, inputs)
                loss.backward()
                found[f"{case}.{when}.loss"] = loss.detach()
                grads = [p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None]
                found[f"{case}.{when}.gradient"] = torch.cat(grads)
            for name in ("low", "high"):
                found[f"{case}.clip_ratio/{name}"] = torch.tensor(trainer._metrics["train"][f"clip_ratio/{name}_mean"])
            if trainer.beta:
                found[f"{case}.kl"] = torch.tensor(trainer._metrics["train"]["kl"])
    save_file(found, FILE)
    print(f"{FILE}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    write()
