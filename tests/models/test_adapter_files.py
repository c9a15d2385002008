"""Adapter files: nanoft's load in PEFT and PEFT's here, with the same logits; PiSSA's conversion; what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import CPU, IDS, PLAIN, VARIANTS, adapted, peft_model, peft_name, randomize, variant
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanoft import UserError
from nanoft.config import LoRAConfig
from nanoft.lora import LoRALinear, by_pattern, inject_lora, variant_of
from nanoft.model import Decoder
from nanoft.models.adapter_files import (
    adapter_tensors,
    as_plain_lora,
    load_adapter_tensors,
    ranks_of,
    read_adapter,
    save_adapter,
    save_mlx,
    select_modules,
    sum_adapters,
)
from nanoft.models.families import FAMILIES, with_both_rope_forms
from nanoft.models.weights import load_model
from tiny_models import delta, make_reference

pytestmark = pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning")
LAST_NAMES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's shape with a bias on every linear of the blocks."""
    directory = tmp_path_factory.mktemp("base")
    make_reference("llama-bias", directory)
    return directory


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.logits(model(IDS)) if isinstance(model, Decoder) else model(IDS).logits
    return result


def trained(base: Path, lora: LoRAConfig = PLAIN) -> tuple[Decoder, dict[str, LoRALinear]]:
    """An adapter that changes the logits."""
    model, adapters = adapted(base, lora)
    randomize(adapters)
    return model.eval(), adapters


def reopened(base: Path, directory: Path) -> Decoder:
    """The base with an adapter from files."""
    lora, _, tensors, _ = read_adapter(directory)
    model = load_model(base, CPU, torch.float32)
    load_adapter_tensors(inject_lora(model, lora, seed=0), tensors, "files")
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_our_file_loads_in_peft_and_here(name: str, base: Path, tmp_path: Path) -> None:
    lora = variant(name)
    model, adapters = trained(base, lora)
    save_adapter(tmp_path / "adapter", model, adapters, lora, "some/base", {"step": 3})
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    plain = logits(load_model(base, CPU, torch.float32))
    assert (logits(model) - plain).abs().max() > 0.1
    assert (logits(model) - logits(theirs)).abs().max() < 1e-4
    assert (logits(model) - logits(reopened(base, tmp_path / "adapter"))).abs().max() < 1e-4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == LAST_NAMES
    assert read_adapter(tmp_path / "adapter")[1::2] == ("some/base", {"step": 3})


