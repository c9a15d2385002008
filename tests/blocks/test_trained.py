"""Saved modules, rows of tokens, adapters of embedding and head: one step against PEFT's, files both ways, merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CPU, IDS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import merge
from nanoft import UserError
from nanoft.loss import token_nll
from nanoft.models.adapter_files import read_adapter, save_adapter
from nanoft.models.open import LoadedModel, open_model
from tiny_models import make_chat_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*(tie|embedding|rank_p)"),
]
TARGETS = torch.tensor([b * 24 + s for b in range(2) for s in range(23)])
CASES: dict[str, dict[str, Any]] = {
    "two layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded names": {"target_modules": "all-linear", "exclude_modules": ["v_proj", "model.layers.1.mlp.up_proj"]},
    "excluded expression": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    "idle patterns": {"target_modules": ["q_proj"], "rank_pattern": {"no": 3, "q_proj": 5}, "alpha_pattern": {"no": 2}},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head and embedding": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "mlp": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_rslora": True},
    "dora on the head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "rows of the embedding": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 5]},
    "rows of both": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [9]}},
}


def make_base(directory: Path, case: str = "llama-bias", seed: int = 0) -> None:
    make_chat_model(directory, case, seed, num_hidden_layers=3)


@pytest.fixture(scope="module", params=["llama-bias", "llama-tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / request.param
    make_base(directory, request.param)
    return directory


def theirs_of(base: Path, out: Path, **settings: Any) -> PeftModel:
    """An adapter made by PEFT, with random values, saved and opened again for training."""
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_peft_model(reference, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(out)
    return reopened(base, out)


def reopened(base: Path, directory: Path) -> PeftModel:
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    return PeftModel.from_pretrained(reference, directory, is_trainable=True)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    model.eval()
    found: Tensor = model(IDS).logits if isinstance(model, PeftModel) else model.logits(model(IDS))
    return found


def squares(parameters: Any) -> dict[tuple[int, ...], float]:
    """The sum of squared gradients of the parameters of each shape: names differ between the libraries."""
    found: dict[tuple[int, ...], float] = {}
    for p in parameters:
        if p.requires_grad and p.grad is not None:
            found[tuple(p.shape)] = found.get(tuple(p.shape), 0.0) + p.grad.double().square().sum().item()
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_and_the_files_are_pefts(name: str, base: Path, tmp_path: Path) -> None:
    if (name, base.name) == ("rows of both", "llama-tied"):
        pytest.skip("a tied head has no separate rows")
    theirs = theirs_of(base, tmp_path / "theirs", **CASES[name])
    expected = theirs(input_ids=IDS, labels=IDS).loss
    expected.backward()
    ours = open_model(str(tmp_path / "theirs"), CPU, torch.float32)
    ours.model.train()
    loss = token_nll(ours.model(IDS, target_positions=TARGETS), ours.model.head, IDS[:, 1:].flatten()).mean()
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-5
    assert squares(ours.model.parameters()) == pytest.approx(squares(theirs.parameters()), rel=1e-3)
    assert (logits(ours.model) - logits(theirs)).abs().max() < 1e-4
    lora = read_adapter(tmp_path / "theirs")[0]
    save_adapter(tmp_path / "ours", ours.model, ours.adapters, lora, str(base), {})
    assert (logits(reopened(base, tmp_path / "ours")) - logits(theirs)).abs().max() < 1e-5
    assert merge.main([str(tmp_path / "theirs"), "--out", str(tmp_path / "merged"), "--parity-tokens", "0"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.no_grad():
        assert (merged(IDS).logits - logits(theirs)).abs().max() < 1e-4


# How other tools name the tensors of an adapter: `.default`, no prefix, wrappers, the text model of a larger one.
RENAMED = {
    "the adapter's name": lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    "no prefix": lambda n: n.removeprefix("base_model.model."),
    "no model": lambda n: n.removeprefix("base_model.model.").removeprefix("model."),
    "FSDP": lambda n: n.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "torch.compile": lambda n: n.replace("base_model.", "_orig_mod.base_model.", 1),
    "DDP": lambda n: f"module.{n}",
    "a text model": lambda n: n.replace("model.model.", "model.model.language_model."),
    "an outer text model": lambda n: n.replace("base_model.model.", "base_model.model.language_model."),
    "a saved module": lambda n: n.replace("lm_head.weight", "lm_head.modules_to_save.default.weight"),
}  # fmt: skip


def rename(directory: Path, new_name: Any) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = {new_name(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("who", RENAMED)
def test_names_of_other_tools_are_understood(who: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    theirs = theirs_of(tmp_path / "base", tmp_path / "adapter", **settings)
    before = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    rename(tmp_path / "adapter", RENAMED[who])
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) != before
    opened = open_model(str(tmp_path / "adapter"), CPU, torch.float32)
    assert (logits(opened.model) - logits(theirs)).abs().max() < 1e-4


def test_a_tensor_that_has_two_names_is_refused(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    theirs_of(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, **{n.replace(".lora_A.", ".lora_A.other."): t + 1 for n, t in tensors.items()}}, path)
    with pytest.raises(UserError, match=r"a second tensor for .*lora_A.weight: save a single adapter"):
        read_adapter(tmp_path / "adapter")


def test_a_vocabulary_that_was_resized_for_the_adapter_is_resized_here(tmp_path: Path) -> None:
    """As after adding two tokens: `modules_to_save` has more rows than the base."""
    make_base(tmp_path / "base")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    reference.resize_token_embeddings(340, mean_resizing=False)
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    theirs = get_peft_model(reference, saved)
    theirs.save_pretrained(tmp_path / "adapter")
    opened: LoadedModel = open_model(str(tmp_path / "adapter"), CPU, torch.float32)
    ids = torch.tensor([[3, 339, 5, 338]])
    with torch.no_grad():
        found, expected = opened.model.logits(opened.model(ids)), theirs.eval()(ids).logits
    assert found.shape == (1, 4, 340)
    assert (found - expected).abs().max() < 1e-4
    assert merge.main([str(tmp_path / "adapter"), "--out", str(tmp_path / "merged"), "--parity-tokens", "0"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    with torch.no_grad():
        assert (merged(ids).logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["score"]}, "modules_to_save: 'score' has no tensors"),
        ({"target_modules": ["embed_tokens"]}, {}, r"embed_tokens.base_layer.weight differs from the base: merge it"),
        ({}, {"ensure_weight_tying": True}, "ensure_weight_tying: True is not supported"),
        (
            {"trainable_token_indices": [3]},
            {"trainable_token_indices": [3, 4]},
            r"trainable_tokens_delta: \(1, 32\) torch.float32, but \(2, 32\)",
        ),
        ({"trainable_token_indices": [3]}, {"trainable_token_indices": [10**9]}, "trainable_token_indices: 1000000000"),
        ({"trainable_token_indices": [3]}, {"trainable_token_indices": ["x"]}, "trainable_token_indices: .*'x'"),
    ],
)
def test_what_does_not_fit_is_refused(settings: Any, change: Any, message: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    theirs_of(tmp_path / "base", tmp_path / "adapter", **{"target_modules": ["q_proj"], **settings})
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    if not change:  # another base
        make_base(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / "adapter"), CPU, torch.float32)
