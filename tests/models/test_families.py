"""Every family against transformers, from config.json to export: a new entry of FAMILIES is tested by its name."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import LONGROPE, PLAIN, SHAPES, make_family
from transformers import AutoModelForCausalLM

import merge
import train
from nanoft import UserError
from nanoft.models.families import FAMILIES, decoder_config, find_family, with_both_rope_forms
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import open_model
from nanoft.models.weights import load_model
from tiny_models import SMALL, train_run, write_records

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family's name, and a directory with a base, data and a finished run."""
    root = tmp_path_factory.mktemp(request.param)
    make_family(request.param, root / "base")
    train_run(root / "run", root / "base", write_records(root / "data.jsonl"))
    return request.param, root


def test_a_written_config_says_the_same_to_both_versions_and_to_us(family: tuple[str, Path]) -> None:
    """Version 4 of transformers reads the classic form of the rope only, version 5 the current one."""
    name, root = family
    stored = json.loads((root / "base" / "config.json").read_text())
    written = with_both_rope_forms(stored)
    assert find_family(written) == name
    current = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    classic = {key: value for key, value in written.items() if key != "rope_parameters"}
    decoders = [decoder_config(fields) for fields in (stored, written, current, classic)]
    for length in (1, 1000):
        angles = [[rope and rope.angles(d.head_dim, length) for rope in d.ropes] for d in decoders]
        assert all(str(other) == str(angles[0]) for other in angles)  # tensors and factors
    assert len({replace(d, ropes=()) for d in decoders}) == 1
    assert with_both_rope_forms(written) == written


def test_resuming_repeats_the_run_bit_for_bit(family: tuple[str, Path]) -> None:
    _, root = family
    before = load_file(root / "run" / "adapter" / "adapter_model.safetensors")
    checkpoint = root / "run" / "checkpoints" / "step-000002"
    assert train.main([str(root / "run.json"), "--resume", str(checkpoint)]) == 0
    after = load_file(root / "run" / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("option", ["--plan", "--selftest"])
def test_plan_and_self_test_pass(family: tuple[str, Path], option: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, root = family
    assert train.main([str(root / "run.json"), option]) == 0, capsys.readouterr().err


@torch.no_grad()
def test_a_merged_model_says_in_transformers_what_the_adapter_says(
    family: tuple[str, Path], tmp_path: Path, differs: Callable[[str, Any, float], None]
) -> None:
    _, root = family
    assert merge.main([str(root / "run"), "--out", str(tmp_path / "merged"), "--dtype", "f32"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    ours = open_model(str(root / "run" / "adapter"), CPU, torch.float32).model.eval()
    base = load_model(root / "base", CPU, torch.float32)
    for ids in (torch.arange(5, 30)[None], torch.arange(5, 95)[None]):
        expected = ours.logits(ours(ids))
        differs("merged", (expected - theirs(ids).logits).abs().max(), 1e-4)
        assert (expected - base.logits(base(ids))).abs().max() > 1e-3
    stored = [load_file(directory / "model.safetensors") for directory in (root / "base", tmp_path / "merged")]
    assert stored[0].keys() == stored[1].keys()  # fused ones, too


def test_gguf_is_written_and_verified_or_refused_in_one_line(
    family: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, root = family
    out = tmp_path / "out"
    code = merge.main([str(root / "run"), "--format", "gguf", "--dtype", "f32", "--out", str(out)])
    sizes = json.loads((root / "base" / "config.json").read_text())  # one for both in llama.cpp
    is_known = sizes.get("linear_key_head_dim") == sizes.get("linear_value_head_dim")
    assert code == (0 if FAMILIES[name].gguf and is_known else 2)
    assert out.exists() == (code == 0)
    if code:
        assert capsys.readouterr().err.count("\n") == 1


# --- what is refused


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="architectures: FooForCausalLM is not supported: the supported ones are Llama"):
        find_family({"architectures": ["FooForCausalLM"], "model_type": "llama"})
    with pytest.raises(UserError, match="architectures: none is not supported"):
        find_family({})
    assert find_family({"model_type": "qwen3"}) == "qwen3"


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "sliding_window", 16),
        ("llama", "layer_types", ["sliding_attention"]),
        ("mistral", "attention_bias", True),
        ("mistral", "use_sliding_window", True),
        ("qwen2", "mlp_bias", True),
        ("qwen2", "attention_bias", True),
    ],
)
def test_a_field_that_only_another_family_reads_is_refused_unless_it_is_off(
    family: str, field: str, value: object
) -> None:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 8)
    fields = {"model_type": family, "num_hidden_layers": 1, **sizes, "num_attention_heads": 2}
    with pytest.raises(UserError, match=f"{field}: .*unknown field of {family}"):
        decoder_config({**fields, field: value})
    plain = decoder_config(fields)
    assert decoder_config({**fields, field: None if field == "sliding_window" else False}) == plain
    reader = "qwen3" if field != "mlp_bias" else "llama"
    decoder_config({**fields, "model_type": reader, field: value})


