"""LoRA and its variants against PEFT (loss and every gradient), against their formulas, and in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters import CPU, IDS, VARIANTS, adapted, peft_model, peft_name, randomize, variant
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import merge
import train
from nanoft import UserError, lora
from nanoft.config import LoRAConfig
from nanoft.config.loading import load_config
from nanoft.lora import LoRALinear, disabled, inject_lora, top_singular_factors, variant_of
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors, load_adapter_tensors
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import open_model
from nanoft.models.weights import load_model
from nanoft.nf4 import quantize
from nanoft.training.self_test import (
    PRODUCT,
    adapter_effect,
    merged_error,
)
from nanoft.training.setup import describe_parameters
from tiny_models import delta, make_chat_model, make_reference, train_run, write_records

TARGETS = torch.tensor([b * 24 + s for b in range(2) for s in range(23)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's shape with a bias on every linear of the blocks."""
    directory = tmp_path_factory.mktemp("base")
    make_reference("llama-bias", directory)
    return directory


def mean_loss(model: Decoder) -> Tensor:
    return token_nll(model(IDS, target_positions=TARGETS), model.head, IDS[:, 1:].flatten()).mean()


def gradients(adapters: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """By PEFT's names, of all that is trained."""
    parts = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "bias": "base_layer.bias"}
    return {
        f"base_model.model.{name}.{parts.get(part, part)}": p.grad
        for name, adapter in adapters.items()
        for part, p in adapter.named_parameters()
        if p.grad is not None
    }


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_one_step_matches_peft_in_loss_and_every_gradient(name: str, base: Path) -> None:
    model, adapters = adapted(base, variant(name))
    theirs = peft_model(base, variant(name))
    parameters = dict(theirs.named_parameters())
    for key, tensor in adapter_tensors(adapters).items():  # DoRA begins with the lengths of the rows
        if "magnitude" in key:
            assert (parameters[peft_name(key)] - tensor).abs().max() < 1e-5
    randomize(adapters)
    with torch.no_grad():
        for key, tensor in adapter_tensors(adapters).items():
            if "lora_A0" not in key and "lora_B0" not in key:
                parameters[peft_name(key)].copy_(tensor)

    expected = theirs(input_ids=IDS, labels=IDS).loss
    expected.backward()
    loss = mean_loss(model)
    loss.backward()
    assert abs(loss.item() - expected.item()) < 2e-5
    ours = gradients(adapters)
    trained = {"lora_A", "lora_B"} if not variant(name).freeze_a else {"lora_B"}
    trained |= {"lora_magnitude_vector"} if variant(name).dora else set()
    trained |= {"base_layer.bias"} if variant(name).bias != "none" else set()
    assert len(ours) == 3 * 7 * len(trained)
    for key, gradient in ours.items():
        reference = parameters[peft_name(key)].grad
        assert gradient.abs().max() > 1e-6, key
        assert (gradient - reference).norm() < 1e-4 * reference.norm() + 1e-6, key
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, ("nf4", True), ("fp4", False), ("int8", False)])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_fresh_adapter_changes_not_one_bit(name: str, quantization: Any, dtype: torch.dtype, base: Path) -> None:
    plain = load_model(base, CPU, dtype, quantization)
    model, adapters = adapted(base, variant(name), quantization, dtype)
    expected = plain.logits(plain(IDS))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(model.logits(model(IDS)), expected)
    with torch.no_grad():
        assert adapter_effect(model, adapters, IDS) == 0
        randomize(adapters)
        assert adapter_effect(model, adapters, IDS) > 0
        with disabled(adapters):
            assert torch.equal(model.logits(model(IDS)), expected)
        assert not torch.equal(model.logits(model(IDS)), expected)


@pytest.mark.parametrize("quantization", [None, ("nf4", True), ("int8", False)])
@pytest.mark.parametrize("name", VARIANTS)
def test_merged_it_does_the_same(name: str, quantization: Any, base: Path) -> None:
    model, adapters = adapted(base, variant(name), quantization)
    randomize(adapters)
    model.eval()
    with torch.no_grad():
        assert merged_error(adapters) <= PRODUCT[torch.float32]
        assert adapter_effect(model, adapters, IDS) > 0.1


