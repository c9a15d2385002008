"""Grouped products over all experts against the loop over them, and against what a GPU demands of them."""

from __future__ import annotations

import copy
from typing import Any

import grouped_products  # noqa: F401
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanoft.blocks.moe import Experts, Routing
from nanoft.config import LoRAConfig
from nanoft.kernels import experts as kernel
from nanoft.lora import inject_lora
from nanoft.model import MLP, DecoderConfig
from nanoft.nf4 import quantize

SIZES: dict[str, Any] = dict.fromkeys(("vocab_size", "num_layers", "num_heads", "num_kv_heads"), 1)
SIZES |= {"hidden_size": 64, "intermediate_size": 0, "head_dim": 2, "norm_eps": 1e-6, "family": "", "tied": True}
SWITCHES: list[dict[str, Any]] = [{}, {"mlp": "interleaved", "mlp_limit": 0.3, "mlp_bias": True}]
SWITCHES += [{"mlp": "fused", "activation": "gelu_tanh"}]
METHODS: list[dict[str, Any] | None] = [None, {}, {"init": "pissa", "rslora": True}, {"freeze_a": True, "rank": 8}]
FORMS = [None, ("nf4", True), ("nf4", False), ("int8", True)]


def both(
    switches: dict[str, Any], method: dict[str, Any] | None, form: Any, dtype: torch.dtype, device: str = "cpu"
) -> list[Any]:
    """Five experts, of which the last is never chosen, by the loop and with the kernel installed."""
    torch.manual_seed(0)
    config = DecoderConfig(**SIZES, ropes=(None,), windows=(None,), **switches)
    layer = Experts(Routing((True,), 5, 2, 64, True), 64, [MLP(config, 64) for _ in range(5)], config.mlp_bias)
    layer.to(device, dtype).requires_grad_(False)
    for name, linear in [*layer.named_modules()] if form else []:
        if type(linear) is torch.nn.Linear:
            packed = quantize(linear.weight, form, dtype)
            packed.register_parameter("bias", linear.bias)
            layer.set_submodule(name, packed)
    model: Any = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].mlp = layer
    if method is not None:
        inject_lora(
            model,
            LoRAConfig(**{"rank": 3, "alpha": 1.0, "target_modules": (r".*experts\..*",), "dropout": 0.0, **method}),
            0,
        )
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
    layer.choose = lambda logits: logits[:, :4].topk(2).indices  # type: ignore[method-assign]
    fast = copy.deepcopy(model.layers[0])
    kernel.install(fast)
    return [layer, fast.mlp]


def outputs(layer: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Of nine tokens, and the gradients of them and of the adapters."""
    x = torch.arange(9.0 * 64, device=layer.router.weight.device).square().sin().view(1, 9, 64).bfloat16().to(dtype)
    x.requires_grad_()
    y = layer(x)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return y, *torch.autograd.grad(y.sin().sum(), inputs, materialize_grads=True)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a CPU had a kernel for grouped products; PyTorch, or before 2.9 `grouped_products`, loops there."""
    monkeypatch.setattr(kernel, "has_grouped_products", lambda device, dtype: True)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=["gated", "gpt-oss", "fused"])
