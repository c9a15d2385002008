"""Attention against a plain softmax over all pairs, its gradients, and what decides which path is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plain_attention import places, plainly, tensors, who_sees_whom
from torch import Tensor

from nanoft.attention import Documents, Scores
from nanoft.kernels import attention
from nanoft.kernels.attention import attend, describe

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("packed", [(11, 11), (5, 6, 1, 10), (11, 3, 8)])
@pytest.mark.parametrize("cap", [None, 0.5])
def test_output_and_gradients_are_those_of_the_plain_formula(
    window: int | None, chunk: int, chunked: bool, packed: tuple[int, ...], cap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "CHUNK", chunk)
    if chunked:
        monkeypatch.setattr(attention, "_needs_chunks", lambda q, scores: True)
    parts = tensors((2, 11), torch.float64)
    bounds = torch.tensor((0, *packed), dtype=torch.int32).cumsum(0)
    documents = None if packed == (11, 11) else Documents(packed, bounds)
    place = places(packed, 2, 11)
    expected = plainly(*parts, who_sees_whom(*place, window), cap)
    y = attend(*parts, Scores(8**-0.5, window, cap), documents)
    assert torch.allclose(y, expected, atol=1e-12)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for own, other in zip(
        torch.autograd.grad(y, parts, towards), torch.autograd.grad(expected, parts, towards), strict=True
    ):
        assert torch.allclose(own, other, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_products_of_transposed_scores_give_the_gradients_of_the_plain_formula(
    chunk: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK", chunk)
    parts = tensors((2, 11), torch.float64, heads, groups=1 if heads == 1 else 2)
    expected = plainly(*parts, torch.ones(11, 11, dtype=torch.bool).tril()[None, None])
    y = attention._Transposed.apply(*parts, 8**-0.5)
    assert torch.allclose(y, expected, atol=1e-12)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, parts, towards)
    for own, other in zip(torch.autograd.grad(y, parts, towards), wanted, strict=True):
        assert torch.allclose(own, other, atol=1e-12)


@pytest.mark.parametrize("has_amx", [False, True])
def test_in_bfloat16_on_a_cpu_results_stay_within_two_roundings_of_float64(
    has_amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    parts = tensors((2, 300), torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in parts]
    seen = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    expected = plainly(*exact, seen)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, exact, towards)

    expected_kernel = "PyTorch's kernel for cpu" if has_amx else "chunks of 256 queries"
    assert describe(parts[0], Scores(1.0), False) == expected_kernel
    y = attend(*parts, Scores(8**-0.5))
    found = [y, *torch.autograd.grad(y, parts, towards.bfloat16())]
    for own, other in zip(found, [expected, *wanted], strict=True):
        assert (own.double() - other).norm() < 2**-7 * other.norm()  # a rounding to bfloat16 is up to 2^-9


def test_the_log_names_what_computes_it() -> None:
    q = torch.zeros(1, 4, 2, 8)
    assert describe(q, Scores(1.0), False) == "PyTorch's kernel for cpu"
    assert describe(q, Scores(1.0), True) == "PyTorch's kernel for cpu, documents of similar length batched"
    assert describe(q, Scores(1.0, 2), False) == describe(q, Scores(1.0, None, 5.0), False) == "chunks of 256 queries"


@pytest.mark.parametrize(
    ("capability", "dtype", "shares"),
    [
        ((7, 5), torch.float16, False), ((8, 0), torch.float16, True), ((9, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
    ],
)  # fmt: skip
def test_flash_attention_runs_in_16_bits_from_ampere_on(
    capability: tuple[int, int], dtype: torch.dtype, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else on CUDA attends to packed documents, or shares keys between heads."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 2, 64))
    assert attention.shares_keys(q) is shares
    assert attention.has_varlen(q, Scores(1.0)) is (shares and attention._varlen_kernel() is not None)
    assert attention.shares_keys(torch.zeros(1, 4, 2, 64))  # on a CPU


@pytest.mark.parametrize("packed", [None, (200, 100, 299, 1)])
def test_where_heads_cannot_share_keys_each_gets_a_copy(
    packed: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With shared keys, PyTorch would take its formula there, which keeps the weights of all pairs."""
    parts, documents = tensors((2, 300), torch.float32, heads=8, groups=2), None
    if packed:
        documents = Documents(packed, torch.tensor((0, *packed), dtype=torch.int32).cumsum(0).int())
    towards = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(1))
    expected = attend(*parts, Scores(0.25), documents)
    wanted = torch.autograd.grad(expected, parts, towards)
    kernel, heads = attention.F.scaled_dot_product_attention, []

    def seen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(attention, "shares_keys", lambda q: False)
    y = attend(*parts, Scores(0.25), documents)
    assert set(heads) == {(8, 8, 8)}
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, parts, towards), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_shared_keys_in_float32_do_not_keep_the_weights_of_all_pairs() -> None:
    parts = [torch.randn(1, 2048, n, 64, device="cuda", requires_grad=True) for n in (8, 2, 2)]
    before = torch.cuda.memory_allocated()
    y = attend(*parts, Scores(0.125))
    assert torch.cuda.memory_allocated() - before < 8 * 2048**2 * 4  # one matrix of them
    assert describe(parts[0], Scores(0.125), False) == "efficient attention kernel"
    assert y.shape == parts[0].shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("window", [None, 20])
