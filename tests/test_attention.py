"""Attention against a plain softmax over all pairs, its gradients, and what decides which path is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoft import attention
from nanoft.attention import Documents, attend, rotate

ROOT = Path(__file__).parent.parent


def tensors(lengths: tuple[int, ...], dtype: torch.dtype, heads: int = 4, groups: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*lengths, count, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (heads, groups, groups)
    ]


def plainly(q: Any, k: Any, v: Any, seen: torch.Tensor) -> torch.Tensor:
    """The formula over all pairs; seen is (b, 1, q, k)."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeats, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def places(documents: tuple[int, ...], batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, segments), (b, q), of documents that fill the rows one behind another."""
    numbers = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).view(batch, length)
    positions = torch.cat([torch.arange(n) for n in documents]).view(batch, length)
    return positions, numbers


def who_sees_whom(positions: torch.Tensor, documents: torch.Tensor, window: int | None) -> torch.Tensor:
    """(b, 1, q, k): the same document, not the future, not further back than the window."""
    past = positions[:, :, None] - positions[:, None, :]
    seen = (past >= 0) & (documents[:, :, None] == documents[:, None, :])
    return (seen if window is None else seen & (past < window))[:, None]


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("chunk", [1, 4, 128])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("packed", [(11, 11), (5, 6, 1, 10), (11, 3, 8)])
def test_output_and_gradients_are_those_of_the_plain_formula(
    window: int | None, chunk: int, chunked: bool, packed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CHUNK", chunk)
    if chunked:
        monkeypatch.setattr(attention, "_needs_chunks", lambda q, window: True)
    parts = tensors((2, 11), torch.float64)
    bounds = torch.tensor((0, *packed), dtype=torch.int32).cumsum(0)
    documents = None if packed == (11, 11) else Documents(packed, bounds)
    place = places(packed, 2, 11)
    expected = plainly(*parts, who_sees_whom(*place, window))
    y = attend(*parts, window, documents)
    assert torch.allclose(y, expected, atol=1e-12)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for own, other in zip(
        torch.autograd.grad(y, parts, towards), torch.autograd.grad(expected, parts, towards), strict=True
    ):
        assert torch.allclose(own, other, atol=1e-6)  # dk and dv are summed in float32


def test_in_bfloat16_on_a_cpu_chunks_stay_within_two_roundings_of_float64() -> None:
    parts = tensors((2, 300), torch.bfloat16)
    exact = [part.detach().double().requires_grad_() for part in parts]
    seen = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    expected = plainly(*exact, seen)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, exact, towards)

    assert attention.backend(parts[0], None, False) == "chunks of 256 queries"
    y = attend(*parts)
    found = [y, *torch.autograd.grad(y, parts, towards.bfloat16())]
    for own, other in zip(found, [expected, *wanted], strict=True):
        assert (own.double() - other).norm() < 2**-7 * other.norm()  # a rounding to bfloat16 is up to 2^-9


def test_the_log_names_what_computes_it() -> None:
    q = torch.zeros(1, 4, 2, 8)
    assert attention.backend(q, None, False) == "PyTorch's kernel for cpu"
    assert attention.backend(q, None, True) == "PyTorch's kernel for cpu, documents of like length together"
    assert attention.backend(q, 2, False) == "chunks of 256 queries"


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
    y = attend(*parts, window, documents)
    towards = torch.randn(y.shape, generator=generator).cuda()
    assert (y.double() - expected).norm() < 0.01 * expected.norm()
    wanted = torch.autograd.grad(expected, exact, towards.double())
    for own, other in zip(torch.autograd.grad(y, parts, towards.bfloat16()), wanted, strict=True):
        assert (own.double() - other).norm() < 0.02 * other.norm()


def test_rotation_is_the_formula_and_its_gradient_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=generator).requires_grad_()
    angle = torch.randn(1, 5, 1, 4, dtype=torch.float64, generator=generator)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    y = rotate(x, angle.cos(), angle.sin())
    assert torch.allclose(y, torch.cat((pairs.real, pairs.imag), dim=-1))
    assert torch.autograd.gradcheck(lambda t: rotate(t, angle.cos(), angle.sin()), (x,))


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
    monkeypatch.setattr(attention, "_needs_chunks", lambda q, window: True)  # as on Metal
    y = attend(*parts, window, documents)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    assert (y - expected).norm() < 1e-6 * expected.norm()
    wanted = torch.autograd.grad(expected, parts, towards)
    for own, other in zip(torch.autograd.grad(y, parts, towards), wanted, strict=True):
        assert (own - other).norm() < 2e-6 * other.norm()  # dk, dv: of two sums over all queries, in other orders


PEAK = """
import re, torch
from nanoft import attention
attention._needs_chunks = lambda q, window: True  # as on Metal

def plainly(q, k, v):
    return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

def measure(attend, length):
    parts = (torch.randn(1, length, 2, 16, requires_grad=True) for _ in range(3))
    attend(*parts).sum().backward()
    return peak()

measure(attention.attend, 64)  # starts the libraries
print(peak(), measure(attention.attend, 1024), measure(attention.attend, 4096), measure(plainly, 4096))
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
