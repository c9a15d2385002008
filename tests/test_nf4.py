"""Packed linears against bitsandbytes bit for bit, against the published code book, and what a compiler keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from nanoft import UserError, nf4
from nanoft.blocks import double_quantization
from nanoft.blocks.double_quantization import dynamic_map, pack_scales
from nanoft.nf4 import (
    CODES,
    Frozen,
    PackedLinear,
    matmul,
    matmul_backward,
    pack_4bit,
    pack_8bit,
    packed_bytes,
    quantize,
    unpack,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]


@pytest.fixture(params=["bitsandbytes", "table"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each of the two implementations of unpacking, on the CPU."""
    monkeypatch.setattr(nf4, "uses_bitsandbytes", lambda device_type: request.param == "bitsandbytes")
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weight(rows: int = 96, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


# --- against bitsandbytes, bit for bit


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal in format and value; signs of zeros may differ, and AVX-512 has no bfloat16 denormals."""
    if ours.dtype == theirs.dtype == torch.bfloat16:
        tiny = torch.finfo(torch.bfloat16).tiny
        ours, theirs = (torch.where(t.abs() < tiny, 0, t) for t in (ours, theirs))
    return ours.dtype == theirs.dtype and torch.equal(ours.flatten(), theirs.flatten())


def check_4bit(w: Tensor, kind: str) -> None:
    """Codes, scales, scales of scales and the unpacked weight, both ways to unpack: as bitsandbytes has them."""
    packed, absmax = pack_4bit(w, kind)
    theirs, state = bnb.functional.quantize_4bit(w, blocksize=64, quant_type=kind)
    assert same_bits(packed, theirs)
    assert same_bits(absmax, state.absmax)
    codes, nested, values, offset = pack_scales(absmax)
    _, double = bnb.functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=True)
    pairs = [(codes, double.absmax), (nested, double.state2.absmax), (values, double.state2.code)]
    for own, other in [*pairs, (offset, double.offset)]:
        assert same_bits(own, other)
    for parts, one in (([packed, absmax], state), ([packed, codes, nested, values, offset], double)):
        for dtype in DTYPES:
            wanted = bnb.functional.dequantize_4bit(theirs, in_rows_of_64(one, dtype)).view(w.shape)
            for unpack_4bit in (nf4.unpack_bitsandbytes, nf4.unpack_table):
                assert same_bits(unpack_4bit(parts, kind, dtype).view(w.shape), wanted), (unpack_4bit, dtype)


def in_rows_of_64(state: Any, dtype: torch.dtype) -> Any:
    """The state for another output format; see test_bitsandbytes_takes_wrong_scales_... for the shape."""
    changed = copy.copy(state)
    changed.shape, changed.dtype = torch.Size((math.prod(state.shape) // 64, 64)), dtype
    return changed


@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 9),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-6, 0.02, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
@example(rows=37, blocks=7, kind="nf4", dtype=torch.float32, scale=0.02, seed=0)  # 259 blocks: one more than 256
@example(rows=1, blocks=1, kind="fp4", dtype=torch.bfloat16, scale=0.02, seed=0)
def test_random_weights_pack_as_bitsandbytes_packs_them(
    rows: int, blocks: int, kind: str, dtype: torch.dtype, scale: float, seed: int
) -> None:
    w = weight(rows, 64 * blocks, seed) * scale * torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed))
    check_4bit(w.to(dtype), kind)


def special(name: str) -> Tensor:
    w = weight(64, 128)
    if name == "zero blocks":
        w[::3] = 0
    elif name == "nothing but zeros":
        w[:] = 0
    elif name == "equal blocks":
        w[:] = 0.1
    elif name == "equal blocks, both signs":
        w[:] = 0.1
        w[:, 1::2] = -0.1
    elif name == "denormals":
        w[5:9] *= 1e-38  # below the smallest normal float32
    elif name == "ties":  # every middle between two code points, and its neighbours
        points = torch.tensor(CODES["nf4"] + CODES["fp4"]).sort().values
        middles = (points[:-1] + points[1:]) / 2
        around = torch.cat([middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0))])
        w = torch.zeros(len(around), 64)
        w[:, 0] = torch.tensor([1.0, -1.0, 0.37]).repeat(len(around))[: len(around)]  # absmax
        w[:, 1:] = around[:, None] * w[:, :1].abs()
    elif name == "one outlier":
        w[3, 7] = 1e4
    return w


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "name",
    [
        "zero blocks",
        "nothing but zeros",
        "equal blocks",
        "equal blocks, both signs",
        "denormals",
        "ties",
        "one outlier",
    ],
)
def test_special_weights_pack_as_bitsandbytes_packs_them(name: str, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_4bit(special(name).to(dtype), kind)


def test_a_weight_of_several_chunks_packs_as_bitsandbytes_packs_it() -> None:
    w = weight(520, 64 * 33).to(torch.bfloat16)
    assert nf4.CHUNK < w.numel() < 2 * nf4.CHUNK
    check_4bit(w, "nf4")


def test_scales_at_the_edges_of_the_8_bit_grid_pack_as_bitsandbytes_packs_them() -> None:
    codes = double_quantization._nearest_dynamic()
    edges = (codes.int().diff() != 0).nonzero().flatten() + 0.5  # where the nearest value of the map changes
    near = [(2 * edges / 65535 - 1)]
    for _ in range(20):
        near += [near[-1].nextafter(torch.tensor(2.0))]
        near = [near[0].nextafter(torch.tensor(-2.0)), *near]
    absmax = torch.cat(near)
    absmax = torch.cat([absmax, -absmax])  # the mean is zero
    ours, nested, _, offset = pack_scales(absmax)
    theirs, state = bnb.functional.quantize_blockwise(absmax - offset, blocksize=256)
    assert same_bits(ours, theirs)
    assert same_bits(nested, state.absmax)


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    assert same_bits(dynamic_map(), bnb.functional.create_dynamic_map())


@pytest.mark.parametrize("shape", [(8, 32), (4, 96), (128, 16)])
def test_rows_that_are_no_multiple_of_64_are_unpacked_with_their_own_scales(
    shape: tuple[int, int], backend: str
) -> None:
    """bitsandbytes 0.50 itself, asked for such a shape on a CPU with AVX-512, takes the scales of other blocks."""
    w = weight(*shape) * torch.arange(1, shape[0] + 1)[:, None]
    found = quantize(w, ("nf4", False), torch.float32).dequantize()
    assert found.shape == w.shape
    blocks, errors = w.view(-1, 64), (found - w).view(-1, 64)
    widest = (CODES["nf4"][1] - CODES["nf4"][0]) / 2  # no value is farther from a code point
    assert (errors.abs() <= widest * 1.0001 * blocks.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bits_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    w = weight(33, 40).to(dtype)
    codes, absmax = pack_8bit(w)
    theirs, scales, _ = bnb.functional.int8_vectorwise_quant(w.clone())
    assert same_bits(codes, theirs)
    assert same_bits(absmax, scales)
    unpacked = unpack([codes, absmax], "int8", w.shape, torch.float32)
    wanted = bnb.functional.int8_vectorwise_dequant(theirs, scales)
    assert torch.allclose(unpacked, wanted, rtol=3e-7, atol=0)  # 1/127 is rounded at another place
    exact = codes.double() * absmax.double()[:, None] / 127
    for result in DTYPES:
        assert torch.allclose(unpack([codes, absmax], "int8", w.shape, result).double(), exact, rtol=2.0**-8, atol=1e-9)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30])
def test_8_bits_of_a_row_of_almost_nothing_are_finite(value: float) -> None:
    w = weight(4, 64)
    w[2] = value
    unpacked = quantize(w, ("int8", False), torch.float32).dequantize()
    assert (unpacked - w).abs().max() <= w.abs().max() / 254 * 1.001


# --- against the definition


def test_dequantised_nf4_is_the_nearest_code_point_times_absmax(backend: str) -> None:
    w = weight()
    blocks = w.reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(CODES["nf4"])
    nearest = codes[(blocks / scale)[..., None].sub(codes).abs().argmin(-1)] * scale
    layer = quantize(w, ("nf4", False), torch.float32)
    assert (layer.dequantize().reshape(-1, 64) - nearest).abs().max() < 1e-6


def test_the_code_points_of_nf4_are_the_published_ones() -> None:
    """QLoRA (Dettmers et al. 2023), appendix E; and symmetric in how many there are: 7 below zero, zero, 8 above."""
    published = """
        -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
        -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
        0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
    """
    assert CODES["nf4"] == tuple(map(float, published.split()))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_input_gradient_equal_bitsandbytes(
    kind: str, double: bool, dtype: torch.dtype, backend: str
) -> None:
    w = weight().to(dtype)
    ours = quantize(w, (kind, double), dtype)
    theirs = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=dtype, compress_statistics=double, quant_type=kind)
    theirs.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, compress_statistics=double, quant_type=kind)
    theirs = theirs.to("cpu")
    x = torch.randn(5, 7, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    assert torch.allclose(ours(a), theirs(b), atol=tolerance)
    ours(a).square().sum().backward()
    theirs(b).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad, atol=tolerance, rtol=tolerance)


# --- products, as a linear with an adapter asks for them


def frozen_layers() -> dict[str, Frozen]:
    linear = nn.Linear(128, 96, bias=False)
    linear.weight = nn.Parameter(weight(), requires_grad=False)
    packed = {f"{kind} {double}": quantize(weight(), (kind, double), torch.float32) for kind, double in FORMS}
    return {"linear": linear, **packed}


def dense(layer: Frozen) -> Tensor:
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.dequantize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", *(f"{kind} {double}" for kind, double in FORMS)])
def test_products_are_those_of_the_unpacked_weight(name: str, dtype: torch.dtype) -> None:
    layer = frozen_layers()[name]
    x, grad = torch.randn(2, 3, 128).to(dtype), torch.randn(2, 3, 96).to(dtype)
    w = dense(layer).to(dtype)
    assert torch.equal(matmul(layer, x), x @ w.T)
    assert torch.equal(matmul_backward(layer, grad), grad @ w)
    assert matmul(layer, x).dtype == matmul_backward(layer, grad).dtype == dtype
    assert (dense(layer) - weight()).abs().max() < (0.001 if name.startswith("int8") else 0.05)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_a_layer_is_the_exact_one(form: tuple[str, bool]) -> None:
    layer = quantize(weight(), form, torch.float32)
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("form", FORMS)
def test_the_operator_keeps_the_rules_of_an_operator(form: tuple[str, bool]) -> None:
    layer = quantize(weight(), form, torch.float32)
    for transposed, size in ((False, 128), (True, 96)):
        x = torch.randn(2, 3, size)
        torch.library.opcheck(
            torch.ops.nanoft.frozen_matmul.default, (x, layer.parts, layer.kind, (96, 128), torch.float32, transposed)
        )


@pytest.mark.parametrize("form", FORMS)
def test_backward_keeps_the_packed_weight_only(form: tuple[str, bool]) -> None:
    layer = quantize(weight(), form, torch.float32)
    x = torch.randn(3, 128, requires_grad=True)
    assert not kept(layer, x)
    bound = 1.05 if form[0] == "int8" else 0.53 + 0.04 * (not form[1])
    assert packed_bytes(layer) < 96 * 128 * bound + 2048  # 4.13 bits a weight (4.5 without double) and a map


def kept(model: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The tensors that one forward pass saves for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    return saved


class Mixed(nn.Module):
    """A packed layer between two ordinary things that save something; or the same, open to the compiler."""

    def __init__(self, layer: PackedLinear, opaque: bool):
        super().__init__()
        self.layer, self.opaque, self.scale = layer, opaque, nn.Parameter(torch.ones(96))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(x)
        y = self.layer(x) if self.opaque else x @ (self.layer.packed.view(96, -1).repeat(1, 2).to(x.dtype) / 255).T
        return (y * self.scale).sin()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's use of torch itself
@pytest.mark.parametrize("backend_name", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", [("nf4", True), ("int8", False)])
def test_a_compiled_layer_never_keeps_the_unpacked_weight(form: tuple[str, bool], backend_name: str) -> None:
    torch._dynamo.reset()
    layer = quantize(weight(), form, torch.float32)
    model = Mixed(layer, opaque=True)
    compiled = torch.compile(model, fullgraph=True, backend=backend_name)
    x = torch.randn(4, 128)
    results = []
    for run in (model, compiled):
        leaf = x.clone().requires_grad_()
        run(leaf).sum().backward()
        assert leaf.grad is not None
        assert model.scale.grad is not None
        results += [(run(x), leaf.grad, model.scale.grad.clone())]
        model.scale.grad = None
    for eager, other in zip(*results, strict=True):
        assert torch.allclose(eager, other, atol=1e-5, rtol=1e-5)
    own = {part.untyped_storage().data_ptr() for part in layer.parts}
    saved = [t for t in kept(compiled, x.clone().requires_grad_()) if t.untyped_storage().data_ptr() not in own]
    assert 0 < sum(t.numel() for t in saved) < 96 * 128 / 4  # activations of four rows
    if form[0] == "nf4":  # an open product is kept: the test would see it
        visible = torch.compile(Mixed(layer, opaque=False), fullgraph=True, backend=backend_name)
        assert any(t.numel() >= 96 * 128 for t in kept(visible, x.clone().requires_grad_()))


def test_bias_is_added_and_nothing_trains() -> None:
    bias = torch.arange(96.0)
    for make in (
        lambda b: quantize(weight(), ("nf4", True), torch.float32, b),
        lambda b: quantize(weight(), ("int8", False), torch.float32, b),
    ):
        with_bias, without = make(bias), make(None)
        x = torch.randn(2, 128)
        assert torch.equal(with_bias(x), without(x) + bias)
        assert not any(p.requires_grad for p in with_bias.parameters())


def test_a_weight_that_does_not_fill_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 64"):
        quantize(torch.randn(3, 5), ("nf4", True), torch.float32)
    assert quantize(torch.randn(3, 5), ("int8", False), torch.float32).dequantize().shape == (3, 5)


def test_which_way_unpacks_where(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = nf4.uses_bitsandbytes
    assert [chosen(device) for device in ("cuda", "cpu", "mps")] == [True, True, False]
    chosen.cache_clear()
    monkeypatch.setattr(nf4.importlib.util, "find_spec", lambda name: None)
    assert not chosen("cpu")
    chosen.cache_clear()


# --- on a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_packs_and_unpacks_to_the_bits_of_the_cpu(form: tuple[str, bool], dtype: torch.dtype) -> None:
    w = weight(520, 64 * 33)
    here, there = quantize(w, form, dtype), quantize(w.cuda(), form, dtype)
    for own, other in zip(here.parts, there.parts, strict=True):
        assert other.is_cuda
        assert same_bits(own, other.cpu())
    assert same_bits(here.dequantize(), there.dequantize().cpu())
    if form[0] != "int8":
        table = nf4.unpack_table(there.parts, form[0], dtype).view(w.shape)
        assert same_bits(table, there.dequantize())


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_on_cuda_equal_float32(form: tuple[str, bool], dtype: torch.dtype) -> None:
    layer = quantize(weight(512, 1024).cuda(), form, dtype)
    x = torch.randn(2, 64, 1024, device="cuda").to(dtype)
    leaf, reference = x.clone().requires_grad_(), x.double().requires_grad_()
    y, wanted = layer(leaf), reference @ layer.dequantize().double().T
    upstream = torch.randn_like(wanted)
    y.backward(upstream.to(dtype))
    wanted.backward(upstream.to(dtype).double())
    assert leaf.grad is not None
    assert reference.grad is not None
    bound = 1e-3 if dtype == torch.float32 else 0.02  # of the largest value; TF32 is off by default
    for found, exact in ((y, wanted), (leaf.grad, reference.grad)):
        assert (found.double() - exact).abs().max() < bound * exact.abs().max()


@pytest.mark.gpu
@cuda
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", [("nf4", True), ("int8", False)])
def test_a_layer_compiled_on_cuda_keeps_no_unpacked_weight(form: tuple[str, bool]) -> None:
    layers = nn.Sequential(*(quantize(weight(2048, 2048, seed).cuda(), form, torch.bfloat16) for seed in range(4)))
    compiled = torch.compile(layers, fullgraph=True)
    x = torch.randn(16, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled(x).sum().backward()  # compiles
    before = torch.cuda.memory_allocated()
    y = compiled(x)
    assert torch.cuda.memory_allocated() - before < 2048 * 2048  # one weight takes twice that
    assert torch.allclose(y, layers(x), atol=0.02, rtol=0.02)