@pytest.mark.parametrize("name", [name for name in VARIANTS if variant_of(variant(name)).RANKS == 1])
def test_their_file_loads_here(name: str, base: Path, tmp_path: Path) -> None:
    # PEFT sorts the patterns when it writes them, so that only those that do not overlap survive it
    lora = variant(name, rank_pattern={"self_attn.q_proj": 4, "mlp.*": 2})
    _, adapters = trained(base, lora)
    theirs = peft_model(base, lora).eval()
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, tensor in adapter_tensors(adapters).items():
            parameters[peft_name(key)].copy_(tensor)
    theirs.save_pretrained(tmp_path / "adapter")
    assert (logits(reopened(base, tmp_path / "adapter")) - logits(theirs)).abs().max() < 1e-4
    ours, base_name, tensors, note = read_adapter(tmp_path / "adapter")
    assert (base_name, note) == (str(base), {})
    assert tensors.keys() == adapter_tensors(adapters).keys()
    assert all(getattr(ours, name) == getattr(lora, name) for name in ("rslora", "dora", "bias"))
    for name in ranks_of(tensors):
        for pattern, default in (("rank_pattern", "rank"), ("alpha_pattern", "alpha")):
            own, wanted = (by_pattern(getattr(c, pattern), name, getattr(c, default)) for c in (ours, lora))
            assert own == wanted


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_pissa_becomes_the_lora_that_peft_makes_of_it(base: Path, tmp_path: Path) -> None:
    lora = variant("pissa")
    theirs = peft_model(base, lora)
    theirs.peft_config["default"].init_lora_weights = True  # else PEFT decomposes the residual when it reads it back
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    model, adapters = adapted(base, lora)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, tensor in adapter_tensors(adapters).items():
            if "lora_A." in key or "lora_B." in key:
                tensor.copy_(parameters[peft_name(key)])  # the signs of singular vectors are arbitrary
        for adapter in adapters.values():
            adapter.lora_A0.copy_(adapter.lora_A)  # type: ignore[union-attr]
            adapter.lora_B0.copy_(adapter.lora_B)  # type: ignore[union-attr]
        randomize(adapters)
        for key, tensor in adapter_tensors(adapters).items():
            if "lora_A." in key or "lora_B." in key:
                parameters[peft_name(key)].copy_(tensor)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    save_adapter(tmp_path / "ours", model, adapters, lora, str(base), {})
    ours, reference = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == reference.keys()
    for name in (name for name in ours if "lora_A" in name):  # they are the products of other factors, less exact ones
        b = name.replace("lora_A", "lora_B")
        assert (ours[b] @ ours[name] - reference[b] @ reference[name]).abs().max() < 1e-6
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    assert all(config["r"] == 16 and config["lora_alpha"] == 40 for config in configs)
    assert (logits(reopened(base, tmp_path / "theirs")) - logits(model.eval())).abs().max() < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_twice_the_rank_has_the_same_scaling(rslora: bool, base: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 3, "mlp.*": 5}, "alpha_pattern": {"k_proj": 7.0}}
    lora = LoRAConfig(rank=8, alpha=20.0, init="pissa", rslora=rslora, **patterns)
    _, adapters = trained(base, lora)
    plain, tensors = as_plain_lora(lora, adapter_tensors(adapters))
    _, wider = adapted(base, plain)
    load_adapter_tensors(wider, tensors, "wider")
    for name, adapter in adapters.items():
        assert len(wider[name].lora_A) == 2 * len(adapter.lora_A)
        assert wider[name].scaling == pytest.approx(adapter.scaling)
        assert torch.allclose(delta(wider[name]), delta(adapter), atol=1e-6)
    assert as_plain_lora(plain, tensors) == (plain, tensors)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_brings_every_bit_back(name: str, base: Path) -> None:
    """Whatever the model's state was before, also if a decomposition gave another result."""
    model, adapters = trained(base, variant(name))
    tensors = {key: tensor.clone() for key, tensor in adapter_tensors(adapters).items()}
    other, others = trained(base, variant(name))
    with torch.no_grad():
        for tensor in adapter_tensors(others).values():
            tensor.mul_(-1.5)
    assert not torch.equal(logits(model), logits(other))
    load_adapter_tensors(others, tensors, "checkpoint")
    assert torch.equal(logits(model), logits(other))
    assert ("lora_A0" in "".join(tensors)) == ("pissa" in name)


@pytest.mark.parametrize(
    ("targets", "stored"),
    [
        (("attention",), ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ((r".*\.1\..*q_proj", "down_proj"), ["down_proj", "model.layers.1.self_attn.q_proj"]),
    ],
)
def test_targets_are_stored_as_names_that_peft_understands(
    targets: tuple[str, ...], stored: list[str], base: Path, tmp_path: Path
) -> None:
    lora = LoRAConfig(rank=4, target_modules=targets)
    model, adapters = trained(base, lora)
    save_adapter(tmp_path / "adapter", model, adapters, lora, str(base), {})
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"] == stored
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert (logits(model) - logits(theirs)).abs().max() < 1e-4
    assert torch.equal(logits(model), logits(reopened(base, tmp_path / "adapter")))


# --- sums and parts


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora and patterns": {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.*": 3.0}},
    "some modules": {"target_modules": ("attention",), "rank": 3, "alpha": 1.0},
}