def test_the_default_rope_has_no_scaling_in_either_form() -> None:
    small = {name: value for name, value in SMALL.items() if name != "attn_implementation"}
    fields = with_both_rope_forms({**small, "model_type": "llama", "rope_theta": 5e5})
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert fields["rope_scaling"] is None


# --- config.json as people have it


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = torch.arange(3, 103)[None] % 90  # longer than the pre-training context of 64 below


def rewrite_config(directory: Path, **changes: object) -> None:
    """Change fields of config.json; None removes one."""
    stored = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(
        json.dumps({k: v for k, v in stored.items() if v is not None or k not in changes})
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7000.0}},
        {"rope_theta": 500.0, "rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {
            "rope_theta": 500.0,
            "rope_parameters": None,
            "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 7000.0},
        },
        {"rope_theta": 500.0, "rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, "original_max_position_embeddings": 32},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
    ],
)
@torch.no_grad()
def test_every_rope_has_the_angles_of_transformers(fields: dict[str, object], tmp_path: Path) -> None:
    """Where two fields disagree, where one is left out, and beyond the context of pre-training."""
    make_family("llama", tmp_path, max_position_embeddings=64)
    rewrite_config(tmp_path, **fields)
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path, CPU, torch.float32)
    for ids in (LONG[:, :50], LONG, LONG[:, :50]):
        wanted = theirs(ids).logits
        assert (ours.logits(ours(ids)) - wanted).abs().max() < 1e-5 * wanted.std()


@torch.no_grad()
def test_mistral_with_layer_types_has_a_window_in_the_layers_that_slide(tmp_path: Path) -> None:
    make_family("mistral", tmp_path)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    rewrite_config(tmp_path, sliding_window=8, layer_types=kinds)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")  # which takes it as Ministral
    ours = load_model(tmp_path, CPU, torch.float32)
    assert ours.config.windows == (8, None, 8)
    assert (ours.logits(ours(LONG)) - theirs(LONG).logits).abs().max() < 1e-5 * theirs(LONG).logits.std()


HARMLESS = {
    "use_mrope": False, "is_llama_config": True, "rope_interleaved": False, "unsloth_fixed": True,
    "unsloth_version": "2025.1.5", "_attn_implementation_autoset": True, "transformers.js_config": {"dtype": "q4"},
    "neftune_noise_alpha": 5, "max_length": 20, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 1,
    "repetition_penalty": 1.1, "pretraining_tp": 2, "a_switch_of_tomorrow": False,
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_harmless_fields_pass_and_unknown_ones_that_are_on_do_not(name: str, tmp_path: Path) -> None:
    make_family(name, tmp_path)
    silu = json.loads((tmp_path / "config.json").read_text()).get("hidden_act") == "silu"
    rewrite_config(tmp_path, **HARMLESS, **({"hidden_act": "swish"} if silu else {}))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert decoder_config(stored).family == name
    for field in ("a_switch_of_tomorrow", "logit_scale", "use_mrope"):
        with pytest.raises(UserError, match=f"{field}: True: unknown field of {name}"):
            decoder_config({**stored, field: True})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 0}, "rope_theta: 0 is not a positive number"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: 0 is not a positive number"),
        ({"rope_theta": "1e4"}, "rope_theta: '1e4' is not a positive number"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope type dynamic needs the field factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope: full_attention: .* has no effect"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "alpha": 4}}, "rope: alpha: 4 has no effect"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention' is not supported"),
    ],
)
def test_a_rope_or_window_that_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    small = {name: value for name, value in SMALL.items() if name != "attn_implementation"}
    with pytest.raises(UserError, match=message):
        decoder_config({**small, "architectures": ["MistralForCausalLM"], **fields})


