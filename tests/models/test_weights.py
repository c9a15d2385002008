"""Reading and writing Hugging Face directories: against transformers, under a memory limit, and with errors in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from templates import CONTROL, STYLES, save
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nanoft import UserError
from nanoft.model import Decoder
from nanoft.models.adapter_files import PEFT_PREFIX
from nanoft.models.families import decoder_config
from nanoft.models.open import LoadedModel, open_model
from nanoft.models.weights import (
    cache_weights,
    choose_dequantize,
    copy_companions,
    load_model,
    read_stored,
    save_model,
    stored_tensors,
    write_config,
)
from nanoft.nf4 import PackedLinear, matmul, matmul_backward, packed_bytes, quantize
from tiny_models import make_chat_model, make_packed, make_reference

CPU = torch.device("cpu")


IDS = torch.randint(0, 199, (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    result: torch.Tensor = model.logits(model(ids)) if isinstance(model, Decoder) else model(ids).logits
    return result


def load(directory: Path, **settings: Any) -> Decoder:
    return load_model(directory, CPU, torch.float32, **settings)


# --- loading


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_single_and_sharded_files_give_the_logits_of_transformers(case: str, shard_size: str, tmp_path: Path) -> None:
    reference = make_reference(case, tmp_path, shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "100KB")
    assert (logits(load(tmp_path)) - logits(reference)).abs().max() < 1e-4


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Read the single weights file, change the dictionary, write it again."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_weights_do_not_follow_the_file_that_they_came_from(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    model = load(tmp_path)
    before = logits(model)
    with open(tmp_path / "model.safetensors", "r+b") as file:  # in place, as `cp new model.safetensors` does it
        file.seek(20_000)
        file.write(b"\0" * 100_000)
    assert torch.equal(logits(model), before)


def test_tensors_that_follow_from_others_may_stand_in_the_file(tmp_path: Path) -> None:
    reference = make_reference("qwen2", tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert (logits(load(tmp_path)) - logits(reference)).abs().max() < 1e-4


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda t: (t.pop(UP), t.pop("model.norm.weight")),
            [f"missing {UP}", "missing model.norm.weight", "2 tensors"],
        ),
        (lambda t: t.update(extra=torch.zeros(2)), ["unexpected extra", "1 tensors"]),
        (lambda t: t.update({UP: torch.zeros(3, 4)}), [f"{UP} is (3, 4) instead of (128, 64)"]),
        (lambda t: t.update({UP: torch.zeros(128, 64, dtype=torch.int8)}), [f"{UP} is of type I8"]),
        (lambda t: t.clear(), ["30 tensors do not fit", "and 22 more"]),
    ],
)
def test_tensors_that_do_not_fit_are_all_named(change: Any, expected: list[str], tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    for part in [*expected, str(tmp_path)]:
        assert part in str(raised.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path, "100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, shards[1])
    with pytest.raises(UserError, match=f"{name} is in two files"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: corrupted"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 3, ["x"], {"a": 1}, None]
)
def test_an_index_cannot_point_outside_its_directory(name: Any, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path / "model")
    shutil.move(tmp_path / "model" / "model.safetensors", tmp_path / "model.safetensors")  # loadable, were it read
    (tmp_path / "model" / "sub").mkdir()
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model" / "sub")
    index = {"weight_map": {"model.norm.weight": name}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"leaves the model's directory|missing") as raised:
        load(tmp_path / "model")
    assert str(tmp_path / "model") in str(raised.value)


def drop_shard(directory: Path) -> None:
    next(iter(directory.glob("model-00002-*"))).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, r"model-00002-of-\d+\.safetensors: one of \d+ files, but missing"),
        (lambda d: [f.unlink() for f in d.glob("model*")], "no weights here"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "index.json: not valid JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_text("[]"), "index.json: expected a JSON object"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "weight_map is missing or empty"),
        (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
        (lambda d: (d / "config.json").write_text("["), "config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_bytes(b'"\xff"'), "config.json: not valid JSON"),
        (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json: not valid JSON"),
    ],
)
def test_a_directory_that_is_not_whole_is_explained(damage: Any, message: str, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path, "100KB")
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def set_config(directory: Path, **changes: Any) -> dict[str, Any]:
    """Change config.json; None removes a field."""
    stored = {**json.loads((directory / "config.json").read_text()), **changes}
    stored = {name: value for name, value in stored.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(stored))
    return stored


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", 7),
        ("logit_scale", 0.5),
        ("hidden_act", "gelu"),
        ("hidden_size", "64"),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", -3),
        ("num_hidden_layers", None),
        ("head_dim", 1.5),
        ("vocab_size", [199]),
        ("rms_norm_eps", "small"),
        ("rope_theta", "x"),
        ("rope_theta", -1),
        ("rope_scaling", {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
        ("rope_scaling", {"type": "linear", "factor": 8.0, "beta_fast": 32}),
        ("rope_theta", 0),
        ("layer_types", ["full_attention", "chunked_attention", "full_attention"]),
        ("rope_scaling", {"type": "linear", "factor": "8"}),
        ("sliding_window", 0),
        ("sliding_window", "wide"),
    ],
)
def test_a_config_with_an_unknown_or_impossible_value_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    set_config(tmp_path, **{field: value})
    with pytest.raises(UserError, match=r"config\.json: ") as raised:
        load(tmp_path)
    assert str(raised.value).startswith(str(tmp_path))


FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]


@pytest.mark.parametrize("form", FORMS)
def test_quantising_while_loading_equals_quantizing_afterwards(form: tuple[str, bool], tmp_path: Path) -> None:
    make_reference("qwen2", tmp_path)  # its biases arrive before or after their weights
    streamed = load(tmp_path, quantization=form)
    whole = load(tmp_path)
    for name, linear in list(whole.named_modules()):
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            packed = quantize(linear.weight.detach(), form, torch.float32)
            packed.bias = linear.bias
            setattr(whole.get_submodule(parent), last, packed)
    assert [layer.kind for layer in linears(streamed, PackedLinear).values()] == [form[0]] * 21
    assert torch.equal(logits(streamed), logits(whole))
    assert (logits(streamed) - logits(load(tmp_path))).abs().max() > 0.01  # not what it was


# --- models that bitsandbytes packed


def settings_of(form: tuple[str, bool]) -> dict[str, Any]:
    """The form in transformers' words."""
    kind, double = form
    if kind == "int8":
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases and a tied head, and in each form as transformers saves it; and that in small shards."""
    root = tmp_path_factory.mktemp("packed")
    make_reference("qwen2", root / "source")
    for kind, double in FORMS:
        make_packed(root / "source", root / f"{kind}-{double}", **settings_of((kind, double)))
        shutil.copytree(root / f"{kind}-{double}", shards := root / f"{kind}-{double}-shards")
        tensors = load_file(shards / "model.safetensors")
        (shards / "model.safetensors").unlink()
        apart = sorted(tensors, key=lambda name: name[::-1])  # a weight's tensors far from one another
        write_sharded(shards, {name: tensors[name] for name in apart}, 20_000)
    return root


def linears(model: Any, kind: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS[:4])
def test_a_model_in_4_bits_has_the_weights_and_logits_of_transformers(
    form: tuple[str, bool], dtype: torch.dtype, packed: Path
) -> None:
    directory = packed / f"{form[0]}-{form[1]}"
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ours = load_model(directory, CPU, torch.float32, unpacked_dtype=dtype)
    found = linears(ours, PackedLinear)
    assert len(found) == 21
    for name, layer in found.items():
        other = theirs.get_submodule(name).weight
        other.quant_state.dtype = dtype
        assert torch.equal(layer.dequantize(), bitsandbytes.functional.dequantize_4bit(other, other.quant_state)), name
    theirs.train()  # in evaluation, bitsandbytes rounds to bfloat16 on CPUs that have it
    difference = (logits(ours) - logits(theirs)).abs().max()
    assert difference < 1e-4 if dtype == torch.float32 else 0.001 < difference < 0.5
    shards = load_model(packed / f"{form[0]}-{form[1]}-shards", CPU, torch.float32, unpacked_dtype=dtype)
    assert torch.equal(logits(shards), logits(ours))


def test_a_model_in_8_bits_has_the_weights_of_transformers(packed: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(packed / "int8-False", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(packed / "source", attn_implementation="eager")
    ours = load(packed / "int8-False")
    found = linears(ours, PackedLinear)
    assert len(found) == 21
    for name, layer in found.items():
        other = theirs.get_submodule(name).weight
        wanted = bitsandbytes.functional.int8_vectorwise_dequant(other.data, other.SCB)
        assert torch.allclose(layer.dequantize(), wanted, rtol=3e-7, atol=0), name
        reference.get_submodule(name).weight.data = wanted
    assert (logits(ours) - logits(reference)).abs().max() < 1e-4
    assert (logits(ours) - logits(theirs)).abs().max() < 0.5  # they round activations, too
    assert torch.equal(logits(load(packed / "int8-False-shards")), logits(ours))


def test_modules_that_were_left_out_of_packing_stay_as_they_are(packed: Path, tmp_path: Path) -> None:
    settings = settings_of(("nf4", True))
    theirs = make_packed(packed / "source", tmp_path, llm_int8_skip_modules=["down_proj", "lm_head"], **settings)
    ours = load(tmp_path)
    assert len(linears(ours, PackedLinear)) == 18
    assert {name.rpartition(".")[2] for name in linears(ours, torch.nn.Linear)} == {"down_proj"}
    assert (logits(ours) - logits(theirs.train())).abs().max() < 1e-4


NOTE = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"


def renote(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Other values in the note beside a packed weight."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        note = {**json.loads(bytes(tensors[NOTE].tolist())), **changes}
        tensors[NOTE] = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("stored", "change", "message"),
    [
        ("nf4-True", lambda t: t.pop(UP), f"missing {UP};"),
        ("nf4-True", lambda t: t.pop(f"{UP}.absmax"), f"1 tensors .*missing {UP}.absmax"),
        ("nf4-True", lambda t: t.pop(f"{UP}.nested_absmax"), f"missing {UP}.nested_absmax"),
        ("nf4-True", lambda t: t.pop(NOTE), f"missing {NOTE}"),
        ("nf4-True", lambda t: t.update({f"{UP}.absmax": torch.zeros(128)}), f"{UP}.absmax is of type F32"),
        ("nf4-True", lambda t: t.update({UP: t[UP][:-1].clone()}), rf"{UP} is \(4095, 1\) instead of \(4096, 1\)"),
        ("nf4-True", lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][1:].clone()}), r"absmax is \(127,\)"),
        ("nf4-False", lambda t: t.update({f"{UP}.nested_absmax": torch.zeros(1)}), f"unexpected {UP}.nested_absmax"),
        (
            "nf4-True",
            lambda t: t.update({f"{UP}.quant_map": t[f"{UP}.quant_map"].flip(0)}),
            "not the code points of nf4",
        ),
        ("nf4-True", lambda t: t.update({NOTE: torch.full((9,), 255, dtype=torch.uint8)}), f"{NOTE[:-19]}.*corrupted"),
        ("nf4-True", lambda t: t.update({NOTE: torch.full((10**5,), 91, dtype=torch.uint8)}), "quant_state: corrupted"),
        (
            "nf4-True",
            lambda t: t.update({NOTE: torch.tensor([91, 93], dtype=torch.uint8)}),
            "quant_type is None instead",
        ),
        ("nf4-True", renote(quant_type="fp4"), "quant_type is 'fp4' instead of 'nf4'"),
        ("nf4-True", renote(blocksize=128), "blocksize is 128 instead of 64"),
        ("nf4-True", renote(shape=[64, 128]), r"shape is \[64, 128\] instead of \[128, 64\]"),
        ("nf4-True", renote(nested_blocksize=64), "nested_blocksize is 64 instead of 256"),
        ("nf4-True", renote(nested_offset=None), "nested_offset: None is not a finite number"),
        ("nf4-True", renote(nested_offset=float("nan")), "nested_offset: nan is not a finite number"),
        ("nf4-True", renote(nested_offset=10**400), "nested_offset: 10*... is not a finite number"),
        ("int8-False", lambda t: t.pop(UP.replace("weight", "SCB")), "missing .*up_proj.SCB"),
        ("int8-False", lambda t: t[UP.replace("weight", "weight_format")].fill_(2), "weight_format: not row-major"),
        ("source", lambda t: t.update({UP: torch.zeros(4096, 1, dtype=torch.uint8)}), f"{UP} is of type U8"),
    ],
)
def test_damage_to_a_packed_weight_is_one_line_with_its_name(
    stored: str, change: Any, message: str, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed / stored, tmp_path / "model")
    rewrite(tmp_path / "model", change)
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "model")
    assert str(raised.value).startswith(str(tmp_path / "model"))
    assert "up_proj" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"},
        "bitsandbytes",
    ],
)
def test_another_tools_or_form_of_quantization_is_refused(changes: Any, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed / "nf4-True", tmp_path / "model")
    set_config(tmp_path / "model", quantization_config=changes)
    with pytest.raises(UserError, match=r"config\.json: ") as raised:
        load(tmp_path / "model")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_linear_is_read_from_what_bitsandbytes_writes(kind: str, double: bool) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    tensors = {"weight": packed, **{f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}}
    dtypes = {"U8": torch.uint8, "F32": torch.float32}
    expected = stored_tensors((96, 64), (kind, double))
    assert tensors.keys() == expected.keys()
    for name, (forms, shape) in expected.items():
        assert [tensors[name].dtype] == [dtypes[form] for form in forms], name
        assert shape is None or tensors[name].shape == shape, name
    linear = read_stored(tensors, (96, 64), (kind, double), torch.float32)
    assert torch.equal(linear.dequantize(), bitsandbytes.functional.dequantize_4bit(packed, state))


# --- weights that are dequantized once


def weight(rows: int = 96, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def small_model() -> nn.Sequential:
    first = quantize(weight(), ("nf4", True), torch.bfloat16)
    second = quantize(weight(64, 96), ("int8", False), torch.bfloat16, torch.arange(64.0))
    return nn.Sequential(first, nn.SiLU(), nn.Sequential(second), nn.Linear(64, 4, dtype=torch.bfloat16))


@torch.no_grad()
def test_cached_weights_are_frozen_linears_with_the_same_products() -> None:
    model, x = small_model(), torch.randn(5, 128).bfloat16()
    hidden, head, bias = model[:2](x), model[3], model[2][0].bias
    products = [matmul(model[0], x), matmul(model[2][0], hidden), matmul_backward(model[0], hidden)]
    assert cache_weights(model, "auto") == cache_weights(model, "per_use") == "per_use"  # on a CPU
    assert isinstance(model[0], PackedLinear)
    assert cache_weights(model, "cached") == "cached"
    first, second = model[0], model[2][0]
    assert type(first) is type(second) is nn.Linear
    found = [matmul(first, x), matmul(second, hidden), matmul_backward(first, hidden)]
    assert all(torch.equal(own, other) for own, other in zip(found, products, strict=True))
    assert (first.bias, second.bias) == (None, bias)
    assert model[3] is head
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in (first.weight, second.weight, bias))
    assert packed_bytes(first) == 2 * 96 * 128
    assert cache_weights(model, "cached") == "per_use"  # nothing is packed any more


@pytest.mark.parametrize(
    ("policy", "device_type", "extra", "free", "chosen"),
    [
        ("auto", "cuda", 10, 30, "cached"),
        ("auto", "cuda", 10, 29, "per_use"),
        ("auto", "cpu", 10, 1000, "per_use"),
        ("auto", "mps", 10, 1000, "per_use"),
        ("cached", "cpu", 10, 0, "cached"),
        ("cached", "cuda", 10, 0, "cached"),
        ("per_use", "cuda", 0, 1000, "per_use"),
    ],
)
def test_when_weights_are_cached(policy: str, device_type: str, extra: int, free: int, chosen: str) -> None:
    assert choose_dequantize(policy, device_type, extra, free) == chosen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_decides_on_cuda() -> None:
    model = small_model().cuda()
    assert cache_weights(model, "auto") == "cached"  # a few kilobytes
    assert isinstance(model[0], nn.Linear)


# --- memory

MEASURE = """
    import sys, torch
    from pathlib import Path
    from nanoft.nf4 import quantize
    from nanoft.models.weights import load_model

    def resident(field):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    torch.set_num_threads(1)
    quantize(torch.randn(64, 64), ("nf4", True), torch.float32).dequantize()  # libraries are there before we look
    for directory in sys.argv[1:]:
        for dtype, quantization in ((torch.bfloat16, ("nf4", True)), (torch.bfloat16, None), (torch.float32, None)):
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
            before = resident("VmRSS")
            model = load_model(Path(directory), torch.device("cpu"), dtype, quantization)
            peak = resident("VmHWM") - before
            tensors = [*model.parameters(), *model.buffers()]
            print(peak, sum(t.numel() * t.element_size() for t in tensors))
            del model, tensors
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")
def test_loading_needs_the_model_and_one_tensor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 8000}
    config = AutoConfig.for_model("llama", num_attention_heads=8, num_key_value_heads=2, **sizes)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    state = {name: torch.rand(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    config.architectures = ["LlamaForCausalLM"]
    for name, limit in (("single", 10**10), ("sharded", 60 * 10**6)):
        config.save_pretrained(tmp_path / name)
        write_sharded(tmp_path / name, state, limit)
    said = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path / "single"), str(tmp_path / "sharded")],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},  # what is freed is given back, so that it counts
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [[int(word) for word in line.split()] for line in said.stdout.splitlines()]
    file_bytes = sum(tensor.nbytes for tensor in state.values())
    expected = [0.45 * file_bytes, file_bytes, 2 * file_bytes]  # embeddings and head stay in 16 bits beside NF4
    # The largest tensors: 16 MB in the file, 8 MB of those that are quantized, a few chunks of 4 MB at a time.
    for (peak, model), size, extra in zip(lines, 2 * expected, 2 * [40e6, 20e6, 52e6], strict=True):
        assert 0.9 * size < model < 1.1 * size
        assert 0.7 * model < peak < model + extra, f"{peak:,} for a model of {model:,} bytes"