def kind(name: str) -> LoRAConfig:
    return replace(LoRAConfig(rank=4, alpha=6.0), **KINDS[name])


def two(base: Path, directory: Path, names: tuple[str, str]) -> list[tuple[LoRAConfig, dict[str, Tensor]]]:
    """Two adapters in directories one and two."""
    for place, name, sign in (("one", names[0], 1.0), ("two", names[1], -0.7)):
        model, adapters = trained(base, kind(name))
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.lora_B.mul_(sign).add_(0.01)
        save_adapter(directory / place, model, adapters, kind(name), str(base), {})
    return [read_adapter(directory / place)[::2] for place in ("one", "two")]  # type: ignore[misc]


def on_base(base: Path, lora: LoRAConfig, tensors: dict[str, Tensor]) -> tuple[Decoder, dict[str, LoRALinear]]:
    model = load_model(base, CPU, torch.float32).eval()
    adapters = inject_lora(model, lora, seed=0)
    load_adapter_tensors(adapters, tensors, "sum")
    return model.eval(), adapters


@pytest.mark.parametrize("names", [("plain", "plain"), ("plain", "rslora and patterns"), ("some modules", "plain")])
def test_a_weighted_sum_is_what_peft_makes_of_it(names: tuple[str, str], base: Path, tmp_path: Path) -> None:
    parts, weights = two(base, tmp_path, names), [0.7, -0.3]
    lora, tensors = sum_adapters(parts, weights)
    model, adapters = on_base(base, lora, tensors)
    reference = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(reference, tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    changes: dict[str, Tensor] = {}
    for name, module in theirs.named_modules():
        for adapter, weight in zip(("one", "two"), weights, strict=True):
            if adapter in getattr(module, "lora_A", {}):
                key = name.removeprefix("base_model.model.")
                changes[key] = changes.get(key, 0) + weight * module.get_delta_weight(adapter)  # type: ignore[operator]
    assert adapters.keys() == changes.keys()
    for name, change in changes.items():
        assert (delta(adapters[name]) - change).abs().max() < 1e-6, name
    save_adapter(tmp_path / "sum", model, adapters, lora, str(base), {})
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "sum")
    assert (logits(again) - logits(model)).abs().max() < 1e-4


def test_a_dora_is_not_added(base: Path) -> None:
    tensors = adapter_tensors(trained(base, variant("dora"))[1])
    with pytest.raises(UserError, match="DoRA adapters cannot be summed"):
        sum_adapters([(variant("dora"), tensors)], [0.5])


def test_trained_biases_are_not_added(base: Path) -> None:
    lora = replace(PLAIN, bias="lora_only")
    with pytest.raises(UserError, match="only low-rank adapters can be summed"):
        sum_adapters([(lora, adapter_tensors(trained(base, lora)[1]))], [0.5])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("only", "kept"),
    [
        (["attention"], r"self_attn"),
        (["mlp"], r"\.mlp\."),
        (["q_proj", r".*layers\.1\..*up_proj"], r"q_proj|1.*up_proj"),
    ],
)
def test_a_part_of_an_adapter_changes_only_what_it_names(
    only: list[str], kept: str, name: str, base: Path, tmp_path: Path
) -> None:
    _, adapters = trained(base, variant(name))
    lora, tensors = select_modules(*as_plain_lora(variant(name), adapter_tensors(adapters)), only)
    model, part = on_base(base, lora, tensors)
    assert part.keys() == {module for module in adapters if re.search(kept, module)}
    for module, adapter in part.items():
        weight = adapter.base.weight  # type: ignore[union-attr]
        assert (adapter.merged(weight) - adapters[module].merged(weight)).abs().max() < 1e-6
        assert (adapter.bias is None) == (variant(name).bias == "none")
    save_adapter(tmp_path / "part", model, part, lora, str(base), {})
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "part")
    assert (logits(theirs) - logits(model)).abs().max() < 1e-4