CLOSE: list[tuple[str, dict[str, object], str]] = [
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True is not supported"),
    ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation: 'silu' is not supported"),
    ("gemma3_text", {"altup_num_inputs": 4}, "altup_num_inputs: 4: unknown field of gemma3_text"),  # Gemma 3n's
    ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types: 'chunked_attention' is not supported"),
    ("olmo3", {"layer_types": ["linear_attention"] * 3}, "layer_types: 'linear_attention' is not supported"),
    ("olmo3", {"layer_types": ["full_attention"] * 2}, "layer_types: 2 entries: give one for each of the 3 layers"),
    ("olmo2", {"clip_qkv": 8.0}, "clip_qkv: 8.0: unknown field of olmo2"),
    ("olmo2", {"layer_types": ["sliding_attention"] * 3}, "layer_types: .* unknown field of olmo2"),
    ("granite", {"key_multiplier": 2.0}, "key_multiplier: 2.0: unknown field of granite"),
    ("granite", {"num_local_experts": 8}, "num_local_experts: 8: unknown field of granite"),
    ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop: 0.1 is not supported: only 0.0 is"),
    ("phi3", {"partial_rotary_factor": 0.7}, "partial_rotary_factor: 0.7 rotates 11 of 16 dimensions, not pairs"),
    ("phi3", {"partial_rotary_factor": 0.01}, "partial_rotary_factor: 0.01 rotates 0 of 16 dimensions, not pairs"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: 1.5 is not between 0 and 1"),
    (
        "phi3",
        {"rope_scaling": {**LONGROPE, "long_factor": [1.0] * 8}},
        "rope: long_factor: 8 numbers: give one for .* 6",
    ),
    ("phi3", {"rope_scaling": {**LONGROPE, "short_mscale": 1.2}}, "rope: short_mscale: 1.2 has no effect"),
    ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "longrope needs the field short_factor"),
    ("phi3", {"mlp_bias": True}, "mlp_bias: True: unknown field of phi3"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers: 2 entries: give one for each of the 3 layers"),
    ("seed_oss", {"residual_dropout": 0.1}, "residual_dropout: 0.1 is not supported: only 0.0 is"),
    ("seed_oss", {"attention_dropout": 0.1}, "attention_dropout: 0.1 is not supported: only 0.0 is"),
    # values that would fail, or compute something else, only when the model runs
    ("llama", {"intermediate_size": None}, "intermediate_size: None is not a whole number"),
    ("llama", {"architectures": "LlamaForCausalLM"}, "architectures: 'LlamaForCausalLM' is not a list of names"),
    ("llama", {"architectures": [7]}, "architectures: .7. is not a list of names"),
    ("llama", {"rope_parameters": [1, 2]}, "rope_parameters: .1, 2. is not an object with a"),
    ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope type .'yarn'. is not supported"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is neither true nor false"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads: 4 is not a multiple of num_key_value_heads, 3"),
    ("llama", {"head_dim": 7}, "head_dim: 7 is not even"),
    ("mistral", {"sliding_window": -4}, "sliding_window: -4 is not a number of tokens"),
    ("qwen3", {"layer_types": [["x"]] * 3}, "layer_types: .'x'. is not supported"),
    ("gemma2", {"query_pre_attn_scalar": -3}, "query_pre_attn_scalar: -3 is not a positive number"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping: -1.0 is not a positive number"),
    ("gemma2", {"final_logit_softcapping": "x"}, "final_logit_softcapping: 'x' is not a positive number"),
    ("gemma3_text", {"rope_parameters": {"full_attention": PLAIN}}, "rope_parameters: sliding_attention: missing"),
    ("gemma3_text", {"sliding_window_pattern": "LLG"}, "sliding_window_pattern: 'LLG' is not a number of layers"),
    ("phi3", {"rope_scaling": {**LONGROPE, "short_factor": 3}}, "rope: short_factor: 3 is not a list of numbers"),
    ("phi3", {"rope_scaling": {**LONGROPE, "long_factor": ["a"] * 6}}, "rope: long_factor: .* not a list of numbers"),
    ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 1}, "1 is not a context length"),
    ("phi3", {"original_max_position_embeddings": -5}, "original_max_position_embeddings: -5 is not a positive"),
    ("smollm3", {"no_rope_layers": [0] * 3}, "no_rope_layers, layer_types: .* at least one"),
    ("smollm3", {"no_rope_layers": "abc"}, "no_rope_layers, layer_types: 'abc': at least one layer must rotate"),
    ("exaone4", {"layer_types": ["full_attention"] * 3}, "no_rope_layers, layer_types: .* at least one"),
    ("granite", {"residual_multiplier": "a"}, "residual_multiplier: 'a' is not a positive number"),
    ("granite", {"embedding_multiplier": None}, "embedding_multiplier: None is not a positive number"),
    ("granite", {"attention_multiplier": math.nan}, "attention_multiplier: nan is not a positive number"),
    ("granite", {"logits_scaling": 0}, "logits_scaling: 0 is not a positive number"),
    ("ministral3", {"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, "rope: factor: 'x' is not a number"),
    ("gpt_neox", {"head_dim": 8}, "head_dim: 8 is not supported: only hidden_size / num_attention_heads, 16"),
    ("gpt_neox", {"hidden_dropout": 0.1}, "hidden_dropout: 0.1 is not supported: only 0.0 is"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True: unknown field of gpt2"),
    ("granitemoehybrid", {"num_local_experts": 8}, "num_local_experts: 8 is not supported: only 0"),
    ("granitemoehybrid", {"layer_types": ["mamba"] * 3}, "layer_types: 'mamba' is not supported: only attention"),
    ("qwen3_5_text", {"layer_types": ["full_attention"] * 2}, "layer_types: 2 entries: give one for each of"),
    (
        "qwen3_5_text",
        {"layer_types": ["conv"] * 3},
        "layer_types: 'conv' is not supported: only full_att",
    ),
    (
        "qwen3_5_text",
        {"linear_num_key_heads": 3},
        "linear_num_value_heads: 32 is not a multiple of linear_num",
    ),
    ("qwen3_5_text", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim: 0 is not a whole number from 1 to 256"),
    ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate: False is not supported"),
    ("lfm2", {"layer_types": ["conv"] * 4}, "layer_types: 4 entries: give one for each of"),
    ("lfm2", {"conv_bias": True}, "conv_bias: True is not supported"),
    ("ministral3", {"sliding_window": 4096}, "sliding_window: 4096 is not supported"),
    ("ministral3", {"llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta: 0.1: unknown field of ministral3"),
]


@pytest.mark.parametrize(("name", "fields", "message"), CLOSE, ids=lambda value: str(value)[:40])
def test_a_family_that_is_close_but_not_equal_is_refused_by_the_field(
    name: str, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    """In one line that names the file, too."""
    small = {key: value for key, value in SMALL.items() if key != "attn_implementation"}
    plain: dict[str, Any] = {
        **small,
        "head_dim": 16,
        "architectures": [FAMILIES[name].architecture],
        "attention_dropout": 0.0,
    }
    plain |= SHAPES[name][0] if name in ("ministral3", "granitemoehybrid") else {}  # which need some of their fields
    decoder_config(plain)
    (tmp_path / "config.json").write_text(json.dumps({**plain, **fields}))
    with pytest.raises(UserError, match=message) as raised:
        ModelFiles.read(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))
    assert "\n" not in str(raised.value)


WORKER = """
import os, sys, train
for port, config in zip(sys.argv[1::2], sys.argv[2::2]):
    if (child := os.fork()) == 0:
        os.environ["MASTER_PORT"] = port
        os._exit(train.main([config, "training.gradient_accumulation_steps=1", f"output.dir={config}-two"]))
    assert os.waitpid(child, 0)[1] == 0, config
"""


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """The same bits in every family: two micro-batches, one after the other or one on each rank."""
    records, exact = write_records(tmp_path / "data.jsonl", 16), {"lora__dropout": 0.0, "system__threads": 1}
    few: dict[str, Any] = {"training__max_steps": 2, "data__validation_split": 0.0, "evaluation__prompts": 0}
    program = [sys.executable, "-c", WORKER]
    for name, port in zip(FAMILIES, free_ports(len(FAMILIES)), strict=True):
        make_family(name, tmp_path / f"{name}-base")
        train_run(tmp_path / name, tmp_path / f"{name}-base", records, **exact, **few)
        program += [port, str(tmp_path / f"{name}.json")]
    shared = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent), **shared}
    ranks = [
        subprocess.Popen(program, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    try:
        said = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    for name in FAMILIES:
        file = "adapter/adapter_model.safetensors"
        alone, both = (load_file(tmp_path / directory / file) for directory in (name, f"{name}.json-two"))
        assert alone.keys() == both.keys()
        assert all(torch.equal(alone[key], both[key]) for key in alone), name