def write_sharded(directory: Path, state: dict[str, torch.Tensor], limit: int) -> None:
    """Write one file, or several with an index, with the safetensors library."""
    files: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in state.items():
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > limit:
            files.append({})
        files[-1][name] = tensor
    if len(files) == 1:
        save_file(files[0], directory / "model.safetensors")
        return
    weight_map = {}
    for number, part in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(part, directory / name)
        weight_map.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# --- writing


@pytest.mark.parametrize("case", ["llama", "llama-linear", "llama3-rope", "llama-yarn", "qwen2-window", "qwen3"])
@pytest.mark.parametrize("form", ["current", "classic"])
def test_a_written_config_reads_alike_in_both_forms(case: str, form: str, tmp_path: Path) -> None:
    make_reference(case, tmp_path / "source")
    source = json.loads((tmp_path / "source" / "config.json").read_text())
    if form == "classic":  # as transformers 4 wrote it
        rope = source["rope_parameters"]
        scaling = {"type" if k == "rope_type" else k: v for k, v in rope.items() if k != "rope_theta"}
        classic = {"rope_theta": rope["rope_theta"], "torch_dtype": source["dtype"], "rope_parameters": None}
        scaled = None if rope["rope_type"] == "default" else scaling
        source = set_config(tmp_path / "source", **classic, rope_scaling=scaled, dtype=None)
    (tmp_path / "out").mkdir()
    write_config(tmp_path / "source", tmp_path / "out", torch.bfloat16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())

    original = AutoConfig.from_pretrained(tmp_path / "source")
    both = AutoConfig.from_pretrained(tmp_path / "out")
    parameters = written.pop("rope_parameters")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps(written))  # what a reader of version 4 understands
    old = AutoConfig.from_pretrained(tmp_path / "old")
    assert parameters["rope_theta"] == written["rope_theta"] == original.rope_parameters["rope_theta"]
    assert (written["dtype"], written["torch_dtype"], both.dtype) == ("bfloat16", "bfloat16", torch.bfloat16)
    assert torch.equal(frequencies(original), frequencies(both))
    assert torch.equal(frequencies(original), frequencies(old))
    unchanged = {k: v for k, v in source.items() if k not in ("dtype", "torch_dtype", "rope_scaling")}
    assert {k: v for k, v in written.items() if k in unchanged} == {k: v for k, v in unchanged.items() if k in written}
    a, b = (decoder_config(json.loads((tmp_path / d / "config.json").read_text())) for d in ("source", "out"))
    assert torch.equal(a.ropes[0].angles(a.head_dim)[0], b.ropes[0].angles(b.head_dim)[0])
    assert a.ropes[0].angles(a.head_dim)[1] == b.ropes[0].angles(b.head_dim)[1]