def test_a_part_that_is_none_is_refused(base: Path) -> None:
    tensors = adapter_tensors(trained(base)[1])
    with pytest.raises(UserError, match=r"--only: 'w_proj' matches no module .* q_proj, "):
        select_modules(PLAIN, tensors, ["attention", "w_proj"])


# --- MLX


def test_mlx_has_no_place_for_biases(base: Path, tmp_path: Path) -> None:
    model, adapters = trained(base, variant("bias"))
    with pytest.raises(UserError, match=r"--format mlx: mlx-lm adapters cannot store the trained bias of"):
        save_mlx(tmp_path, adapters, variant("bias"), model.config, "some/base")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name in VARIANTS if variant(name).bias == "none"])
def test_mlx_says_what_we_say(name: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    make_reference("llama-bias", tmp_path / "base")
    model, adapters = trained(tmp_path / "base", variant(name))
    (tmp_path / "adapter").mkdir()
    save_mlx(tmp_path / "adapter", adapters, variant(name), model.config, str(tmp_path / "base"))
    theirs, _ = utils.load_model(tmp_path / "base")
    ids = mx.array(IDS.numpy())
    plain = torch.tensor(theirs(ids).tolist())
    assert (plain - logits(load_model(tmp_path / "base", CPU, torch.float32))).abs().max() < 1e-3
    theirs = tuner.load_adapters(theirs, str(tmp_path / "adapter"))
    theirs.eval()
    said = torch.tensor(theirs(ids).tolist())
    assert (said - plain).abs().max() > 0.1
    assert (said - logits(model)).abs().max() < 1e-3


# What mlx-lm does not compute: windows of some families, Phi-3's short factors, Gemma 3's layers by layer_types.
IN_MLX: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"sliding_window": 128},
    "gemma3_text": {"shape": 1},
    "phi3": {"original_max_position_embeddings": 8},
    "gpt2": {"n_inner": 4 * 64, "n_ctx": 128},
    "gpt_neox": {"intermediate_size": 4 * 64, "hidden_act": "gelu_new"},
    "granitemoehybrid": {"intermediate_size": 128},
}


def test_mlx_lm_has_no_qwen3_5_of_text_alone(tmp_path: Path) -> None:
    make_family("qwen3_5_text", tmp_path)
    model, adapters = trained(tmp_path)
    with pytest.raises(UserError, match=r"--format mlx: mlx-lm loads Qwen3\.5 only with"):
        save_mlx(tmp_path, adapters, PLAIN, model.config, "base")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3_5_text"])
def test_mlx_says_what_we_say_of_every_family(family: str, tmp_path: Path, differs: Any) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    tuner = pytest.importorskip("mlx_lm.tuner.utils")
    if family == "gemma4_unified_text":
        pytest.skip("mlx-lm does not have it")
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", torch.arange(5, 65)[None]
    make_family(family, base, **IN_MLX.get(family, {}))
    config = base / "config.json"  # with both forms of the rope, as a merged model has them
    fields = with_both_rope_forms(json.loads(config.read_text()))
    if family == "granitemoehybrid":
        fields["layer_types"] = ["attention"] * 3  # as on the Hub
    if family == "gemma4_text":
        fields["global_head_dim"] = 32  # as on the Hub
    if family == "lfm2":
        fields["block_dim"] = fields["hidden_size"]  # as on the Hub
    config.write_text(json.dumps(fields))
    if family == "gpt2":  # on the Hub, names of tensors have no prefix
        stored = load_file(base / "model.safetensors")
        save_file({name.removeprefix("transformer."): t for name, t in stored.items()}, base / "model.safetensors")
    model, adapters = trained(base)
    adapter.mkdir()
    if model.config.routing:
        with pytest.raises(UserError, match="--format mlx: mlx-lm has stacks of experts"):
            save_mlx(adapter, adapters, PLAIN, model.config, str(base))
        return
    save_mlx(adapter, adapters, PLAIN, model.config, str(base))
    theirs, _ = utils.load_model(base)
    plain = torch.tensor(theirs(mx.array(ids.numpy())).tolist())
    theirs = tuner.load_adapters(theirs, str(adapter))
    theirs.eval()
    said = torch.tensor(theirs(mx.array(ids.numpy())).tolist())
    assert (said - plain).abs().max() > 0.1
    differs("MLX", (said - model.logits(model(ids))).abs().max(), 1e-4)


