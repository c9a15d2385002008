"""Models of several towers, of which nanoft trains the text: config, names, adapters, merges."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from templates import STYLES, save
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma4Config,
    Mistral3Config,
    PreTrainedModel,
    Qwen3_5Config,
)

import merge
import train
from nanoft import UserError
from nanoft.lora import inject_lora
from nanoft.models.adapter_files import load_adapter_tensors, read_adapter
from nanoft.models.families import FAMILIES, decoder_config
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import open_model
from nanoft.models.weights import load_model
from tiny_models import SMALL, train_run, write_records

CPU = torch.device("cpu")
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
ROPES = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
ROPES |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
GEMMA3 = {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 6, "rope_parameters": ROPES}
GEMMA4 = {"sliding_window": 8, "global_head_dim": 32, "num_hidden_layers": 6, "num_kv_shared_layers": 3}
GEMMA4 |= {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
GEMMA4 |= {"hidden_size_per_layer_input": 8}
QWEN3_5 = {"layer_types": ["full_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2}
QWEN3_5 |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 4}
# The wrapper's config, its fields, those of text.
CASES: dict[str, tuple[type, dict[str, Any], dict[str, Any]]] = {
    "gemma3_text": (Gemma3Config, {"image_token_index": 60, "mm_tokens_per_image": 4}, GEMMA3),
    "gemma4_text": (Gemma4Config, {"audio_config": None}, GEMMA4),
    "ministral3": (Mistral3Config, {"tie_word_embeddings": True}, {"rope_parameters": YARN}),
    "qwen3_5_text": (Qwen3_5Config, {"tie_word_embeddings": True}, QWEN3_5),
    "mistral": (Mistral3Config, {"tie_word_embeddings": False}, {"sliding_window": None, "rms_norm_eps": 1e-5}),
}
PIXTRAL: dict[str, Any] = {"model_type": "pixtral", "head_dim": 8}
OWN_VISION: dict[str, dict[str, Any]] = {
    "gemma3_text": {"model_type": "siglip_vision_model"},
    "gemma4_text": {
        "model_type": "gemma4_vision",
        "head_dim": 8,
        "num_key_value_heads": 2,
        "position_embedding_size": 9,
    },
    "qwen3_5_text": {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16},
}
IDS = torch.arange(5, 60)[None]


def make_wrapper(kind: str, directory: Path, **changes: Any) -> PreTrainedModel:
    """A random wrapper as transformers saves it, with a tokenizer and chat template."""
    save(directory, STYLES["chatml"])
    vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    (directory / "preprocessor_config.json").write_text('{"image_seq_length": 4}')
    config_class, outer, text = CASES[kind]
    text = {**SMALL, "vocab_size": vocabulary, "head_dim": 16, **text, **changes, "model_type": kind}
    text |= {"vocab_size_per_layer_input": vocabulary} if kind == "gemma4_text" else {}
    torch.manual_seed(0)
    config = config_class(text_config=text, vision_config={**VISION, **OWN_VISION.get(kind, PIXTRAL)}, **outer)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    if kind == "qwen3_5_text":  # layers of its files that transformers does not load
        stored = load_file(directory / "model.safetensors") | {"mtp.fc.weight": torch.randn(4, 8)}
        save_file(stored, directory / "model.safetensors", {"format": "pt"})
    return model


EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 64}
EXPERTS |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True}


@pytest.fixture(scope="module", params=CASES)
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, data and a finished run."""
    root = tmp_path_factory.mktemp(request.param)
    make_wrapper(request.param, root / "base")
    train_run(root / "run", root / "base", write_records(root / "data.jsonl"))
    return root


def opened_by_transformers(directory: Path) -> PreTrainedModel:
    wrapped = ModelFiles.read(directory).decoder.wrapped
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    return auto.from_pretrained(directory, attn_implementation="eager")


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def ours(model: Any) -> Tensor:
    return model.logits(model(IDS))


TOWERS = ("vision_tower", "projector", "visual", "mtp", "embed_vision")