@pytest.mark.usefixtures("everywhere")
def test_outputs_and_gradients_are_those_of_the_loop(
    switches: dict[str, Any], method: Any, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = both(switches, method, form, torch.float32)
    wanted = outputs(plain, torch.float32)
    monkeypatch.setattr(Experts, "outputs", None)  # not the loop
    for own, other in zip(outputs(fast, torch.float32), wanted, strict=True):
        assert (own - other).norm() <= 1e-4 * other.norm()


class Demands(TorchDispatchMode):
    """Counts grouped products, and lets PyTorch check for each what its kernel on a GPU demands of operands."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_grouped_mm":
            self.count += 1
            values = [arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args]
            assert all(new.stride() == old.stride() for new, old in zip(values[:2], args[:2], strict=True))
            assert all(arg.data_ptr() % 16 == 0 for arg in args[:2])
            offs = args[2] if len(args) > 2 else kwargs["offs"]
            assert offs.dtype == torch.int32
            func(*values[:2], offs=offs.to("meta"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [None, ("nf4", True)], ids=str)
@pytest.mark.parametrize(("method", "products"), [(None, 6), ({}, 24)], ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=["gated", "gpt-oss", "fused"])
@pytest.mark.usefixtures("everywhere")
def test_a_gpu_takes_the_operands(switches: dict[str, Any], method: Any, products: int, form: Any) -> None:
    plain, fast = both(switches, method, form, torch.bfloat16)
    with Demands() as demands:
        found = outputs(fast, torch.bfloat16)
    assert demands.count == products * (2 if switches else 3) // 3
    assert_as_close(found, plain)


def assert_as_close(found: tuple[torch.Tensor, ...], plain: Any) -> None:
    """To what float32 gives, the kernel's results are as close as the loop's."""
    rounded, exact = outputs(plain, torch.bfloat16), outputs(plain.float(), torch.float32)
    for own, other, wanted in zip(found, rounded, exact, strict=True):
        assert (own - wanted).norm() <= 1.5 * (other - wanted).norm() + 0.01 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("switches", SWITCHES, ids=["gated", "gpt-oss", "fused"])
def test_a_gpu_computes_the_same_without_a_wait(switches: dict[str, Any], method: Any, form: Any) -> None:
    plain, fast = both(switches, method, form, torch.bfloat16, "cuda")
    if not kernel.has_grouped_products(torch.device("cuda", 0), torch.bfloat16):
        pytest.skip("this GPU has no kernel for grouped products")
    outputs(fast, torch.bfloat16)  # the first time, kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = outputs(fast, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_as_close(found, plain)


@pytest.mark.usefixtures("everywhere")
def test_weights_of_experts_are_slices_of_one_tensor() -> None:
    for form in FORMS:
        plain, fast = both({}, None, form, torch.float32)
        (own, other) = ([expert.up_proj for expert in layer.experts] for layer in (plain, fast))
        for before, after in zip(
            *(zip(*map(kernel.stored, linears), strict=True) for linears in (own, other)), strict=True
        ):
            if after[0] is not after[1]:  # on a CPU, all have one map of scales
                assert kernel.together(after).data_ptr() == after[0].data_ptr()
            assert torch.equal(kernel.together(after), torch.stack(before))
            assert torch.equal(kernel.together(before), torch.stack(before))


def test_tensors_at_equal_distances_are_viewed_and_others_copied() -> None:
    memory = torch.arange(60.0)
    even = [memory[start : start + 6].view(2, 3) for start in (4, 14, 24)]
    for tensors, is_view in ((even, True), (even[::-1], False), ([*even, memory[30:36].view(2, 3)], False)):
        found = kernel.together(tensors)
        assert torch.equal(found, torch.stack(tensors))
        assert (found.data_ptr() == tensors[0].data_ptr()) == is_view


@pytest.mark.parametrize("change", ["dora", "one expert", "another rank", "trained", "disabled"])
@pytest.mark.usefixtures("everywhere")
def test_the_loop_computes_what_grouped_products_cannot(change: str) -> None:
    methods: dict[str, dict[str, Any]] = {
        "dora": {"dora": True},
        "one expert": {"target_modules": (r".*experts\.0\..*",)},
        "another rank": {"rank_pattern": {r".*experts\.0\..*": 2}},
    }
    plain, fast = both({}, methods.get(change, {}), None, torch.float32)
    if change == "trained":
        plain.experts[2].up_proj.base.weight.requires_grad_()
        kernel.install(block := torch.nn.ModuleDict({"mlp": copy.deepcopy(plain)}))
        fast = block["mlp"]
    for layer in (plain, fast):
        for expert in layer.experts if change == "disabled" else ():
            for linear in expert.children():
                linear.enabled = False
    for own, other in zip(outputs(fast, torch.float32), outputs(plain, torch.float32), strict=True):
        assert (own - other).norm() <= 1e-4 * other.norm()
    assert fast.is_uniform == (change == "disabled")