def frequencies(config: Any) -> torch.Tensor:
    """The rotary frequencies that transformers computes from a config."""
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config, CPU)
        return torch.cat((frequency, torch.tensor([factor])))
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, size, 2).float() / size
    return torch.cat((config.rope_parameters["rope_theta"] ** -exponents, torch.tensor([1.0])))


@pytest.mark.parametrize("case", ["mistral", "qwen2"])
def test_a_saved_model_loads_in_transformers(case: str, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "source", case)
    model = load(tmp_path / "source")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "source", tmp_path / "out", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(model, ids) - logits(theirs, ids)).abs().max() < 1e-4
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


@pytest.mark.parametrize("stored", [None, {"temperature": 0.5}, {"eos_token_id": 3}, {"eos_token_id": [3, 4]}])
def test_a_saved_model_stops_where_its_template_ends_a_turn(stored: dict[str, Any] | None, tmp_path: Path) -> None:
    save(tmp_path / "source", STYLES["marked"])  # its turns end in <|im_end|>, its texts in <|endoftext|>
    if stored is not None:
        (tmp_path / "source" / "generation_config.json").write_text(json.dumps(stored))
    (tmp_path / "out").mkdir()
    copy_companions(tmp_path / "source", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ends = {CONTROL.index("<|im_end|>"), CONTROL.index("<|endoftext|>")}
    given = (stored or {}).get("eos_token_id", [])
    assert set(written.pop("eos_token_id")) == ends | set(given if isinstance(given, list) else [given])
    assert written == {key: value for key, value in (stored or {}).items() if key != "eos_token_id"}


# --- what a RUN, ADAPTER or MODEL means


def opened_logits(opened: LoadedModel) -> torch.Tensor:
    return logits(opened.model, torch.arange(5, 50)[None])


def open_float32(source: Path | str, **settings: Any) -> LoadedModel:
    return open_model(str(source), CPU, torch.float32, **settings)


def unfinished(run: Path, out: Path) -> Path:
    """A copy of the run without its result, as a run is before it ends."""
    shutil.copytree(run, out)
    for name in ("adapter", "model", "report.json"):
        shutil.rmtree(out / name, ignore_errors=True) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    return out


def weights_of(checkpoint: Path) -> Path:
    return next(path for path in checkpoint.glob("*.safetensors") if path.stem in ("adapter", "model"))


@pytest.mark.parametrize("name", ["lora", "qlora", "full"])
def test_a_run_without_a_result_is_its_best_checkpoint(name: str, runs: Path, tmp_path: Path) -> None:
    best = json.loads((runs / name / "best.json").read_text())["step"]
    finished = open_float32(runs / name)
    assert finished.step is None
    run = unfinished(runs / name, tmp_path / "run")
    opened = open_float32(run)
    assert opened.step == best == 4
    assert (opened.quantization, opened.dtype) == (finished.quantization, finished.dtype)
    assert torch.equal(opened_logits(opened), opened_logits(finished))

    (run / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/step-000002"}))
    older = open_float32(run)
    assert older.step == 2
    assert not torch.equal(opened_logits(older), opened_logits(finished))
    (run / "best.json").unlink()
    assert open_float32(run).step == 4  # the newest
    file = weights_of(run / "checkpoints" / "step-000004")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert torch.equal(opened_logits(open_float32(run)), opened_logits(older))  # the newest that is whole


def test_a_checkpoint_of_full_training_gives_the_logits_of_transformers(runs: Path, tmp_path: Path) -> None:
    run = unfinished(runs / "full", tmp_path / "run")
    theirs = AutoModelForCausalLM.from_pretrained(runs / "base")
    missing, unexpected = theirs.load_state_dict(
        load_file(run / "checkpoints/step-000004/model.safetensors"), strict=False
    )
    assert (missing, unexpected) == ([], [])
    difference = opened_logits(open_float32(run)) - logits(theirs, torch.arange(5, 50)[None])
    assert difference.abs().max() < 1e-4


def flip_weights(run: Path) -> None:
    file = weights_of(run / "checkpoints" / "step-000004")
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_weights, "adapter.safetensors: its content differs from what was saved: remove .*best.json"),
        (lambda run: shutil.rmtree(run / "checkpoints" / "step-000004"), "step-000004.*remove .*best.json"),
        (lambda run: (run / "best.json").write_text('{"checkpoint": "../../base"}'), "checkpoints/base.*remove .*best"),
        (lambda run: (run / "best.json").write_text("[]"), "best.json: expected a JSON object"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json: expected a mapping"),
        (lambda run: [(run / "best.json").unlink(), shutil.rmtree(run / "checkpoints"), (run / "checkpoints").mkdir()],
         "no checkpoint yet: run its train.py"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_opened_says_what_to_do(damage: Any, message: str, runs: Path, tmp_path: Path) -> None:
    run = unfinished(runs / "lora", tmp_path / "run")
    damage(run)
    with pytest.raises(UserError, match=message) as raised:
        open_float32(run)
    assert str(run) in str(raised.value)


def test_a_run_an_adapter_and_a_model_open_as_what_they_are(runs: Path) -> None:
    run, adapter = open_float32(runs / "qlora"), open_float32(runs / "qlora" / "adapter")
    assert torch.equal(opened_logits(run), opened_logits(adapter))
    assert (run.quantization, run.dtype, run.base_directory) == (("nf4", True), torch.bfloat16, runs / "base")
    packed = [m for m in run.model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 14
    assert {m.dequantize().dtype for m in packed} == {torch.bfloat16}  # rounded as it was in training
    original = open_float32(runs / "qlora", original_base=True)
    assert not any(isinstance(module, PackedLinear) for module in original.model.modules())
    assert original.quantization == ("nf4", True)
    base, full = open_float32(runs / "base"), open_float32(runs / "full")
    assert (base.adapters, full.adapters) == ({}, {})
    assert full.base_directory == runs / "full" / "model"
    assert not any(opened.model.training for opened in (run, adapter, original, base, full))
    assert not torch.equal(opened_logits(base), opened_logits(full))


@pytest.mark.parametrize("source", ["", "/no/such", "a/b/c"])
def test_what_is_nothing_is_an_error_even_in_a_run_directory(
    source: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs / "lora")
    with pytest.raises(UserError, match=r"empty|no such directory"):
        open_float32(source)


# --- adapters of other tools


def peft_adapter(runs: Path, out: Path, **settings: Any) -> PeftModel:
    """An adapter that PEFT made and saved, with random values in it."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(runs / "base")
    theirs = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(out)
    return theirs


def set_adapter_config(adapter: Path, **changes: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("trained", "stored"),
    [
        ("all-linear", None),
        ("all-linear", "all-linear"),
        (r".*\.(q_proj|down_proj)", r".*\.(q_proj|down_proj)"),
        (r"model\.layers\.1\.mlp\..*_proj", r"model\.layers\.1\.mlp\..*_proj"),
        (["q_proj", "self_attn.v_proj"], None),
        (["layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"], None),
    ],
)
def test_target_modules_mean_what_they_mean_to_peft(trained: Any, stored: Any, runs: Path, tmp_path: Path) -> None:
    theirs = peft_adapter(runs, tmp_path / "adapter", target_modules=trained)
    if stored is not None:
        set_adapter_config(tmp_path / "adapter", target_modules=stored)
    opened = open_float32(tmp_path / "adapter")
    named = {
        name.removeprefix(PEFT_PREFIX).partition(".lora_")[0]
        for name, _ in theirs.named_parameters()
        if "lora_" in name
    }
    assert set(opened.adapters) == named
    assert (opened_logits(opened) - logits(theirs, torch.arange(5, 50)[None])).abs().max() < 1e-5


def test_what_peft_can_and_this_cannot_is_refused_by_name(runs: Path, tmp_path: Path) -> None:
    peft_adapter(runs, tmp_path / "adapter", target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(UserError, match="init_lora_weights: 'pissa' is not supported") as raised:
        open_float32(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_embeddings_saved_beside_an_adapter_are_read(runs: Path, tmp_path: Path) -> None:
    theirs = peft_adapter(runs, tmp_path / "adapter", target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    opened = open_float32(tmp_path / "adapter")
    assert {"model.embed_tokens", "lm_head"} < opened.adapters.keys()
    assert (opened_logits(opened) - logits(theirs, torch.arange(5, 50)[None])).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": "x"}, "lora.rank: 'x' is not an integer"),
        ({"r": True}, "lora.rank: True is not an integer"),
        ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
        ({"r": 10**12}, "lora.rank: 1000000000000 is out of range"),  # before memory for it is asked for
        ({"lora_alpha": "6"}, "lora.alpha: '6' is not a finite number"),
        ({"lora_alpha": float("nan")}, "lora.alpha: nan is not a finite number"),
        ({"target_modules": []}, r"target_modules: \(\[\],\) is not a list of names"),
        ({"target_modules": [3]}, r"target_modules: \(3,\) is not a list"),
        ({"target_modules": "("}, r"target_modules: '\(' is not a regular expression"),
        ({"target_modules": "q_.*"}, r"target_modules: 'q_\.\*' matches no linear of this model"),
        ({"rank_pattern": {"q_proj": "x"}}, "lora.rank_pattern: .* is not a mapping"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj has rank 4, but adapter_config.json says 3"),
        ({"alpha_pattern": {"q_proj": 0}}, "lora.alpha_pattern: 0 is out of range"),
        ({"alpha_pattern": {"(": 1}}, r"lora.alpha_pattern: '\(' is not a regular expression"),
        ({"bias": "some"}, "bias: 'some' is not supported"),
        ({"base_model_name_or_path": None}, "adapter_config.json: base_model_name_or_path: empty"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path: 3 is not a name"),
        ({"base_model_name_or_path": "/no/such"}, "adapter_config.json: base_model_name_or_path: /no/such: no such"),
        ({"peft_type": "IA3"}, "peft_type: 'IA3' is not supported"),
        ({"revision": "v2"}, "is a directory, which has no revisions: remove @v2"),
        ({"lora_bias": True}, "lora_bias: True is not supported"),
        ({"unheard_of": 1}, "unheard_of: 1 is not supported"),
    ],
)
def test_an_adapter_config_of_the_wrong_kind_is_refused(
    changes: dict[str, Any], message: str, runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    set_adapter_config(tmp_path / "adapter", **changes)
    with pytest.raises(UserError, match=message) as raised:
        open_float32(tmp_path / "adapter")
    assert str(tmp_path / "adapter") in str(raised.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", "[]", "expected a JSON object"),
        ("adapter_config.json", "{", "not valid JSON"),
        ("adapter_model.safetensors", "garbage", "adapter_model.safetensors: corrupted"),
        ("nanoft.json", "[]", "nanoft.json: expected a JSON object"),
        ("nanoft.json", '{"quantization": "nf4"}', "nanoft.json: corrupted"),
        ("nanoft.json", '{"quantization": {"type": "nf5", "double": true}}', "nanoft.json: corrupted"),
        ("nanoft.json", '{"dtype": []}', "nanoft.json: corrupted"),
    ],
)
def test_an_adapter_with_a_damaged_file_is_refused(
    file: str, content: str, message: str, runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / file).write_text(content)
    with pytest.raises(UserError, match=message):
        open_float32(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"\(32, 4\) .* but \(64, 4\)"),
        ({"num_hidden_layers": 1}, "is it the right base?"),
    ],
)
def test_an_adapter_on_another_base_is_refused(
    changes: dict[str, int], message: str, runs: Path, tmp_path: Path
) -> None:
    make_chat_model(tmp_path / "other", **changes)
    shutil.copytree(runs / "lora" / "adapter", tmp_path / "adapter")
    set_adapter_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(UserError, match=message):
        open_float32(tmp_path / "adapter")


def test_random_weights_need_a_config_only_and_follow_the_seed(tmp_path: Path) -> None:
    make_reference("qwen2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, again, other = (load(tmp_path, random_seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    for name, parameter in first.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(not name.endswith("bias")))), name
        else:
            assert 0.001 < parameter.std() < 0.03, name
