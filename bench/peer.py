"""The peer: the same optimizer step with transformers + peft, as their users train.

    python bench/peer.py --nf4 1 --ckpt 0 --seq 1024 --bs 2      prints one line of JSON

What a Trainer does, without its bookkeeping: autocast to bfloat16, float32 adapters, SDPA attention, logits of every
position, fused AdamW, gradients clipped to 1. Conversations of different lengths are padded on the right in batches of
`--micro`, with an attention mask; their losses are summed and divided by the target tokens of the whole step. Weights
and tokens are those of bench/contender.py.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from contender import (
    ALL_LINEAR,
    ALPHA,
    IGNORE,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Text,
    hf_config,
    print_result,
    random_weight,
)
from contender import measure as measure_steps
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM
from transformers.utils import logging


def build_base(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    dtype = getattr(torch, args.dtype)
    shape = {key: value for key, value in hf_config(args).items() if key not in ("architectures", "model_type")}
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = MistralForCausalLM(MistralConfig(**shape, attn_implementation="sdpa"))
        torch.set_default_dtype(torch.float32)
    draw_weights(args, dict(model.named_parameters()))
    if args.nf4:
        quantize(model, dtype, device)
    model.config.use_cache = False
    if args.ckpt:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def lora_config(args: argparse.Namespace) -> LoraConfig:
    return LoraConfig(
        r=args.r, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM"
    )


def build(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Base and adapters."""
    adapted = get_peft_model(build_base(args, device), lora_config(args))  # adapters are float32 whatever the base is
    draw_weights(args, {name.replace(".default", ""): p for name, p in adapted.named_parameters() if p.requires_grad})
    return adapted.train()


@torch.no_grad()
def draw_weights(args: argparse.Namespace, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Fill parameters with the random values of their names, one at a time."""
    for name, parameter in parameters.items():
        parameter.copy_(random_weight(args, name, parameter.shape, parameter.device))


def quantize(model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every linear of the blocks by bitsandbytes' 4-bit linear, with double quantization."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            packed.weight = Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, packed.to(device))


def pad(texts: list[Text], device: torch.device) -> dict[str, torch.Tensor]:
    """Input ids, labels and, if there is padding, its mask, each (batch, seq)."""
    width = max(len(text.ids) for text in texts)
    ids = torch.zeros((len(texts), width), dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.from_numpy(text.ids)
        labels[row, : len(text.ids)] = torch.from_numpy(text.labels)
        mask[row, : len(text.ids)] = 1
    batch = {"input_ids": ids, "labels": labels}
    if not mask.all():
        batch["attention_mask"] = mask
    return {name: tensor.to(device) for name, tensor in batch.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return train_steps(args, build(args, device), device)


def train_steps(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    """Time the steps of a causal model whose `forward` takes labels, as in transformers."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def to_batches(texts: list[Text]) -> list[dict[str, torch.Tensor]]:
        size = args.micro if args.packed else args.bs
        return [pad(texts[at : at + size], device) for at in range(0, len(texts), size)]

    def train(batches: list[dict[str, torch.Tensor]]) -> tuple[Any, Any]:
        optimizer.zero_grad()
        # one batch: the mean over its targets; several: the sum over the targets of all, as in the Trainer
        targets = sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in batches) if len(batches) > 1 else None
        total = torch.zeros((), device=device)
        for batch in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model(**batch, num_items_in_batch=targets).loss
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        return total, norm

    return measure_steps(args, device, to_batches, train)


if __name__ == "__main__":
    print_result(run, __doc__)
