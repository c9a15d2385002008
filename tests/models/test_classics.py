"""GPT-2 and GPT-NeoX in the wild: older files, adapters made by PEFT, a limited number of learned positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CPU
from peft import LoraConfig, get_peft_model
from runs import one_line
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import merge
import train
from nanoft.generation.generate import generate
from nanoft.models.adapter_files import read_adapter, save_adapter
from nanoft.models.families import FAMILIES
from nanoft.models.open import open_model
from nanoft.models.weights import load_model
from tiny_models import train_run, write_records

IDS = torch.randint(3, 199, (2, 40), generator=torch.Generator().manual_seed(3))
CLASSICS = [name for name, family in FAMILIES.items() if family.names and name not in ("qwen3_moe", "gpt_oss")]
OLD_FIELDS = {  # of the Hub's first files
    "gpt2": {"n_ctx": 256, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "tie_word_embeddings": None},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "rope_parameters": None},
}


@torch.no_grad()
@pytest.mark.parametrize("name", OLD_FIELDS)
def test_files_as_the_hub_has_had_them_first(name: str, tmp_path: Path) -> None:
    """Without the trunk's prefix (GPT-2), with causal masks, and with the fields of older versions."""
    theirs, mask = make_family(name, tmp_path), torch.ones(1, 1, 9, 9, dtype=torch.bool)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    fields = {**json.loads(config.read_text()), **OLD_FIELDS[name]}
    config.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(weights).items()}
    place = "h.0.attn.bias" if name == "gpt2" else "gpt_neox.layers.0.attention.bias"
    save_file({**tensors, place: mask}, weights, {"format": "pt"})
    ours = load_model(tmp_path, CPU, torch.float32)
    assert (ours.logits(ours(IDS)) - theirs(IDS).logits).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSICS)
def test_an_adapter_by_peft_with_patterns_and_other_modules(name: str, tmp_path: Path) -> None:
    """Its expressions mean the names of its files, and so does what is saved here again."""
    base = make_family(name, tmp_path / "base")
    linears = {key.rpartition(".")[2] for key, module in base.named_modules() if ".h." in key or ".layers." in key
               if getattr(module, "weight", torch.empty(0)).dim() == 2}  # fmt: skip
    first, *others = sorted(linears)
    table = next(key for key, module in base.named_modules() if isinstance(module, torch.nn.Embedding))
    norm = next(
        key for key, p in base.named_parameters() if p.dim() == 1 and ".0." not in key and "norm" in key + "norm"
    )
    settings: dict[str, Any] = {"rank_pattern": {first: 3}, "alpha_pattern": {rf".*\.1\..*{others[0]}": 9}}
    settings |= {"trainable_token_indices": {table.rpartition(".")[2]: [5, 7]}, "bias": "lora_only"}
    settings["fan_in_fan_out"] = name == "gpt2"
    settings |= {"modules_to_save": [norm.rpartition(".")[0].rpartition(".")[2]], "exclude_modules": [others[-1]]}
    theirs = get_peft_model(base, LoraConfig(r=4, target_modules=[first, *others], task_type="CAUSAL_LM", **settings))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = theirs.eval()(IDS).logits
    theirs.save_pretrained(str(tmp_path / "theirs"))
    change = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    change["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(change))
    opened = open_model(str(tmp_path / "theirs"), CPU, torch.float32)
    assert (opened.model.logits(opened.model(IDS)) - expected).abs().max() < 1e-5
    lora = read_adapter(tmp_path / "theirs")[0]
    save_adapter(tmp_path / "ours", opened.model, opened.adapters, lora, str(tmp_path / "base"), {})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    plain.load_adapter(str(tmp_path / "ours"))
    stored = [load_file(tmp_path / own / "adapter_model.safetensors") for own in ("theirs", "ours")]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


@pytest.mark.parametrize("name", CLASSICS)
def test_pretraining_on_text_gives_a_model_that_transformers_loads(name: str, tmp_path: Path) -> None:
    """From config.json and the tokenizer alone; a file that was not written by transformers may name no dtype."""
    make_family(name, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if "dtype" not in k}))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"line {n} of a text"}) + "\n" for n in range(24)))
    full = {"training__method": "full", "model__random_init": True, "evaluation__prompts": 0}
    run = train_run(tmp_path / "run", tmp_path / "base", tmp_path / "text.jsonl", **full)
    ours = open_model(str(run), CPU, torch.float32).model.eval()
    theirs = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="eager")
    with torch.no_grad():
        assert (ours.logits(ours(IDS)) - theirs(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize("name", OLD_FIELDS)
def test_a_reward_model_gives_the_rewards_of_transformers(name: str, tmp_path: Path) -> None:
    make_family(name, tmp_path / "base")
    pairs = [{"prompt": f"Say {n}", "chosen": f"{n}", "rejected": f"not {n}"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = {"training__objective": "reward", "evaluation__prompts": 0}
    train_run(tmp_path / "run", tmp_path / "base", tmp_path / "pairs.jsonl", **settings)
    assert merge.main([str(tmp_path / "run"), "--out", str(tmp_path / "merged"), "--dtype", "f32"]) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=1).eval()
    ours: Any = open_model(str(tmp_path / "run"), CPU, torch.float32).model.eval()
    assert (ours.score(ours(IDS[:1])[:, -1]) - theirs(IDS[:1]).logits).abs().max() < 1e-5


def test_learned_positions_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Longer samples are refused in one line, answers stop there."""
    make_family("gpt2", tmp_path / "base", max_position_embeddings=48)
    model, prompts = load_model(tmp_path / "base", CPU, torch.float32).eval(), [[5] * 40, [5] * 46, [5] * 49]
    assert [len(answer.ids) for answer in generate(model, prompts, (), 64)] == [9, 3, 0]
    run = train_run(
        tmp_path / "run", tmp_path / "base", write_records(tmp_path / "data.jsonl"), model__max_seq_length=48
    )
    settings = json.loads(run.with_suffix(".json").read_text())
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "Say it", "completion": "again " * 20}) + "\n")
    settings["data"] |= {"train_file": str(tmp_path / "long.jsonl"), "validation_split": 0.0}
    settings["model"]["max_seq_length"] = 256
    run.with_suffix(".json").write_text(json.dumps({**settings, "output": {"dir": str(tmp_path / "other")}}))
    capsys.readouterr()
    assert train.main([str(run.with_suffix(".json"))]) == 2
    said = capsys.readouterr().err
    assert "model.max_seq_length: samples have up to" in said
    assert said.count("\n") == 1
    grpo = ["training.objective=grpo", "rl.reward=max_words:9", "rl.max_new_tokens=40", "rl.prompts=2"]
    grpo += ["training.gradient_accumulation_steps=4", "rl.group_size=4", f"data.train_file={tmp_path / 'short.jsonl'}"]
    (tmp_path / "short.jsonl").write_text("".join(f'{{"prompt": "{n}", "completion": "{n}"}}\n' for n in range(9)))
    assert train.main([str(run.with_suffix(".json")), *grpo]) == 2
    assert "model.max_seq_length: prompts and answers have up to" in one_line(capsys.readouterr().err)
    assert train.main([str(run.with_suffix(".json")), *grpo, "rl.max_new_tokens=8", "training.max_steps=1"]) == 0