def vision(directory: Path) -> dict[str, Tensor]:
    stored = load_file(directory / "model.safetensors")
    return {name: tensor for name, tensor in stored.items() if any(part in name for part in TOWERS)}


def with_names(base: Path, out: Path) -> Path:
    """The same model with the prefixes of transformers' modules in its file."""
    shutil.copytree(base, out)
    stored = load_file(base / "model.safetensors")
    renamed = {
        name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
        if name.startswith(("language_model.", "model.", "mtp."))
        else f"model.{name}": tensor
        for name, tensor in stored.items()
    }
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    return out


# --- Reading


def test_text_logits_equal_those_of_the_wrapper(wrapper: Path, tmp_path: Path) -> None:
    wanted = theirs(opened_by_transformers(wrapper / "base"))
    decoder = load_model(wrapper / "base", CPU, torch.float32)
    assert decoder.config.wrapped
    rounding = 5e-4 if decoder.config.attention_scale == 1 else 1e-4  # unscaled attention magnifies it
    assert (ours(decoder) - wanted).abs().max() < rounding * wanted.std()
    other = load_model(with_names(wrapper / "base", tmp_path / "base"), CPU, torch.float32)
    assert torch.equal(ours(other), ours(decoder))


def test_gemma3_of_the_hub_leaves_fields_to_the_defaults_of_its_class() -> None:
    """The text_config of 4B as it was published, and what transformers makes of it."""
    rope = {"factor": 8.0, "rope_type": "linear"}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": rope, "sliding_window": 1024}
    fields = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    full = Gemma3Config(text_config=dict(text)).to_dict()
    full["architectures"] = fields["architectures"]
    short, long = decoder_config(fields), decoder_config(full)
    assert (short.num_heads, short.num_kv_heads, short.head_dim, short.vocab_size) == (8, 4, 256, 262_208)
    assert (short.tied, short.windows, short.norm_eps) == (True, long.windows, long.norm_eps)
    for a, b in zip(short.distinct_ropes, long.distinct_ropes, strict=True):
        assert torch.equal(a.angles(256)[0], b.angles(256)[0])


def test_another_text_tower_is_refused() -> None:
    fields = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral4"}}
    with pytest.raises(UserError, match=r"text_config: model_type: 'mistral4' .* only mistral, ministral3"):
        decoder_config(fields)


def test_the_rope_of_ministral3_must_be_given() -> None:
    text = {**SMALL, "model_type": "ministral3"}
    with pytest.raises(UserError, match="rope_parameters: missing"):
        decoder_config({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text})


# --- Adapters


@pytest.fixture(scope="module")
def adapted(wrapper: Path) -> tuple[Path, Tensor]:
    """The adapter of a run, and its logits."""
    return wrapper / "run" / "adapter", ours(open_model(str(wrapper / "run"), CPU, torch.float32).model)


