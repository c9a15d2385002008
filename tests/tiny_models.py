"""Random-weight models of every supported architecture, created and saved by transformers, the reference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from templates import STYLES, save
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

import train
from nanoft.lora import LoRALinear

logging.disable_progress_bar()
torch.set_num_threads(1)  # for models this small, threads only wait for each other

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-bias": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama-linear": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LINEAR}),
    "llama-yarn": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": YARN}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 16}),
    "mistral-head-dim": (MistralConfig, MistralForCausalLM, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3-bias": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "attention_bias": True}),
}


def make_reference(
    case: str, directory: Path, shard_size: str = "5GB", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A transformers model with random weights (biases and norms too), saved in float32."""
    config_class, model_class, extra = CASES[case]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SMALL, **extra, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(4)  # sharper logits: a wrong detail shows
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory, max_shard_size=shard_size)
    return model


def make_chat_model(directory: Path, case: str = "mistral", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A small random model with a byte-level tokenizer and ChatML's template, complete as on the Hub."""
    save(directory, STYLES["chatml"])
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    model = make_reference(case, directory, seed=seed, **{"vocab_size": tokenizer.get_vocab_size(), **sizes, **changes})
    model.generation_config.eos_token_id = tokenizer.token_to_id("<|im_end|>")
    model.generation_config.save_pretrained(directory)
    model.generation_config.eos_token_id = None
    return model


def make_packed(source: Path, out: Path, **settings: Any) -> PreTrainedModel:
    """The model of a directory as transformers and bitsandbytes pack and save it; with its tokenizer, if it has one."""
    quantization = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=quantization, attn_implementation="eager")
    model.save_pretrained(out)
    for file in source.glob("*token*"):
        shutil.copy(file, out)
    return model


def write_records(path: Path, count: int = 24) -> Path:
    """Questions and answers of different lengths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [(f"Say {n} {'and again ' * (n % 4)}please.", f"{n}, {n + 1}" + "!" * (n % 3)) for n in range(count)]
    lines = [json.dumps({"prompt": question, "completion": reply}) for question, reply in turns]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def delta(adapter: LoRALinear) -> torch.Tensor:
    """s B A, the change of the weight (in DoRA, before its rows are scaled), (out, in) float32."""
    a, b = (factor.detach().float() for factor in adapter.factors())
    return adapter.scaling * (b @ a)


def train_run(directory: Path, base: Path, records: Path, **changes: Any) -> Path:
    """A finished run of a few steps, by train.py itself; `section__field=value` changes a setting."""
    settings: dict[str, Any] = {
        "model": {"name": str(base), "dtype": "float32", "max_seq_length": 256},
        "lora": {"rank": 4, "alpha": 8.0},
        "data": {"train_file": str(records), "validation_split": 0.25},
        "training": {
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "eval_steps": 2,
            "save_steps": 2,
            "learning_rate": 0.01,
        },
        "evaluation": {"prompts": 4, "max_new_tokens": 8},
        "logging": {"progress_bar": False, "show_example": False, "plots": "none"},
        "system": {"device": "cpu"},
        "output": {"dir": str(directory)},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        settings.setdefault(section, {})[key] = value
    config = directory.with_name(f"{directory.name}.json")
    config.write_text(json.dumps(settings), encoding="utf-8")
    assert train.main([str(config)]) == 0
    return directory
