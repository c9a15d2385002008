"""Experts in files: stacks, MXFP4, adapters of PEFT, and what is merged, exported or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CPU, make_adapter, randomize
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import WITH_EXPERTS, make_family
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import merge
from nanoft import UserError, kernels
from nanoft.config import Config, LoRAConfig
from nanoft.lora import inject_lora
from nanoft.models.adapter_files import save_adapter
from nanoft.models.expert_files import dequantize_mxfp4
from nanoft.models.families import decoder_config
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import open_model
from nanoft.models.weights import load_model
from nanoft.nf4 import PackedLinear, quantize
from nanoft.training.memory_plan import count_parameters
from nanoft.training.plan import gflop_per_token
from nanoft.training.setup import describe_parameters

IDS = torch.randint(3, 199, (2, 30), generator=torch.Generator().manual_seed(3))
NF4 = ("nf4", True)
ROUTER = {"gemma4_text": "router.proj"}  # its linear
every_family = pytest.mark.parametrize("case", WITH_EXPERTS, ids=str)


def as_mxfp4(base: Path) -> dict[str, torch.Tensor]:
    """Give a tiny gpt-oss random experts in MXFP4; returns its tensors with those weights in bfloat16."""
    tensors, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(5)
    plain = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.dim() == 3:
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(119, 124, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
            del plain[name]
            plain |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            tensors[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(plain, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.logits(model(IDS)) if hasattr(model, "activation_policy") else model(IDS).logits
    return found


def test_mxfp4_has_the_numbers_of_its_specification() -> None:
    """Sign, two bits of exponent with bias 1, one of mantissa; the first of a byte in its low bits."""

    def number(code: int) -> float:
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        return -size if sign else size

    blocks = torch.arange(256, dtype=torch.uint8).view(4, 4, 16)
    scales = torch.tensor([[100, 127, 130, 120]] * 4, dtype=torch.uint8)
    found = dequantize_mxfp4(blocks, scales).view(-1)
    wanted = [number(byte >> shift & 15) * 2.0 ** (int(scales.view(-1)[byte // 16]) - 127) for byte in range(256)
              for shift in (0, 4)]  # fmt: skip
    assert found.tolist() == wanted
    assert torch.equal(found.bfloat16(), convert_moe_packed_tensors(blocks[None], scales[None])[0].t().flatten())


def test_gpt_oss_in_mxfp4_is_what_it_stands_for(tmp_path: Path) -> None:
    make_family("gpt_oss", tmp_path / "base")
    weights = as_mxfp4(tmp_path / "base")
    model = load_model(tmp_path / "base", CPU, torch.float32)
    reference = make_family("gpt_oss", tmp_path / "plain")
    reference.load_state_dict(weights)
    assert (logits(model) - logits(reference)).abs().max() < 1e-4
    packed = load_model(tmp_path / "base", CPU, torch.float32, NF4)
    expert = packed.get_submodule("model.layers.1.mlp.experts.5.down_proj")
    assert isinstance(expert, PackedLinear)
    own = weights["model.layers.1.mlp.experts.down_proj"][5].t().float()
    assert torch.equal(expert.dequantize(), quantize(own, NF4, torch.float32).dequantize())
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    assert merge.main([str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert {name: tensor.shape for name, tensor in merged.items()} == {n: t.shape for n, t in weights.items()}
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager", dtype=torch.float32)
    tuned = logits(open_model(str(tmp_path / "adapter"), CPU, torch.float32).model)
    rounding, effect = ((tuned - logits(other)).norm(dim=-1).median() for other in (theirs, model))
    assert rounding < 0.02 * effect  # of the median token: rounded weights may choose another expert


def test_stacks_of_qwen3_moe_are_read_as_the_linears_that_they_hold(tmp_path: Path) -> None:
    theirs = make_family("qwen3_moe", tmp_path)
    expected = logits(load_model(tmp_path, CPU, torch.float32))
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(load_model(tmp_path, CPU, torch.float32)), expected)


@pytest.mark.parametrize("shape", [(6, 8), (6, 64, 64), (6, 64, 2, 8)])
def test_mxfp4_of_another_shape_is_refused_in_one_line(shape: tuple[int, ...], tmp_path: Path) -> None:
    make_family("gpt_oss", tmp_path)
    as_mxfp4(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.experts.down_proj_blocks"
    assert tensors[name].shape == (6, 64, 2, 16)
    save_file({**tensors, name: torch.zeros(shape, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensors do not fit config.json: .*experts.0.down_proj.weight is ") as raised:
        load_model(tmp_path, CPU, torch.float32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_stack_of_another_size_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make_family(name, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "num_local_experts": 7}))
    with pytest.raises(UserError, match=r"do not fit config.json: missing model.layers.0.mlp.experts.6") as raised:
        load_model(tmp_path, CPU, torch.float32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: 9 of 6 experts: choose fewer"),
        ({"num_local_experts": 10**9}, "num_local_experts: 1000000000 is not a whole number"),
        ({"output_router_logits": True}, "output_router_logits: True is not supported: only False is"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: 0 is not a number of layers"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: 3 is not a list"),
        ({"top_k_experts": 9}, "top_k_experts: 9 of 6 experts: choose fewer"),
        ({"top_k_experts": "2"}, "top_k_experts: '2' is not a whole number"),
    ],
)
def test_fields_that_cannot_be_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    name, shape = ("gemma4_text", 2) if "top_k_experts" in changes else ("qwen3_moe", 0)
    make_family(name, tmp_path, shape)
    fields = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(UserError, match=message):
        decoder_config({**fields, **changes})


# --- adapters


@every_family
def test_targets_reach_experts_and_the_router_only_if_it_is_named(case: tuple[str, int], tmp_path: Path) -> None:
    make_family(case[0], tmp_path, case[1])
    kinds = {"gate_proj", "up_proj", "down_proj"} if case[0] != "gpt_oss" else {"gate_up_proj", "down_proj"}
    kinds |= {"gate_up_proj"} if case[0] == "gemma4_text" else set()
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    router = ROUTER.get(case[0], "router")
    for targets, wanted in [
        (("all-linear",), kinds | attention), (("attention",), attention), (("mlp",), kinds),
        (("attention", router), attention | {router.rpartition(".")[2]}),
        ((r".*experts\.2\.down_proj",), {"down_proj"}),
    ]:  # fmt: skip
        model = load_model(tmp_path, CPU, torch.float32)
        adapters = inject_lora(model, LoRAConfig(rank=2, target_modules=targets), 0)
        assert {module.rpartition(".")[2] for module in adapters} == wanted
        if "experts" in targets[0]:
            assert len(adapters) == model.config.num_layers


@torch.no_grad()
@every_family
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("all-linear", "router"), "rank_pattern": {r".*experts\.\d+\.down_proj": 2}},
        {"target_modules": ("attention", "down_proj"), "alpha_pattern": {"down_proj": 3.0}, "rslora": True},
    ],
    ids=str,
)
def test_our_files_come_back(case: tuple[str, int], settings: dict[str, Any], tmp_path: Path) -> None:
    make_family(case[0], base := tmp_path / "base", case[1])
    targets = tuple(ROUTER.get(case[0], name) if name == "router" else name for name in settings["target_modules"])
    lora = LoRAConfig(**{"rank": 4, "alpha": 6.0, **settings, "target_modules": targets})
    model = load_model(base, CPU, torch.float32).eval()
    adapters: Any = inject_lora(model, lora, 0)
    randomize(adapters)
    kernels.apply(model)  # as in what is opened
    save_adapter(tmp_path / "ours", model, adapters, lora, str(base), {})
    again = open_model(str(tmp_path / "ours"), CPU, torch.float32)
    assert again.adapters.keys() == adapters.keys()
    assert (logits(again.model) - logits(model)).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
@every_family
@pytest.mark.parametrize("targets", [("all-linear", "router"), ("q_proj", "router"), ("down_proj",)], ids=str)
def test_parameters_that_peft_adapts_go_there_and_come_back(
    case: tuple[str, int], targets: tuple[str, ...], tmp_path: Path
) -> None:
    """Where no module has an adapter, PEFT writes an empty list of target_modules."""
    make_family(case[0], base := tmp_path / "base", case[1])
    targets = tuple(ROUTER.get(case[0], name) if name == "router" else name for name in targets)
    lora = LoRAConfig(rank=4, alpha=10.0, target_modules=targets)
    model = load_model(base, CPU, torch.float32).eval()
    adapters: Any = inject_lora(model, lora, 1)
    randomize(adapters)
    save_adapter(tmp_path / "ours", model, adapters, lora, str(base), {})
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = open_model(str(tmp_path / "theirs"), CPU, torch.float32)
    assert (logits(again.model) - logits(model)).abs().max() < 1e-4
    assert again.adapters.keys() == adapters.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_parameters": 3}, "target_parameters, rank_pattern: 3"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: not a regular expression"),
        ({"r": 5}, "is no stack of experts of rank 5"),
        ({"r": "4"}, "is no stack of experts of rank '4'"),
    ],
)
def test_stacks_that_cannot_be_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_family("gpt_oss", tmp_path / "base")
    path = make_adapter(tmp_path / "base", tmp_path / "adapter") / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as raised:
        open_model(str(tmp_path / "adapter"), CPU, torch.float32)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_experts_of_different_ranks_cannot_be_stacked(tmp_path: Path) -> None:
    make_family("gpt_oss", base := tmp_path / "base")
    lora = LoRAConfig(rank=4, rank_pattern={r".*experts\.3\.down_proj": 2})
    with pytest.raises(UserError, match=r"rank_pattern, .*: .*experts.down_proj: one rank for all 6"):
        count_parameters(ModelFiles.read(base).decoder, Config(lora=lora))


def test_mlx_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_family("qwen3_moe", tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter")
    assert merge.main([str(tmp_path / "adapter"), "--format", "mlx", "--out", str(tmp_path / "out")]) == 2
    assert "--format mlx: mlx-lm has stacks of experts" in capsys.readouterr().err


# --- what a run says


def test_every_weight_is_named_with_its_form(tmp_path: Path) -> None:
    make_family("qwen3_moe", tmp_path)
    model = load_model(tmp_path, CPU, torch.bfloat16, NF4)
    inject_lora(model, LoRAConfig(rank=2, target_modules=("attention",)), 0)
    said = dict(line.split(": ", 1) for line in describe_parameters(model))
    assert said["experts.up_proj"] == f"{3 * 6 * 64 * 64:,} frozen in nf4"
    assert said["q_proj"].endswith(f"trained in float32, rank 2; {3 * 64 * 64:,} frozen in nf4")
    assert said["router"] == f"{3 * 6 * 64:,} frozen in bfloat16"


def test_experts_beside_an_mlp_are_named_with_its_weights(tmp_path: Path) -> None:
    make_family("gemma4_text", tmp_path, 2)
    model = load_model(tmp_path, CPU, torch.bfloat16, NF4)
    said = dict(line.split(": ", 1) for line in describe_parameters(model))
    assert said["experts.gate_up_proj"] == f"{3 * 6 * 128 * 64:,} frozen in nf4"
    assert said["gate_proj"] == f"{3 * 128 * 64:,} frozen in nf4"
    assert said["router"].startswith(f"{3 * (6 * 64 + 64 + 6):,} ")


def test_a_token_costs_the_experts_that_it_meets(tmp_path: Path) -> None:
    make_family("qwen3_moe", tmp_path)
    decoder, config = ModelFiles.read(tmp_path).decoder, Config()
    counts = count_parameters(decoder, config)
    attention, expert = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 64
    assert counts.linears == 3 * (attention + 6 * expert)
    assert counts.active == pytest.approx(3 * (attention + 2 * expert))
    assert gflop_per_token(decoder, counts, config, 8, 0.0) < 1e-9 * 8 * counts.linears