def test_peft_loads_the_adapter_on_the_wrapper(wrapper: Path, adapted: tuple[Path, Tensor]) -> None:
    names = load_file(adapted[0] / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.model.language_model.") for name in names)
    model = opened_by_transformers(wrapper / "base")
    assert (theirs(model) - adapted[1]).abs().max() > 0.01
    tuned = PeftModel.from_pretrained(model, adapted[0])
    own = {name for name, _ in tuned.named_parameters() if "lora_" in name}
    assert len(own) == len(names)  # none in the other towers
    assert (theirs(tuned) - adapted[1]).abs().max() < 1e-4


def test_ranks_and_scales_of_some_modules_hold_there(wrapper: Path, tmp_path: Path) -> None:
    """Expressions for the names without the wrapper's prefix; with a trained head where it is one of its own."""
    changes: dict[str, Any] = {"lora__rank_pattern": {r"layers\.0\..*q_proj": 2, "model.layers.1.mlp.down_proj": 3}}
    changes |= {
        "lora__alpha_pattern": {r"model\.layers\..*k_proj": 5},
        "lora__target_modules": ["attention", "down_proj"],
    }
    if not ModelFiles.read(wrapper / "base").decoder.tied:
        changes["lora__modules_to_save"] = ["lm_head"]
    run = train_run(tmp_path / "run", wrapper / "base", wrapper / "data.jsonl", training__max_steps=2, **changes)
    model = opened_by_transformers(wrapper / "base")
    before, said = theirs(model), ours(open_model(str(run), CPU, torch.float32).model)
    assert (said - before).abs().max() > 0.01
    assert (theirs(PeftModel.from_pretrained(model, run / "adapter")) - said).abs().max() < 1e-4


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], r".*language_model.*\.(q_proj|down_proj)"])
def test_an_adapter_by_peft_is_loaded(wrapper: Path, targets: Any, tmp_path: Path) -> None:
    """With names alone, PEFT adapts the other towers, too, which text never trains."""
    pattern = {"model.language_model.layers.1.self_attn.q_proj": 2}
    config = LoraConfig(r=4, target_modules=targets, rank_pattern=pattern, alpha_pattern={"layers.0.mlp.down_proj": 3})
    model = opened_by_transformers(wrapper / "base")
    if isinstance(targets, list) and ModelFiles.read(wrapper / "base").decoder.family == "gemma4_text":
        with pytest.raises(ValueError, match="ClippableLinear"):  # of its vision tower
            get_peft_model(model, config)
        return
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "language_model" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    lora, _, tensors, _ = read_adapter(tmp_path)
    decoder = load_model(wrapper / "base", CPU, torch.float32)
    load_adapter_tensors(inject_lora(decoder, lora, seed=0), tensors, "files")
    assert (ours(decoder.eval()) - theirs(model.eval())).abs().max() < 1e-4


def test_an_adapter_trained_on_images_is_refused(wrapper: Path, tmp_path: Path) -> None:
    model = opened_by_transformers(wrapper / "base")
    linears = [
        n for n, module in model.named_modules() if type(module) is torch.nn.Linear and re.search("q_proj|qkv", n)
    ]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=linears))
    torch.nn.init.ones_(next(p for name, p in model.named_parameters() if "lora_B" in name and "vis" in name))
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"vis(ion_tower|ual).*was trained on images"):
        read_adapter(tmp_path)


# --- Merges


@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_a_merged_model_is_the_whole_wrapper(
    wrapper: Path, adapted: tuple[Path, Tensor], shard_size: str, tmp_path: Path
) -> None:
    out, arguments = tmp_path / "merged", ["--dtype", "f32", "--shard-size", shard_size]
    assert merge.main([str(wrapper / "run"), "--out", str(out), *arguments]) == 0
    assert (theirs(opened_by_transformers(out)) - adapted[1]).abs().max() < 1e-4
    assert (ours(load_model(out, CPU, torch.float32)) - adapted[1]).abs().max() < 1e-4
    merged = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    before = load_file(wrapper / "base" / "model.safetensors")
    assert merged.keys() == before.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in vision(wrapper / "base").items())
    config, own = (json.loads((place / "config.json").read_text()) for place in (out, wrapper / "base"))
    assert all(config[name] == own[name] for name in ("architectures", "model_type", "vision_config"))
    assert (out / "preprocessor_config.json").read_bytes() == b'{"image_seq_length": 4}'


def test_a_merge_keeps_the_prefixes_of_its_base(wrapper: Path, adapted: tuple[Path, Tensor], tmp_path: Path) -> None:
    base, out = with_names(wrapper / "base", tmp_path / "base"), tmp_path / "merged"
    arguments = ["--base-model", str(base), "--any-base", "--dtype", "f32"]
    assert merge.main([str(wrapper / "run"), "--out", str(out), *arguments]) == 0
    names = {place: load_file(place / "model.safetensors").keys() for place in (base, out)}
    assert names[base] == names[out]
    assert (theirs(opened_by_transformers(out)) - adapted[1]).abs().max() < 1e-4