def test_the_mlx_files_are_the_adapter_transposed(base: Path, tmp_path: Path) -> None:
    """Without MLX: names, shapes and product of the layout as its documentation has it."""
    model, adapters = trained(base, variant("patterns"))
    save_mlx(tmp_path, adapters, variant("patterns"), model.config, "some/base")
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapters.safetensors"),
    )
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 3)
    scale, keys = config["lora_parameters"]["scale"], config["lora_parameters"]["keys"]
    assert keys == sorted(f"{'mlp' if n[0] in 'gud' else 'self_attn'}.{n}" for n in LAST_NAMES)
    assert tensors.keys() == {f"{name}.lora_{part}" for name in adapters for part in "ab"}
    for name, adapter in adapters.items():
        change = scale * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T
        assert (change - delta(adapter)).abs().max() < 1e-6


def change_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop_tensors(path: Path, pattern: str) -> None:
    file = path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not re.search(pattern, name)}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: change_config(p, init_lora_weights="pissa"), "init_lora_weights: 'pissa' is not supported"),
        (lambda p: change_config(p, init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (lambda p: change_config(p, use_dora="yes"), "use_dora: 'yes' is not supported"),
        (lambda p: change_config(p, lora_bias=True), "lora_bias"),
        (lambda p: change_config(p, r=None), "lora.rank: None is not an integer"),
        (lambda p: (p / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda p: (p / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"\0" * 50), "corrupted"),
        (lambda p: drop_tensors(p, "q_proj.lora_A"), "has no lora_A or no lora_B"),
        (lambda p: drop_tensors(p, "layers.1.self_attn.q_proj.lora_B"), "has no lora_A or no lora_B"),
        (lambda p: drop_tensors(p, "."), "has no lora_A or no lora_B"),
    ],
)
def test_an_adapter_that_is_not_understood_is_refused(base: Path, tmp_path: Path, damage: Any, message: str) -> None:
    model, adapters = adapted(base)
    save_adapter(tmp_path / "adapter", model, adapters, PLAIN, str(base), {})
    damage(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector: missing, but"),
        ({"bias": "lora_only"}, "base_layer.bias: missing, but"),
    ],
)
def test_tensors_that_a_setting_needs_are_missed(changes: Any, message: str, base: Path, tmp_path: Path) -> None:
    model, adapters = adapted(base)
    save_adapter(tmp_path / "adapter", model, adapters, PLAIN, str(base), {})
    change_config(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=message):
        reopened(base, tmp_path / "adapter")
    model, adapters = adapted(base, variant("together"))
    save_adapter(tmp_path / "more", model, adapters, variant("together"), str(base), {})
    change_config(tmp_path / "more", use_dora=False, bias="none")
    with pytest.raises(UserError, match="none is needed"):
        reopened(base, tmp_path / "more")


def test_tensors_that_do_not_fit_are_named(base: Path) -> None:
    _model, adapters = adapted(base)
    tensors = adapter_tensors(adapters)
    name = next(iter(tensors))
    with pytest.raises(UserError, match=f"{name}: missing"):
        load_adapter_tensors(adapters, {k: v for k, v in tensors.items() if k != name}, "x")
    with pytest.raises(UserError, match="none is needed"):
        load_adapter_tensors(adapters, {**tensors, "extra": tensors[name]}, "x")
    with pytest.raises(UserError, match=rf"{name}: \(3, 3\)"):
        load_adapter_tensors(adapters, {**tensors, name: torch.zeros(3, 3)}, "x")
