"""Adapters for tests: every variant of LoRA with nonzero weights, as modules of nanoft and of PEFT and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from nanoft.config import LoRAConfig
from nanoft.lora import LoRALinear, inject_lora
from nanoft.model import Decoder
from nanoft.models.adapter_files import save_adapter
from nanoft.models.weights import load_model

CPU = torch.device("cpu")
IDS = torch.randint(0, 199, (2, 24), generator=torch.Generator().manual_seed(3))
PLAIN = LoRAConfig(rank=8, alpha=20.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora-fa": {"freeze_a": True},
    "pissa": {"init": "pissa"},
    "bias": {"bias": "lora_only"},
    "patterns": {
        "rank_pattern": {"self_attn.q_proj": 4, r"layers\.1\..*|v_proj": 2, ".*": 6},
        "alpha_pattern": {"down_proj": 3.0, "model.layers.0.mlp.up_proj": 40},
    },
    "together": {"rslora": True, "dora": True, "bias": "all", "rank_pattern": {"v_proj": 3}, "freeze_a": True},
    "pissa-dora": {"rslora": True, "dora": True, "init": "pissa", "alpha_pattern": {"q_proj": 5.0}},
}
LORA = LoRAConfig(rank=4, alpha=6.0)
MERGE_VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.*": 3.0}},
    "dora": {"dora": True, "bias": "lora_only"},
    "pissa": {"init": "pissa"},
    "pissa-dora": {"init": "pissa", "dora": True, "rslora": True, "bias": "all"},
}


def variant(name: str, **changes: Any) -> LoRAConfig:
    return LoRAConfig(**{"rank": 8, "alpha": 20.0, **VARIANTS[name], **changes})


def adapted(
    base: Path, lora: LoRAConfig = PLAIN, quantization: Any = None, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, dict[str, LoRALinear]]:
    model = load_model(base, CPU, dtype, quantization)
    return model, inject_lora(model, lora, seed=1)


def randomize(adapters: dict[str, LoRALinear]) -> None:
    """Set all trained parameters to random values, as after training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters.values():
            for p in adapter.parameters():
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=generator)
                    p.add_(noise * 0.1 if p.dim() == 2 else p * noise * 0.2)


def peft_model(base: Path, lora: LoRAConfig = PLAIN) -> PeftModel:
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear",
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias=lora.bias,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        init_lora_weights="pissa" if lora.init == "pissa" else True,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(reference, settings)


def peft_name(name: str) -> str:
    """PEFT's name in memory for a tensor of an adapter file."""
    for part in ("lora_A", "lora_B"):
        name = name.replace(f"{part}.weight", f"{part}.default.weight")
    return name.replace("lora_magnitude_vector", "lora_magnitude_vector.default.weight")


def randomize_b(adapters: dict[str, LoRALinear], std: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) * std)
            for vector in (adapter.lora_magnitude_vector, adapter.bias):
                if vector is not None:
                    vector.mul_(1 + torch.randn(vector.shape, generator=generator) * std)


def make_adapter(base: Path, out: Path, std: float = 0.1, lora: LoRAConfig = LORA, **note: Any) -> Path:
    """An adapter with random values on every linear, as training saves it."""
    model = load_model(base, CPU, torch.float32)
    adapters = inject_lora(model, lora, seed=1)
    randomize_b(adapters, std)
    save_adapter(out, model, adapters, lora, str(base), note)
    return out