def test_only_adapters_train_and_a_is_uniform_in_one_over_root_in(base: Path) -> None:
    model, adapters = adapted(base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in adapters for part in ("lora_A", "lora_B")}
    assert len(adapters) == 3 * 7
    for adapter in adapters.values():
        bound = adapter.base.in_features**-0.5  # Kaiming uniform with a = sqrt(5)
        assert adapter.lora_A.abs().max() <= bound
        assert adapter.lora_A.abs().max() > 0.9 * bound
        assert not adapter.lora_B.any()


def test_pissa_begins_with_the_largest_singular_directions(base: Path) -> None:
    _, adapters = adapted(base, variant("pissa"))
    for adapter in adapters.values():
        u, s, vt = torch.linalg.svd(adapter.base.weight.double())
        best = u[:, :8] * s[:8] @ vt[:8]
        assert (adapter.scaling * (adapter.lora_B @ adapter.lora_A) - best).abs().max() < 1e-4 * best.abs().max()
        assert torch.allclose(adapter.lora_A @ adapter.lora_A.T, adapter.lora_B.T @ adapter.lora_B, atol=1e-4)
        assert not delta(adapter).any()


def test_a_small_change_of_pissa_survives_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(64, 48, bias=False).to(torch.bfloat16)
    layer = variant_of(variant("pissa"))(base, variant("pissa"), generator)
    with torch.no_grad():
        for p in (layer.lora_A, layer.lora_B):  # steps that the numbers themselves would not show in bfloat16
            p.add_(1e-4 * p.std() * torch.randn(p.shape, generator=generator))
    a, b, a0, b0 = layer.lora_A, layer.lora_B, layer.lora_A0, layer.lora_B0
    assert a0 is not None
    assert b0 is not None
    expected = b.double() @ a.double() - b0.double() @ a0.double()
    wide_a, wide_b = (factor.to(torch.bfloat16).double() for factor in layer.factors())
    assert (wide_b @ wide_a - expected).norm() < 0.01 * expected.norm()
    rounded = [factor.to(torch.bfloat16).double() for factor in (a, b, a0, b0)]
    assert (rounded[1] @ rounded[0] - rounded[3] @ rounded[2] - expected).norm() > expected.norm()


def test_a_large_matrix_is_decomposed_approximately(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, r = (torch.linalg.qr(torch.randn(n, 90, generator=generator)).Q for n in (120, 90))
    weight = q * 0.9 ** torch.arange(90.0) @ r.T
    exact = [part.clone() for part in top_singular_factors(weight, 8, generator)]
    monkeypatch.setattr(lora, "EXACT_SVD", 64)
    b, a = top_singular_factors(weight, 8, generator)
    assert (a.shape, b.shape) == ((8, 90), (120, 8))
    assert not torch.equal(a, exact[1])
    assert (b @ a - exact[0] @ exact[1]).abs().max() < 1e-3 * (exact[0] @ exact[1]).abs().max()


# --- DoRA


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, "nf4"])
def test_the_norm_of_each_row_is_that_of_the_sum(base_dtype: Any, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator) * 0.02
    weight[5] = 0
    weight[6] *= 1e-8
    weight[7] *= 1e8
    linear: Any = nn.Linear(256, 96, bias=False)
    linear.weight.data = weight.to(base_dtype) if base_dtype != "nf4" else weight
    if base_dtype == "nf4":
        linear = quantize(weight, ("nf4", False), torch.float32)
    layer = variant_of(variant("dora"))(linear, variant("dora"), generator)
    assert torch.equal(layer.norm(torch.float32), layer.lora_magnitude_vector)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(96, 8, generator=generator) * 0.01 * size)
    whole = lora.weight_of(linear).double() + delta(layer).double()
    expected = whole.norm(dim=1)
    found = layer.norm(torch.float32 if base_dtype != torch.bfloat16 else torch.bfloat16)
    allowed = 1e-5 if base_dtype != torch.bfloat16 else 4e-3
    assert ((found - expected).abs() <= allowed * expected).all()
    assert layer.apply_magnitude_and_bias(torch.randn(3, 96)).isfinite().all()