def test_full_training_keeps_the_other_towers(wrapper: Path, tmp_path: Path) -> None:
    changes = {"training__method": "full", "training__learning_rate": 1e-3, "training__max_steps": 2}
    out = train_run(tmp_path / "run", wrapper / "base", wrapper / "data.jsonl", **changes) / "model"
    wanted = vision(wrapper / "base")
    assert vision(out).keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in vision(out).items())
    trained = load_model(out, CPU, torch.float32).double()  # of Gemma 4, transformers' float32 logits are off by 1e-4
    assert (theirs(opened_by_transformers(out).double()) - ours(trained)).abs().max() < 1e-4
    assert (theirs(opened_by_transformers(wrapper / "base").double()) - ours(trained)).abs().max() > 0.01


def test_a_packed_wrapper_is_trained_but_its_other_towers_cannot_be_copied(
    wrapper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(wrapper / "base", tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForImageTextToText.from_pretrained(
        base, quantization_config=settings, attn_implementation="eager", dtype=torch.float32
    )
    packed.save_pretrained(base)
    decoder = load_model(base, CPU, torch.float32)
    assert (ours(decoder) - theirs(packed.train())).abs().max() < 1e-4
    changes = {"training__max_steps": 1, "quantization__bits": 4, "quantization__double": False}
    run = train_run(tmp_path / "run", base, wrapper / "data.jsonl", **changes)
    assert merge.main([str(run), "--out", str(tmp_path / "merged")]) == 2
    assert "is quantized (U8): name the original model" in capsys.readouterr().err


def test_the_plan_names_the_text_tower(wrapper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(wrapper / "run.json"), "--plan"]) == 0
    fields = json.loads((wrapper / "base" / "config.json").read_text())
    said = " ".join(capsys.readouterr().out.split())
    assert f"{fields['text_config']['model_type']}, the text of {fields['architectures'][0]}, " in said


def test_a_reward_model_of_a_text_tower_is_refused(wrapper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(wrapper / "run.json"), "training.objective=reward", "--plan"]) == 2
    assert "training.objective: a reward model cannot be a text tower" in capsys.readouterr().err


def test_gguf_is_what_the_text_family_says(wrapper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, family = tmp_path / "out", ModelFiles.read(wrapper / "base").decoder.family
    code = merge.main([str(wrapper / "run"), "--format", "gguf", "--dtype", "f32", "--out", str(out)])
    assert (code, out.exists()) == ((2, False) if FAMILIES[family].gguf is None else (0, True)), capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mlx", "peft"])
def test_names_in_other_formats(wrapper: Path, kind: str, tmp_path: Path) -> None:
    """mlx-lm calls the text tower language_model, and ignores tensors of other names."""
    assert merge.main([str(wrapper / "run"), "--format", kind, "--out", str(tmp_path / "out")]) == 0
    files = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    prefix = {"mlx": "language_model.model.", "peft": "base_model.model.model.language_model."}[kind]
    assert all(name.startswith(prefix) for name in files[0])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModelForCausalLM" not in card


@pytest.mark.parametrize("method", ["fp8", "awq"])
def test_weights_quantized_otherwise_are_refused_before_they_are_read(method: str, tmp_path: Path) -> None:
    make_wrapper("ministral3", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=r"only bitsandbytes and MXFP4 are supported: .* in FP8 its twin, with -BF16"):
        load_model(tmp_path, CPU, torch.float32)


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT applies rank_pattern to parameters
def test_experts_of_a_wrapper_go_to_peft_and_into_a_merged_model(tmp_path: Path) -> None:
    model = make_wrapper("gemma4_text", tmp_path / "base", **EXPERTS)
    before = theirs(model)
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    tuned = ours(open_model(str(adapter), CPU, torch.float32).model)
    assert (tuned - before).abs().max() > 0.5
    assert (theirs(PeftModel.from_pretrained(model, adapter).eval()) - tuned).abs().max() < 1e-4
    assert merge.main([str(adapter), "--out", str(tmp_path / "out"), "--dtype", "f32"]) == 0
    assert (theirs(opened_by_transformers(tmp_path / "out")) - tuned).abs().max() < 1e-4
    assert {name: t.shape for name, t in load_file(tmp_path / "out" / "model.safetensors").items()} == {
        name: t.shape for name, t in load_file(tmp_path / "base" / "model.safetensors").items()
    }
