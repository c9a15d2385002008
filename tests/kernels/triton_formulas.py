"""Triton's kernels and their formulas, on a CPU by Triton's interpreter, or on a GPU; in a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import Patch
from tiers import rest_is_slow
from tiny_families import make_family
from torch import Tensor

from nanoft import attention, kernels, nf4
from nanoft.blocks.norms import RMSNorm
from nanoft.config import Config
from nanoft.kernels import fused
from nanoft.kernels import triton_kernels as own
from nanoft.model import ACTIVATIONS, MLP, SelfAttention
from nanoft.models.families import FAMILIES
from nanoft.models.weights import load_model

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def enabled(monkeypatch: Patch) -> None:
    monkeypatch.setattr(fused, "_kernels", {})
    monkeypatch.setattr(nf4, "UNPACKERS", {})
    assert fused.enable(DEVICE) == ""
    assert fused.kernels(torch.empty(0, device=DEVICE)) is own


def agrees(found: Callable[..., Tensor], formula: Callable[..., Tensor], inputs: list[Tensor], *others: Tensor) -> None:
    """Output and gradients: of float64 and float32 up to rounding, else within about a unit in the last place."""
    dtype = inputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    wide_leaves = [x.to(wide).requires_grad_() for x in inputs]
    y, expected = found(*leaves, *others), formula(*wide_leaves, *(x.to(wide) for x in others))
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    assert y.dtype == dtype
    pairs = [(y, expected)]
    gradients = torch.autograd.grad(expected, wide_leaves, g.to(wide))
    pairs += zip(torch.autograd.grad(y, leaves, g), gradients, strict=True)
    bound = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 1.01 * torch.finfo(dtype).eps)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.to(wide), theirs, rtol=bound, atol=bound)


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", nf4.CODES)
def test_four_bits_are_unpacked_as_by_bitsandbytes(kind: str, double: bool, dtype: torch.dtype) -> None:
    """72 x 320 weights are 360 blocks of 64: the last program has 8 of its 16, and there are two nested blocks."""
    layer = nf4.quantize(random(torch.float32, 72, 320), (kind, double), dtype)
    found, expected = own.unpack_4bit(layer.parts, kind, dtype), nf4.unpack_bitsandbytes(layer.parts, kind, dtype)
    if DEVICE.type == "cpu" and dtype == torch.bfloat16:  # the interpreter truncates
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [48, 64, 896])  # of 896 numbers: more than one warp
def test_the_norm(size: int, offset: float, dtype: torch.dtype) -> None:

    def found(x: Tensor, w: Tensor) -> Tensor:
        return own.rms_norm(x, w, 1e-5, offset)  # type: ignore[no-any-return]

    def formula(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (size,), offset + w, 1e-5)

    agrees(found, formula, [random(dtype, 2, 3, size)], random(dtype, size, seed=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["separate", "fused"])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_and_gate(kind: str, form: str, dtype: torch.dtype) -> None:
    size = own.WIDTH + 70  # a second program for the rest of each row
    if form == "separate":
        inputs = [random(dtype, 2, 2, size), random(dtype, 2, 2, size, seed=1)]
        agrees(lambda g, u: own.gated(g, u, kind), lambda g, u: ACTIVATIONS[kind](g) * u, inputs)
    else:  # two halves of a row
        both = [random(dtype, 2, 2, 2 * size)]
        agrees(
            lambda x: own.gated(*x.chunk(2, -1), kind),
            lambda x: ACTIVATIONS[kind](x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
            both,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [None, 0.0, 1.0], ids=["no norm", "norm", "1 + w"])
@pytest.mark.parametrize(("size", "turned"), [(16, 16), (12, 12), (12, 6)])
@pytest.mark.parametrize("batch", ["shared angles", "angles of each", "strided"])
def test_rotation_with_and_without_norm(
    batch: str, size: int, turned: int, offset: float | None, dtype: torch.dtype
) -> None:
    rows = 2 if batch == "angles of each" else 1
    angles = random(torch.float32, rows, 5, 1, turned // 2, seed=2) * 3
    cos, sin, w = angles.cos().to(dtype), angles.sin().to(dtype), random(dtype, size, seed=1)
    norm = {} if offset is None else {"weight": w, "eps": 1e-5, "offset": offset}

    def heads(x: Tensor) -> Tensor:
        return x[..., 2 * size :].unflatten(-1, (3, size)) if batch == "strided" else x.unflatten(-1, (3, size))

    def formula(x: Tensor, cos: Tensor, sin: Tensor, w: Tensor) -> Tensor:
        x = heads(x) if offset is None else F.rms_norm(heads(x), (size,), offset + w, 1e-5)
        return attention.rotate(x, cos, sin)

    width = (5 if batch == "strided" else 3) * size  # queries, keys and values of one projection
    inputs = [random(dtype, 2, 5, width)]
    agrees(lambda x, c, s, _: own.rotate(heads(x), c, s, **norm), formula, inputs, cos, sin, w)


@pytest.mark.parametrize("family", rest_is_slow(FAMILIES, "qwen3", "gemma3_text", "phi3"))
def test_a_step_of_each_family_is_that_of_the_core(family: str, enabled: None, tmp_path: Path) -> None:
    make_family(family, tmp_path)
    model = load_model(tmp_path, DEVICE, torch.float32)
    assert kernels.verify(model.config, Config().lora) == ""


@pytest.mark.parametrize("name", ["rms_norm", "gated", "rotate"])
def test_they_are_used_and_a_wrong_one_is_found(name: str, enabled: None, tmp_path: Path, monkeypatch: Patch) -> None:
    make_family("qwen3", tmp_path)
    model = load_model(tmp_path, DEVICE, torch.float32)
    right = getattr(own, name)
    monkeypatch.setattr(own, name, lambda *values, **more: right(*values, **more) * 1.001)
    assert "hidden" in kernels.verify(model.config, Config().lora)
    monkeypatch.setattr(fused, "_kernels", {})  # and before that, by their own check
    warning = fused.enable(DEVICE)
    assert "Triton" in warning
    assert {"rms_norm": "RMSNorm", "gated": "silu", "rotate": "rotation"}[name] in warning
    assert kernels.verify(model.config, Config().lora) == ""


def test_where_they_cannot_run_formulas_do(enabled: None, tmp_path: Path, monkeypatch: Patch) -> None:
    def fail(device: torch.device) -> str:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    make_family("llama", tmp_path)
    model = load_model(tmp_path, DEVICE, torch.float32)
    monkeypatch.setattr(fused, "_kernels", {})
    monkeypatch.setattr(own, "first_difference", fail)
    assert "(RuntimeError: Failed to find C compiler.)" in kernels.apply(model, Config().lora)
    assert kernels.describe(model).endswith("blocks fast")


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [(RMSNorm, "formula", "RMSNorm"), (MLP, "activate", "silu"), (SelfAttention, "heads", "rotation")],
)
def test_an_edit_of_the_core_is_not_ignored(owner: Any, name: str, said: str, monkeypatch: Patch) -> None:
    formula = getattr(owner, name)

    def edited(*values: Any) -> Any:
        made = formula(*values)
        return [part * 1.01 for part in made] if isinstance(made, tuple) else made * 1.01

    monkeypatch.setattr(owner, name, edited)
    monkeypatch.setattr(fused, "_kernels", {})
    assert f"({said})" in fused.enable(DEVICE)