def test_a_row_that_vanishes_has_a_finite_norm() -> None:
    linear = nn.Linear(64, 32, bias=False)
    layer = variant_of(variant("dora", rank=32))(linear, variant("dora", rank=32), torch.Generator().manual_seed(0))
    with torch.no_grad():  # s B A = -W, but for rounding
        a = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
        linear.weight.copy_(torch.randn(32, 32, generator=torch.Generator().manual_seed(2)) @ a[:32])
        layer.squares.copy_(linear.weight.square().sum(1))
        layer.lora_A.copy_(a[:32])
        layer.lora_B.copy_(-(linear.weight @ a[:32].T) / layer.scaling)
    norm = layer.norm(torch.float32)
    assert norm.isfinite().all()
    assert (norm < 1e-2 * linear.weight.norm(dim=1)).all()
    layer(torch.randn(2, 64)).sum().backward()
    assert layer.lora_B.grad is not None
    assert layer.lora_B.grad.isfinite().all()


def test_the_norm_is_computed_once_in_use_and_anew_in_training(base: Path) -> None:
    model, adapters = adapted(base, variant("dora"))
    randomize(adapters)

    def logits() -> Tensor:
        with torch.no_grad():
            return model.logits(model(IDS))

    adapter = next(iter(adapters.values()))
    model.eval()
    first = logits()
    assert adapter.norm(torch.float32) is not adapter.norm_kept  # gradients are on
    again = logits()
    assert torch.equal(first, again)
    assert adapter.norm_kept is not None
    model.train()
    assert adapter.norm_kept is None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for training in (True, False):  # also where someone forgets to say that this is training
        model.train(training)
        logits()
        mean_loss(model).backward()
        optimizer.step()
        fresh = copy.deepcopy(model).train()
        with torch.no_grad():
            assert torch.equal(logits(), fresh.logits(fresh(IDS)))


