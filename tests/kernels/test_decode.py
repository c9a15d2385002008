"""The twin of a block and prepacked weights against the block and the weights."""

from __future__ import annotations

import gc
import platform
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoft import kernels
from nanoft.export.streaming import StreamedDecoder, open_rows
from nanoft.generation.generate import generate, stream
from nanoft.kernels import decode
from nanoft.lora import linears_of
from nanoft.models.weights import load_model
from tiny_models import make_reference

CPU = torch.device("cpu")
HAS_KERNELS = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


@pytest.mark.skipif(not HAS_KERNELS, reason="for x86 with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_prepacked_weight_is_the_same_weight(rows: int, dtype: torch.dtype) -> None:
    weight, x, bias = (torch.randn(shape, dtype=dtype) for shape in ((300, 70), (rows, 70), (300,)))
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    for known in (None, bias):
        expected = exact if known is None else exact + known.double()
        found = decode.prepacked(weight, known)(x)
        assert found.dtype == dtype
        # rounded after each of 70 sums in float32 (Higham 2002, eq. 3.5), and once in the number format
        allowed = 71 * torch.finfo(torch.float32).eps * (size + 5) + torch.finfo(dtype).eps * expected.abs()
        assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("form", [("nf4", True), ("int8", False)])
def test_quantized_weights_are_dequantized_once_while_there_is_memory(
    form: tuple[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies go with the stream, without waiting for the garbage collector, however it ends."""
    make_reference("qwen2", tmp_path)  # with biases
    model, prompts = load_model(tmp_path, CPU, torch.float32, form).eval(), [[5, 9, 3], [1, 2, 3, 4, 5]]
    assert kernels.apply(model) == ""
    linears = linears_of(model)
    copies, dequantize = list[weakref.ref[torch.Tensor]](), type(linears["model.layers.0.mlp.up_proj"]).dequantize

    def noted(linear: Any) -> torch.Tensor:
        weight = dequantize(linear)
        copies.append(weakref.ref(weight))
        return weight

    with monkeypatch.context() as patch:
        patch.setattr(decode, "available_bytes", lambda _: 1000.0)
        assert decode.choose_build(model) is None
        expected = generate(model, prompts, (), 24)
    assert decode.choose_build(model) is decode.plain
    monkeypatch.setattr(type(linears["model.layers.0.mlp.up_proj"]), "dequantize", noted)
    gc.disable()
    try:
        steps = stream(model, prompts, (), 24)
        next(steps), next(steps)
        assert len(copies) == len(linears)
        assert all(copy() is not None for copy in copies)
        steps.close()
        assert generate(model, prompts, (), 24) == expected
        assert len(copies) == 2 * len(linears)
        assert all(copy() is None for copy in copies)
    finally:
        gc.enable()
    assert set(map(type, linears_of(model).values())) == set(map(type, linears.values()))


def test_weights_are_prepacked_only_where_all_are_there_in_one_number_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reference("mistral", tmp_path)
    model = load_model(tmp_path, CPU, torch.float32).eval()
    assert not decode.should_prepack(model)  # so small
    monkeypatch.setattr(decode, "CACHED_BYTES", 0)
    assert decode.should_prepack(model) == HAS_KERNELS
    with torch.autocast("cpu", torch.bfloat16):
        assert not decode.should_prepack(model)
    assert not decode.should_prepack(load_model(tmp_path, CPU, torch.float16).eval())
    assert not decode.should_prepack(StreamedDecoder(open_rows(tmp_path)))
    with monkeypatch.context() as patch:
        patch.setattr(decode, "available_host_bytes", lambda: 1000.0)
        assert not decode.should_prepack(model)
    next(iter(linears_of(model).values())).bfloat16()
    assert not decode.should_prepack(model)
