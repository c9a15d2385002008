"""A step of generation against the whole decoder: every kind of base, with and without adapters, under autocast."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoft import kernels
from nanoft.config import LoRAConfig
from nanoft.generation.decode import Decoding
from nanoft.generation.generate import generate
from nanoft.kernels import decode as decode_kernels
from nanoft.lora import disabled, inject_lora, linears_of
from nanoft.model import Decoder
from nanoft.models.weights import cache_weights, load_model
from tiny_models import CASES, make_reference

CPU = torch.device("cpu")
HAS_KERNELS = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
PROMPTS = [[5, 9, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [42], [7, 7, 7, 100, 30, 20]]
MORE = torch.randint(0, 199, (24, 4), generator=torch.Generator().manual_seed(0))  # what follows, step by step


@torch.no_grad()
def largest_difference(exact: Decoder, model: Decoder, rows: list[int], steps: int) -> float:
    """Of the hidden states of some rows, step by step, to those of a pass over everything.

    Two rows begin; two join after two steps; after four, those stay that are said.
    """
    texts, worst = [list(prompt) for prompt in PROMPTS], 0.0
    decoding, staying = Decoding(model), [0, 2]
    hidden = decoding.join([PROMPTS[row] for row in staying], steps)
    for step in range(steps):
        if step == 2:
            hidden = torch.cat((hidden, decoding.join([PROMPTS[1], PROMPTS[3]], steps)))
            staying = [*staying, 1, 3]
        for found, row in zip(hidden, staying, strict=True):
            whole = exact(torch.tensor([texts[row]]))[0, -1]
            worst = max(worst, float((found - whole).abs().max() / whole.abs().max()))
            texts[row].append(int(MORE[step, row]))
        if step == 4:
            decoding.keep([staying.index(row) for row in rows])
            staying = rows
        hidden = decoding.step(MORE[step, staying])
    return worst


def test_compiled_blocks_are_not_compiled_again_for_prompts(path: str, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    model = opened(path, tmp_path)
    expected = generate(model, PROMPTS, (), 8)
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    for block in model.model.layers:
        block.compile(backend=backend)
    assert generate(model, PROMPTS, (), 8) == expected
    assert not compiled


@pytest.fixture(params=["plain", "fast", "prepacked"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The decoding path: the core's blocks, their twins, or twins with prepacked weights."""
    monkeypatch.setattr(decode_kernels, "CACHED_BYTES", 0)
    monkeypatch.setattr(decode_kernels, "MEMORY_SHARE", 1.0 if request.param == "prepacked" else 0.0)
    return str(request.param)


def opened(path: str, directory: Path, dtype: torch.dtype = torch.float32, form: Any = None) -> Decoder:
    """The model for one of these paths."""
    model = load_model(directory, CPU, dtype, form).eval()
    if path != "plain":
        assert kernels.apply(model) == ""
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_a_pass_over_everything(case: str, path: str, tmp_path: Path) -> None:
    make_reference(case, tmp_path)
    model = opened(path, tmp_path)
    assert (Decoding(model).head is not None) == (path == "prepacked" and HAS_KERNELS)
    for rows in ([0, 2, 3], [1], [3, 0]):
        assert largest_difference(model, model, rows, 20) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["mistral-window", "qwen3"])
def test_bfloat16_stays_within_its_roundings(case: str, path: str, tmp_path: Path) -> None:
    make_reference(case, tmp_path)
    model = opened(path, tmp_path, torch.bfloat16)
    exact = load_model(tmp_path, CPU, torch.float32).eval()
    assert Decoding(model).join(PROMPTS, 2).dtype == torch.bfloat16
    own = largest_difference(exact, model, [0, 2], 12)
    whole = max(
        float((model(ids)[0, -1] - exact(ids)[0, -1]).abs().max() / exact(ids)[0, -1].abs().max())
        for ids in (torch.tensor([prompt]) for prompt in PROMPTS)
    )
    assert own < 4 * whole


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's own word on a norm's float32 weight
@pytest.mark.parametrize("case", ["qwen2", "qwen3"])
def test_under_autocast_a_step_is_a_pass_too(case: str, path: str, tmp_path: Path) -> None:
    make_reference(case, tmp_path)
    model = opened(path, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_difference(model, model, [0, 2], 8) < 0.1


@pytest.mark.parametrize("bits", [4, 8])
def test_answers_on_a_packed_base_are_those_of_its_unpacked_weights(bits: int, path: str, tmp_path: Path) -> None:
    make_reference("mistral-window", tmp_path)
    packed = opened(path, tmp_path, form=("int8", False) if bits == 8 else ("nf4", True))
    plain = load_model(tmp_path, CPU, torch.float32).eval()
    for name, linear in linears_of(plain).items():
        linear.weight.data = packed.get_submodule(name).dequantize()
    expected = generate(plain, PROMPTS, (), 24)
    assert generate(packed, PROMPTS, (), 24) == expected
    cache_weights(packed, "cached")
    assert generate(packed, PROMPTS, (), 24) == expected


KINDS: list[dict[str, Any]] = [{}, {"dora": True, "rslora": True}, {"init": "pissa"}, {"bias": "lora_only"}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_answers_with_adapters_are_those_of_the_merged_model(kind: dict[str, Any], path: str, tmp_path: Path) -> None:
    make_reference("qwen2-window", tmp_path)  # with biases
    model = opened(path, tmp_path)
    merged = load_model(tmp_path, CPU, torch.float32).eval()
    before = generate(model, PROMPTS, (), 24)
    adapters = inject_lora(model, LoRAConfig(rank=4, target_modules=("all-linear",), **kind), seed=0)
    for number, (name, adapter) in enumerate(adapters.items()):
        torch.nn.init.normal_(adapter.lora_B, std=0.3, generator=torch.Generator().manual_seed(number))
        linear = merged.get_submodule(name)
        linear.weight.data = adapter.merged(linear.weight.data)
        if adapter.bias is not None:
            torch.nn.init.normal_(adapter.bias, std=0.3, generator=torch.Generator().manual_seed(number))
            linear.bias.data = adapter.bias.data.clone()
    model.eval()
    assert generate(model, PROMPTS, (), 24) == generate(merged, PROMPTS, (), 24) != before
    with disabled(adapters):
        assert generate(model, PROMPTS, (), 24) == before