def test_dropout_acts_on_the_adapter_only_while_training(base: Path) -> None:
    """In DoRA, too: c (W x + s B A d(x)); PEFT's (c - 1) W d(x) would cost a second product with W."""
    x = torch.randn(1, 4, 64)
    for name in ("lora", "dora"):
        model, adapters = adapted(base, variant(name, dropout=0.5, target_modules=("q_proj",)))
        randomize(adapters)
        layer = next(iter(adapters.values()))
        model.train()
        assert not torch.equal(layer(x), layer(x))
        torch.manual_seed(3)
        found = layer(x)
        torch.manual_seed(3)
        mask = F.dropout(torch.ones(4, 64), 0.5)
        merged = layer.merged(layer.base.weight)
        c = merged.norm(dim=1) / (layer.base.weight + delta(layer)).norm(dim=1)
        expected = c * (x @ layer.base.weight.T + (x * mask) @ delta(layer).T) + layer.base.bias
        assert torch.allclose(found, expected, atol=1e-4)
        model.eval()
        assert torch.allclose(layer(x), x @ merged.T + layer.base.bias, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", VARIANTS)
def test_on_cuda_a_step_is_that_of_the_cpu(name: str, base: Path) -> None:
    changes: dict[str, Any] = {"target_modules": ("q_proj", "v_proj")} if name == "lora" else {}  # k_proj among them
    found = []
    tensors: dict[str, Tensor] = {}  # the same on both: PiSSA's decomposition may differ
    for device in ("cpu", "cuda"):
        model = load_model(base, torch.device(device), torch.float32)
        adapters = inject_lora(model, variant(name, **changes), seed=1)
        if not tensors:
            randomize(adapters)
            tensors = {key: tensor.clone() for key, tensor in adapter_tensors(adapters).items()}
        load_adapter_tensors(adapters, tensors, "cpu")
        model(IDS.to(device)).square().mean().backward()
        found.append({key: gradient.cpu() for key, gradient in gradients(adapters).items()})
    for key, gradient in found[0].items():
        assert (found[1][key] - gradient).norm() < 1e-2 * gradient.norm(), key  # TF32


@pytest.mark.parametrize("freeze", [False, True])
def test_a_frozen_a_costs_no_product_for_its_gradient(freeze: bool) -> None:
    n, inputs, outputs, r = 32, 64, 48, 8
    linear = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    layer = variant_of(variant("lora", freeze_a=freeze))(linear, variant("lora", freeze_a=freeze), torch.Generator())
    x = torch.randn(n, inputs, requires_grad=True)
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    dx, db, da = n * outputs * (inputs + r) + n * r * inputs, n * outputs * r, n * r * inputs
    assert counter.get_total_flops() == 2 * (dx + db + (0 if freeze else da))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", ["lora", "together", "pissa"])
def test_a_compiled_block_has_the_gradients_of_an_eager_one(name: str, base: Path) -> None:
    model, adapters = adapted(base, variant(name))
    randomize(adapters)
    mean_loss(model).backward()
    eager = gradients(adapters)
    model.zero_grad(set_to_none=True)
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    mean_loss(model).backward()
    compiled = gradients(adapters)
    assert compiled.keys() == eager.keys()
    for key, gradient in compiled.items():
        assert (gradient - eager[key]).norm() < 1e-4 * eager[key].norm(), key


def test_bfloat16_base_keeps_float32_adapters(base: Path) -> None:
    model, adapters = adapted(base, variant("together"), dtype=torch.bfloat16)
    model(IDS).float().sum().backward()
    found = gradients(adapters)
    assert len(found) == 3 * 7 * 3
    for adapter in adapters.values():
        assert {p.dtype for p in adapter.parameters() if p.requires_grad} == {torch.float32}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


# --- which linears


@pytest.mark.parametrize("target", ["q_prj", "norm", "model", r".*\.[xy]_proj"])
def test_a_target_that_names_no_linear_is_refused_with_the_names_there_are(base: Path, target: str) -> None:
    with pytest.raises(UserError, match=r"matches no linear.*q_proj, k_proj, v_proj.*training.method=full") as raised:
        adapted(base, LoRAConfig(target_modules=("q_proj", target)))
    assert f"lora.target_modules: {target!r} " in str(raised.value)


ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (("all-linear",), ATTENTION | MLP),
        (("attention",), ATTENTION),
        (("mlp",), MLP),
        (("mlp", "q_proj"), MLP | {"q_proj"}),
        (("self_attn.v_proj", "k_proj"), {"v_proj", "k_proj"}),
        ((r".*\.(q|o)_proj",), {"q_proj", "o_proj"}),
    ],
)
def test_words_names_and_expressions(targets: tuple[str, ...], wanted: set[str], base: Path) -> None:
    _, adapters = adapted(base, LoRAConfig(target_modules=targets))
    assert {name.rpartition(".")[2] for name in adapters} == wanted
    assert len(adapters) == 3 * len(wanted)


def test_one_layer_alone(base: Path) -> None:
    for target in ("model.layers.1.mlp.up_proj", "layers.1.mlp.up_proj", r"model\.layers\.1\.mlp\.up_.*"):
        assert list(adapted(base, LoRAConfig(target_modules=(target,)))[1]) == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "lora.rank_pattern: 'q_prj' matches no adapter"),
        (
            {"alpha_pattern": {"q_proj": 4}, "target_modules": ("mlp",)},
            "lora.alpha_pattern: 'q_proj' matches no adapter",
        ),
        ({"modules_to_save": ("lm_haed",)}, "lora.modules_to_save: 'lm_haed' matches no module .* lm_head"),
        ({"trainable_token_indices": {"embed_tokens": [199]}}, "embed_tokens: 199: ids must be below 199"),
        ({"trainable_token_indices": {"embed_tokens": [1, 1]}}, "embed_tokens: 1: ids must be below 199"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "trainable_token_indices: q_proj: use embed_tokens and lm_head"),
        (
            {"trainable_token_indices": {"lm_head": [1]}, "modules_to_save": ("lm_head",)},
            "lora.trainable_token_indices: lm_head: already trained",
        ),
        ({"target_modules": ("embed_tokens",), "dora": True}, "model.embed_tokens: embeddings take plain LoRA only"),
        ({"target_modules": ("embed_tokens",), "freeze_a": True}, "embeddings take plain LoRA only"),
        ({"init": "pissa", "rank": 33}, "lora.rank: 33: model.layers.0.self_attn.k_proj has only 32 singular values"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: Any, message: str, base: Path) -> None:
    with pytest.raises(UserError, match=message):
        adapted(base, LoRAConfig(**settings))