def test_the_kernel_for_many_lengths_equals_the_masked_formula(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 128, n, 64, generator=generator).bfloat16().cuda().requires_grad_() for n in (8, 2, 2)]
    lengths = (100, 28, 1, 127)
    documents = Documents(lengths, torch.tensor((0, *lengths)).cumsum(0).int().cuda())
    place = [t.cuda() for t in places(lengths, 2, 128)]
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = plainly(*exact, who_sees_whom(*place, window))
    y = attend(*parts, Scores(parts[0].shape[-1] ** -0.5, window), documents)
    towards = torch.randn(y.shape, generator=generator).cuda()
    assert (y.double() - expected).norm() < 0.01 * expected.norm()
    wanted = torch.autograd.grad(expected, exact, towards.double())
    for own, other in zip(torch.autograd.grad(y, parts, towards.bfloat16()), wanted, strict=True):
        assert (own.double() - other).norm() < 0.02 * other.norm()


SHAPES = [(300, None, None), (300, 100, None), (300, None, (200, 100, 299, 1)), (300, 64, (200, 100, 299, 1))]


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("length", "window", "packed"), SHAPES)
def test_chunks_are_what_pytorchs_kernel_gives_in_float32(
    length: int, window: int | None, packed: tuple[int, ...] | None, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = tensors((2, length), torch.float32, heads=8, groups=groups)
    documents = None
    place = places(packed or (length, length), 2, length)
    if packed:
        documents = Documents(packed, torch.tensor((0, *packed), dtype=torch.int32).cumsum(0).int())
    q, k, v = (part.transpose(1, 2) for part in parts)
    seen = who_sees_whom(*place, window)  # (b, 1, q, k)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)
    monkeypatch.setattr(attention, "_needs_chunks", lambda q, scores: True)  # as on Metal
    y = attend(*parts, Scores(parts[0].shape[-1] ** -0.5, window), documents)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert (y - expected).norm() < 1e-6 * expected.norm()
    wanted = torch.autograd.grad(expected, parts, towards)
    for own, other in zip(torch.autograd.grad(y, parts, towards), wanted, strict=True):
        assert (own - other).norm() < 2e-6 * other.norm()  # dk, dv: of two sums over all queries, in other orders


PEAK = """
import re, torch
from nanoft.attention import Scores
from nanoft.kernels import attention
attention._needs_chunks = lambda q, scores: True  # as on Metal

def plainly(q, k, v):
    return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)

def chunked(q, k, v):
    return attention.attend(q, k, v, Scores(16**-0.5))

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def measure(attend, length):
    parts = (torch.randn(1, length, 2, 16, requires_grad=True) for _ in range(3))
    attend(*parts).sum().backward()
    return peak()

measure(chunked, 64)  # starts the libraries
print(peak(), measure(chunked, 1024), measure(chunked, 4096), measure(plainly, 4096))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_chunks_grows_with_the_length_and_not_with_its_square() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT)
    before, *peaks = map(float, done.stdout.split())
    shorter, longer, plain = (peak - before for peak in peaks)  # MiB
    square = 2 * 4096**2 * 4 / 2**20  # one matrix of all pairs, 2 heads
    assert longer < 8 * shorter  # four times the length: 4 if linear, 16 if square
    assert longer < square  # not one such matrix
    assert plain > 2 * square  # the plain formula; or this could not fail


def test_varlen_is_not_imported_where_there_is_no_cuda() -> None:
    code = "import sys, nanoft.kernels, nanoft.training.setup; print('torch.nn.attention.varlen' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
