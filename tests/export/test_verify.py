"""Tests of nanoft/export/verify.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from adapters import LORA, MERGE_VARIANTS, make_adapter, randomize_b
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanoft import UserError
from nanoft.config import LoRAConfig
from nanoft.export.merge import merge
from nanoft.export.verify import TOLERANCE, verify_merge
from nanoft.lora import LoRALinear, inject_lora
from nanoft.models.adapter_files import PEFT_PREFIX
from nanoft.models.open import LoadedModel, open_model
from nanoft.models.weights import load_model
from tiny_models import make_chat_model

RANK, ALPHA = LORA.rank, LORA.alpha

CPU = torch.device("cpu")


IDS = torch.arange(5, 60)[None]


PROMPTS = [list(range(5, 60)), list(range(300, 320))]


UP = "model.layers.1.mlp.up_proj"


def make(
    root: Path, case: str = "mistral", original_base: bool = False, lora: LoRAConfig = LORA, **note: Any
) -> LoadedModel:
    """Base and adapter, opened as merge.py opens them."""
    make_chat_model(root / "base", case)
    return reopen(make_adapter(root / "base", root / "adapter", lora=lora, **note), original_base)


def reopen(adapter: Path, original_base: bool = False) -> LoadedModel:
    return open_model(str(adapter), CPU, torch.float32, original_base)


def merged(
    opened: LoadedModel, out: Path, dtype: torch.dtype = torch.float32, onto: Any = "original", **settings: Any
) -> Path:
    out.mkdir()
    merge(opened, dtype, onto, out, **settings)
    return out


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, through its index if it has one."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {name: load_file(directory / name) for name in set(weight_map.values())}
    assert sum(len(shard) for shard in shards.values()) == len(weight_map)
    return {name: shards[file][name] for name, file in weight_map.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits if hasattr(model, "generate") else model.logits(model(IDS))
    return result


@pytest.mark.parametrize("variant", MERGE_VARIANTS)
def test_variations_of_lora_merge_as_in_peft(variant: str, tmp_path: Path) -> None:
    opened = make(tmp_path, "llama-bias", lora=replace(LORA, **MERGE_VARIANTS[variant]))
    out = merged(opened, tmp_path / "out")
    ours, plain = tensors_of(out), AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-5, name
        trained = (
            name.startswith("model.layers.")
            and "proj" in name
            and ("weight" in name or "bias" in MERGE_VARIANTS[variant])
        )
        assert torch.equal(tensor, before[name]) != trained, name
    proof = verify_merge(opened, out, PROMPTS, torch.float32)
    assert proof.holds
    assert proof.effect > 100 * proof.allowed


@pytest.mark.parametrize("variant", MERGE_VARIANTS)
def test_variations_of_lora_merge_onto_nf4(variant: str, tmp_path: Path) -> None:
    lora = replace(LORA, **MERGE_VARIANTS[variant])
    opened = make(tmp_path, "llama-bias", lora=lora, quantization={"type": "nf4", "double": True}, dtype="float32")
    assert verify_merge(opened, merged(opened, tmp_path / "out", onto="nf4"), PROMPTS, torch.float32).holds
    original = reopen(tmp_path / "adapter", original_base=True)
    assert verify_merge(original, merged(original, tmp_path / "original"), PROMPTS, torch.float32).holds
    assert not verify_merge(original, tmp_path / "out", PROMPTS, torch.float32).holds


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.bfloat16, 8), (torch.float16, 11)])
def test_a_merged_weight_is_the_exact_sum_rounded_once(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    opened = make(tmp_path)
    out = merged(opened, tmp_path / "out", dtype)
    base, adapter = (
        load_file(tmp_path / "base/model.safetensors"),
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    for name, tensor in tensors_of(out).items():
        assert tensor.dtype == dtype
        exact = base[name].double()
        key = PEFT_PREFIX + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" in adapter:
            a, b = adapter[f"{key}.lora_A.weight"].double(), adapter[f"{key}.lora_B.weight"].double()
            exact = exact + ALPHA / RANK * (b @ a)
        half_step = exact.abs() * 2.0**-bits
        allowed = half_step + (exact.abs() + 1) * 2.0**-22 + 2.0**-25  # float32 sums; float16 below its normal range
        assert ((tensor.double() - exact).abs() <= allowed).all(), name
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert verify_merge(opened, out, PROMPTS, dtype).holds


@pytest.mark.parametrize("trained_in", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_onto_nf4_is_the_unpacked_weight_plus_the_change(
    kind: str, double: bool, trained_in: str, tmp_path: Path
) -> None:
    opened = make(tmp_path, quantization={"type": kind, "double": double}, dtype=trained_in)
    out = merged(opened, tmp_path / "out", onto="nf4")
    base, adapter = (
        load_file(tmp_path / "base/model.safetensors"),
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    ours = tensors_of(out)
    for name, tensor in ours.items():
        key = PEFT_PREFIX + name.removesuffix(".weight")
        if f"{key}.lora_A.weight" not in adapter:
            assert torch.equal(tensor, base[name]), name
            continue
        packed, state = bitsandbytes.functional.quantize_4bit(
            base[name].to(getattr(torch, trained_in)), blocksize=64, compress_statistics=double, quant_type=kind
        )
        state.shape = torch.Size((packed.numel() // 32, 64))  # with AVX-512, rows of 32 get the wrong scales
        unpacked = bitsandbytes.functional.dequantize_4bit(packed, state).view(base[name].shape)
        assert unpacked.dtype == getattr(torch, trained_in)
        change = ALPHA / RANK * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
        assert (tensor - (unpacked.float() + change)).abs().max() < 1e-6, name
        assert (tensor - (base[name] + change)).abs().max() > 1e-3, name  # 4 bits are not 32
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (logits(theirs) - logits(opened.model)).abs().max() < 1e-4  # the model that was trained
    assert verify_merge(opened, out, PROMPTS, torch.float32).holds
    original = reopen(tmp_path / "adapter", original_base=True)
    assert not verify_merge(original, out, PROMPTS, torch.float32).holds


# --- the proof


def change_weight(directory: Path, name: str, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


WRONG = {
    "one missing change": (f"{UP}.weight", None),
    "a swapped sign": (f"{UP}.weight", torch.neg),
    "rows in another order": ("model.layers.0.self_attn.q_proj.weight", lambda w: w.flip(0)),
    "a scaled head": ("lm_head.weight", lambda w: w * 1.2),
    "a norm left out": ("model.norm.weight", torch.ones_like),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fault", WRONG)
def test_the_proof_fails_when_a_weight_is_wrong(fault: str, dtype: torch.dtype, tmp_path: Path) -> None:
    opened = make(tmp_path)
    out = merged(opened, tmp_path / "out", dtype)
    good = verify_merge(opened, out, PROMPTS, dtype)
    assert good.holds
    name, change = WRONG[fault]
    base = load_file(tmp_path / "base/model.safetensors")
    change_weight(out, name, change or (lambda w: base[name].to(w.dtype)))
    bad = verify_merge(opened, out, PROMPTS, dtype)
    assert not bad.holds
    assert bad.max_difference > 2 * good.max_difference
    assert bad.allowed == good.allowed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    opened = make(tmp_path)
    out = merged(opened, tmp_path / "out")
    change_weight(out, f"{UP}.weight", lambda w: w.index_fill(0, torch.tensor([3]), value))
    with pytest.raises(UserError, match=rf"model.safetensors: {UP}.weight contains NaN or infinity"):
        verify_merge(opened, out, PROMPTS, torch.float32)


def test_what_is_allowed_scales_with_the_logits_and_the_effect_is_the_adapters(tmp_path: Path) -> None:
    opened = make(tmp_path)
    out = merged(opened, tmp_path / "out")
    proof = verify_merge(opened, out, [IDS[0].tolist()], torch.float32)
    with torch.no_grad():
        base = logits(load_model(tmp_path / "base", CPU, torch.float32))
        tuned = logits(opened.model)
    assert proof.effect == pytest.approx((tuned - base).abs().max().item(), rel=1e-4)
    assert proof.allowed == pytest.approx(1e-4 * tuned.std().item(), rel=1e-4)
    assert proof.same_top_token == 1.0
    assert proof.max_difference < proof.allowed < proof.effect
    assert verify_merge(opened, tmp_path / "base", PROMPTS, torch.float32).same_top_token < 1.0
    assert all(adapter.enabled for adapter in opened.adapters.values())


def test_a_weight_beyond_float16_is_noticed(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    change_weight(tmp_path / "base", f"{UP}.weight", lambda w: w.index_fill(0, torch.tensor([3]), 1e6))
    opened = reopen(make_adapter(tmp_path / "base", tmp_path / "adapter"))
    assert verify_merge(opened, merged(opened, tmp_path / "bf16", torch.bfloat16), PROMPTS, torch.bfloat16).holds
    with pytest.raises(UserError, match=rf"--dtype: f16: values of {UP}.weight overflow float16"):
        merged(opened, tmp_path / "f16", torch.float16)


def tuned(base: Path, std: float = 0.1) -> tuple[Any, dict[str, LoRALinear]]:
    model = load_model(base, CPU, torch.float32)
    adapters = inject_lora(model, LORA, seed=1)
    randomize_b(adapters, std)
    return model.eval(), adapters