def test_the_table_of_what_is_frozen_and_trained(base: Path) -> None:
    lora = LoRAConfig(rank=8, target_modules=("q_proj", "mlp"), rank_pattern={"1.mlp.up_proj": 2})
    said = dict(line.split(": ", 1) for line in describe_parameters(adapted(base, lora)[0]))
    assert said["q_proj"] == "3,072 trained in float32, rank 8; 12,480 frozen in float32"
    up = "3,072 trained in float32, rank 8; 384 trained in float32, rank 2; 24,960 frozen in float32"
    assert {*said["up_proj"].split("; ")} == {*up.split("; ")}
    assert said["v_proj"] == "6,240 frozen in float32"
    frozen_a = LoRAConfig(rank=8, target_modules=("v_proj",), freeze_a=True, dora=True, bias="lora_only")
    model, _ = adapted(base, frozen_a)
    said = dict(line.split(": ", 1) for line in describe_parameters(model))
    assert "960 trained in float32, rank 8" in said["v_proj"]  # 3 * (32 * 8 + 32 + 32)
    numbers = [int(part.split()[0].replace(",", "")) for text in said.values() for part in text.split("; ")]
    assert sum(numbers) == sum(p.numel() for p in model.parameters())


# --- every entry of the table


@pytest.fixture(scope="module", params=list(lora.VARIANTS), ids=lambda key: f"{key[0]}{'-dora' * key[1]}")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with each entry of VARIANTS: a new variant is tested without being listed here."""
    init, dora = request.param
    root = tmp_path_factory.mktemp("variant")
    make_chat_model(root / "base")
    return train_run(root / "run", root / "base", write_records(root / "d.jsonl"), lora__init=init, lora__dora=dora)


def test_a_variant_resumes_bit_for_bit(trained: Path) -> None:
    file = trained / "adapter" / "adapter_model.safetensors"
    before = file.read_bytes()
    checkpoint = str(trained / "checkpoints" / "step-000002")
    assert train.main([str(trained / "config.json"), f"output.dir={trained}", "--resume", checkpoint]) == 0
    assert file.read_bytes() == before


@pytest.mark.parametrize("option", ["--plan", "--selftest"])
def test_a_variant_is_planned_and_passes_the_self_test(
    trained: Path, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [str(trained / "config.json"), f"output.dir={tmp_path / 'run'}", option]
    assert train.main(settings) == 0, capsys.readouterr().err


@torch.no_grad()
def test_a_variant_is_saved_and_merged_as_it_was_trained(trained: Path, tmp_path: Path) -> None:
    """Three ways to the same logits: the last checkpoint, the adapter's files, the merged model."""
    file = trained / "checkpoints" / "step-000004" / "adapter.safetensors"
    model = load_model(ModelFiles.read(trained.parent / "base"), CPU, torch.float32)
    settings = load_config(trained / "config.json", environment={}).lora
    adapters = inject_lora(model, settings, seed=0)
    base = model.eval().logits(model(IDS))
    load_adapter_tensors(adapters, load_file(file), str(file))
    expected = model.logits(model(IDS))
    assert (expected - base).norm() > 1e-3 * base.norm()
    loaded = open_model(str(trained / "adapter"), CPU, torch.float32).model
    assert merge.main([str(trained), "--out", str(tmp_path / "merged"), "--dtype", "f32"]) == 0
    merged = open_model(str(tmp_path / "merged"), CPU, torch.float32).model
    for other in (loaded, merged):
        assert torch.allclose(other.logits(other(IDS)), expected, atol=1e-4, rtol=1e-4)
