"""LoRA against PEFT: the same initial adapter, batch, loss and gradients; files that load on both sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from models import make_reference
from nanoft import UserError
from nanoft.config import ALL_LINEAR
from nanoft.lora import (
    LoRALinear,
    adapter_tensors,
    disabled,
    inject_lora,
    load_adapter_tensors,
    read_adapter,
    save_adapter,
)
from nanoft.loss import target_nll
from nanoft.model import Decoder
from nanoft.weights import load_model

CPU = torch.device("cpu")
IDS = torch.randint(0, 199, (2, 24), generator=torch.Generator().manual_seed(3))
SETTINGS = {
    "base_model_name_or_path": "base",
    "r": 8,
    "lora_alpha": 20,
    "lora_dropout": 0.0,
    "target_modules": ALL_LINEAR,
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_reference("mistral", tmp_path / "base")
    return tmp_path / "base"


def adapted(
    base: Path, rank: int = 8, alpha: float = 20, quantization: Any = None
) -> tuple[Decoder, dict[str, LoRALinear]]:
    model = load_model(base, CPU, torch.float32, quantization)
    return model, inject_lora(model, ALL_LINEAR, rank, alpha, 0.0, seed=1)


def randomise(adapters: dict[str, LoRALinear]) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=generator) * 0.1)


def peft_model(base: Path) -> PeftModel:
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return get_peft_model(
        reference, LoraConfig(r=8, lora_alpha=20, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
    )


def test_one_step_matches_peft_in_loss_and_every_gradient(base: Path) -> None:
    model, adapters = adapted(base)
    randomise(adapters)
    theirs = peft_model(base)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter_tensors(adapters).items():
            parameters[name.replace(".weight", ".default.weight")].copy_(tensor)

    expected = theirs(input_ids=IDS, labels=IDS).loss
    expected.backward()
    rows = torch.tensor([b * 24 + s for b in range(2) for s in range(23)])
    loss = target_nll(model(IDS), model.head, rows, IDS[:, 1:].flatten()) / len(rows)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    for name, adapter in adapters.items():
        for part in ("lora_A", "lora_B"):
            own, other = getattr(adapter, part).grad, parameters[f"base_model.model.{name}.{part}.default.weight"].grad
            assert own.abs().max() > 1e-6
            assert (own - other).abs().max() < 1e-5, (name, part)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)


@pytest.mark.parametrize("quantization", [None, ("nf4", True)])
def test_a_fresh_adapter_changes_not_one_bit(base: Path, quantization: Any) -> None:
    plain = load_model(base, CPU, torch.float32, quantization)
    model, adapters = adapted(base, quantization=quantization)
    with torch.no_grad():
        assert torch.equal(model.logits(model(IDS)), plain.logits(plain(IDS)))
        randomise(adapters)
        assert not torch.equal(model.logits(model(IDS)), plain.logits(plain(IDS)))
        with disabled(adapters):
            assert torch.equal(model.logits(model(IDS)), plain.logits(plain(IDS)))


def test_only_adapters_train_and_A_is_uniform_in_one_over_root_in(base: Path) -> None:
    model, adapters = adapted(base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapters for part in ("lora_A", "lora_B")}
    assert len(adapters) == 3 * 7
    for adapter in adapters.values():
        bound = adapter.base.in_features**-0.5  # Kaiming uniform with a = sqrt(5)
        assert adapter.lora_A.abs().max() <= bound
        assert adapter.lora_A.abs().max() > 0.9 * bound
        assert not adapter.lora_B.any()


def test_our_file_loads_in_peft(base: Path, tmp_path: Path) -> None:
    model, adapters = adapted(base)
    randomise(adapters)
    save_adapter(tmp_path / "adapter", adapters, SETTINGS, {"step": 3})
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    with torch.no_grad():
        assert (model.logits(model(IDS)) - theirs(IDS).logits).abs().max() < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(ALL_LINEAR)


def test_their_file_loads_in_ours(base: Path, tmp_path: Path) -> None:
    theirs = peft_model(base)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    config, tensors, note = read_adapter(tmp_path / "adapter")
    assert note == {}
    model = load_model(base, CPU, torch.float32)
    adapters = inject_lora(model, tuple(config["target_modules"]), config["r"], config["lora_alpha"], 0.0, 0)
    load_adapter_tensors(adapters, tensors, "theirs")
    with torch.no_grad():
        assert (model.logits(model(IDS)) - theirs(IDS).logits).abs().max() < 1e-5


def test_dropout_acts_on_the_adapter_only_while_training(base: Path) -> None:
    model = load_model(base, CPU, torch.float32)
    adapters = inject_lora(model, ("q_proj",), 8, 20, 0.5, seed=1)
    randomise(adapters)
    layer, x = next(iter(adapters.values())), torch.ones(1, 4, 64)
    model.train()
    assert not torch.equal(layer(x), layer(x))
    model.eval()
    expected = layer.base(x) + 20 / 8 * x @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer.base(x) + x @ layer.delta().T, expected, atol=1e-5)


def test_bfloat16_base_keeps_float32_adapters(base: Path) -> None:
    model = load_model(base, CPU, torch.bfloat16)
    adapters = inject_lora(model, ALL_LINEAR, 8, 16, 0.0, seed=0)
    model(IDS).float().sum().backward()
    for adapter in adapters.values():
        assert adapter.lora_B.dtype == torch.float32
        assert adapter.lora_B.grad is not None
        assert adapter.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("target", ["q_prj", "lm_head", "embed_tokens", "model"])
def test_a_target_that_names_no_linear_is_refused_with_the_names_there_are(base: Path, target: str) -> None:
    model = load_model(base, CPU, torch.float32)
    with pytest.raises(UserError, match=rf"target_modules: '{target}'.*q_proj, k_proj, v_proj"):
        inject_lora(model, ("q_proj", target), 8, 16, 0.0, 0)


def change_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: change_config(p, use_dora=True), "use_dora"),
        (lambda p: change_config(p, bias="all"), "bias"),
        (lambda p: change_config(p, r=None), "field r"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "damaged"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"\0" * 50), "damaged"),
    ],
)
def test_an_adapter_that_is_not_understood_is_refused(base: Path, tmp_path: Path, damage: Any, message: str) -> None:
    _, adapters = adapted(base)
    save_adapter(tmp_path / "adapter", adapters, SETTINGS, {})
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "adapter")


def test_tensors_that_do_not_fit_are_named(base: Path) -> None:
    _model, adapters = adapted(base)
    tensors = adapter_tensors(adapters)
    name = next(iter(tensors))
    with pytest.raises(UserError, match=f"{name} .*missing"):
        load_adapter_tensors(adapters, {k: v for k, v in tensors.items() if k != name}, "x")
    with pytest.raises(UserError, match="unexpected"):
        load_adapter_tensors(adapters, {**tensors, "extra": tensors[name]}, "x")
    with pytest.raises(UserError, match=f"{name} is"):
        load_adapter_tensors(adapters, {**tensors, name: torch.zeros(3, 3)}, "x")
