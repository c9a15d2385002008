"""The kernels against the core: one optimizer step on both paths; an edited core is noticed; unknown families work."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanoft import kernels
from nanoft.attention import Documents, SequenceContext
from nanoft.blocks.norms import RMSNorm
from nanoft.config import LoRAConfig
from nanoft.generation.generate import generate
from nanoft.kernels.block import FastBlock
from nanoft.lora import LoRALinear, inject_lora
from nanoft.loss import token_nll
from nanoft.model import MLP, Block, Decoder, SelfAttention
from nanoft.models.weights import load_model
from tiny_models import make_reference

CPU = torch.device("cpu")
IDS = torch.randint(0, 199, (2, 24), generator=torch.Generator().manual_seed(3))
LENGTHS = (14, 10, 24)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, 24)
DOCUMENTS = Documents(LENGTHS, torch.tensor((0, *LENGTHS), dtype=torch.int32).cumsum(0).int())
TARGETS = torch.tensor([3, 4, 9, 13, 20, 21, 30, 46])
PROMPTS = [[5, 9, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [42]]
AXES: dict[str, list[Any]] = {
    "family": ["llama-bias", "mistral-window", "qwen2-window", "qwen3"],
    "method": [
        None,
        {},
        {"dora": True, "rslora": True},
        {"init": "pissa"},
        {"init": "pissa", "dora": True, "bias": "lora_only"},
        {"freeze_a": True, "target_modules": ("q_proj", "down_proj")},
    ],
    "form": [None, ("nf4", True), ("int8", False)],
    "packed": [False, True],
    "policy": ["all", "input", "offloaded"],
}
GRID = [
    case for case in itertools.product(*AXES.values()) if case[1] is not None or case[2] is None
]  # full training has no quantized base


def pairwise(cases: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A small subset of the cases that covers every pair of values of two axes."""

    def pairs(case: tuple[Any, ...]) -> set[tuple[int, int, str, str]]:
        return {(i, j, str(case[i]), str(case[j])) for i, j in itertools.combinations(range(len(case)), 2)}

    left, chosen = set[Any]().union(*map(pairs, cases)), list[tuple[Any, ...]]()
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


SOME = pairwise(GRID)
MARKED = [case if case in SOME else pytest.param(*case, marks=pytest.mark.slow) for case in GRID]


def perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.add_(noise * 0.1 if p.dim() == 2 else p * noise * 0.2)


def build(directory: Path, method: dict[str, Any] | None, form: Any, fast: bool, policy: Any = "all") -> Decoder:
    model = load_model(directory, CPU, torch.float32, form)
    if method is not None:
        inject_lora(model, LoRAConfig(**{"rank": 4, "alpha": 8.0, "target_modules": ("all-linear",), **method}), seed=1)
        perturb(model)
    if fast:
        assert kernels.apply(model) == ""
    model.activation_policy = [policy] * len(model.model.layers)
    return model


def step(model: Decoder, packed: bool) -> tuple[float, dict[str, Tensor]]:
    """The loss and the trained parameters after one step of SGD, which are the gradients in disguise."""
    batch = (IDS, POSITIONS, DOCUMENTS) if packed else (IDS,)
    loss = token_nll(model(*batch, target_positions=TARGETS), model.head, IDS.flatten()[TARGETS + 1]).sum()
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.optim.SGD(trained.values(), lr=1.0).step()
    return loss.item(), {name: p.grad for name, p in trained.items() if p.grad is not None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directories: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in directories:
            directories[family] = tmp_path_factory.mktemp(family)
            make_reference(family, directories[family])
        return directories[family]

    return of


@pytest.mark.parametrize(("family", "method", "form", "packed", "policy"), MARKED, ids=str)
def test_a_step_is_that_of_the_core(family: str, method: Any, form: Any, packed: bool, policy: Any, base: Any) -> None:
    fast, plain = (build(base(family), method, form, is_fast, policy) for is_fast in (True, False))
    assert all(type(block) is FastBlock for block in fast.model.layers)
    (loss, found), (expected, wanted) = step(fast, packed), step(plain, packed)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert found.keys() == wanted.keys() != set()
    for name in found:
        assert (found[name] - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-6, name


@pytest.mark.parametrize("form", [None, ("nf4", True)])
@pytest.mark.parametrize("method", [{}, {"dora": True, "dropout": 0.3}, {"init": "pissa"}], ids=str)
def test_recomputed_gradients_are_the_same_bits(method: Any, form: Any, base: Any) -> None:
    found = []
    for policy in ("all", "input"):
        torch.manual_seed(0)  # of the dropout
        found.append(step(build(base("mistral"), method, form, True, policy), True)[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("method", [None, {}, {"dora": True}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 0.1), (torch.float16, 0.0125)], ids=str)
def test_in_16_bits_a_step_is_that_of_the_core(method: Any, dtype: torch.dtype, allowed: float, base: Any) -> None:
    found = []
    for is_fast in (True, False):
        model = build(base("mistral"), method, None, is_fast)
        for p in model.parameters():
            if p.requires_grad == (method is None):
                p.data = p.data.to(dtype)
        found.append(step(model, True)[1])
    for name in found[1]:
        assert (found[0][name] - found[1][name]).norm() <= allowed * found[1][name].norm() + allowed / 100, name


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("method", [None, {}, {"dora": True, "bias": "lora_only"}, {"init": "pissa"}], ids=str)
def test_autocast_on_a_float32_base_gives_gradients(method: Any, fast: bool, base: Any) -> None:
    model, exact = (build(base("qwen2"), method, None, fast) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(IDS)
    found.float().square().mean().backward()
    exact(IDS).square().mean().backward()
    for own, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        if other.grad is not None:
            assert (own.grad - other.grad).norm() <= 0.3 * other.grad.norm() + 1e-4


# ---- An edited core is noticed


EDITS: dict[str, Any] = {
    "LoRA scaled by 1.001": (
        LoRALinear, "forward",
        lambda self, x: self.base(x) + 1.001 * self.scaling * x @ self.lora_A.to(x.dtype).T @ self.lora_B.to(x.dtype).T,
    ),
    "GELU in the MLP": (MLP, "forward", lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))),
    "no residual": (Block, "forward", lambda self, x, context, _=None: self.mlp(self.self_attn(x, context))),
    "a norm with another eps": (
        RMSNorm, "forward", lambda self, x: F.rms_norm(x, self.weight.shape, self.weight, 0.1)
    ),
    "attention without rotation": (SequenceContext, "rotate", lambda self, q, k, layer: (q, k)),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_core_is_noticed(edit: str, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lora = build(base("llama"), {}, None, False), LoRAConfig(rank=4)
    assert kernels.verify(model.config, lora) == ""
    monkeypatch.setattr(*EDITS[edit])
    warning = kernels.apply(model, lora)
    assert "reference path" in warning
    assert kernels.describe(model) == "reference path"
    assert not any(isinstance(block, FastBlock) for block in model.model.layers)


def test_verifying_draws_no_random_numbers(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it seed the generators of GPUs, whose state it does not restore."""
    model, before = build(base("qwen3"), {"dora": True}, None, False), torch.get_rng_state()
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    assert kernels.apply(model, LoRAConfig(rank=4, dora=True)) == ""
    assert torch.equal(torch.get_rng_state(), before)
    assert seeds == []
    assert kernels.describe(model) == "3 of 3 blocks fast"


# ---- A family that no kernel knows


class CappedAttention(SelfAttention):
    """Attention with a sharper softmax."""

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        q, k, v = self.heads([self.q_proj(x), self.k_proj(x), self.v_proj(x)], context)
        return self.o_proj(context.attend(2 * q, k, v, self).flatten(2))


class GeGLU(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class SandwichBlock(Block):
    """A block with a norm behind its attention."""

    def forward(self, x: Tensor, context: SequenceContext, target_positions: Tensor | None = None) -> Tensor:
        x = super().forward(x, context, target_positions)
        return self.input_layernorm(x)


FAMILIES: dict[str, tuple[dict[str, type[nn.Module]], int]] = {  # classes of a block's parts; how many halves are fast
    "another attention": ({"self_attn": CappedAttention}, 3),
    "another MLP": ({"mlp": GeGLU}, 3),
    "both": ({"self_attn": CappedAttention, "mlp": GeGLU}, 0),
    "another block": ({"": SandwichBlock}, 0),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_an_unknown_family_trains_and_answers_as_by_the_core(name: str, base: Any) -> None:
    parts, fast_blocks = FAMILIES[name]

    def family(fast: bool) -> Decoder:
        model = build(base("qwen3"), {}, None, False)
        for block in model.model.layers:
            for part, kind in parts.items():
                block.get_submodule(part).__class__ = kind
        if fast:
            assert kernels.apply(model) == ""
        return model

    fast, plain = family(True), family(False)
    assert sum(isinstance(block, FastBlock) for block in fast.model.layers) == fast_blocks
    (loss, found), (expected, wanted) = step(fast, True), step(plain, True)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert all((found[key] - wanted[key]).norm() <= 1e-4 * wanted[key].norm() for key in wanted)
    for model in (fast, plain):
        answers = generate(model.eval(), PROMPTS, (), 12)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = list(prompt)
            with torch.no_grad():
                for token in answer.ids:  # every token is the likeliest after a whole pass
                    assert int(model.logits(model(torch.tensor([ids]))[0, -1]).argmax()) == token
                    ids.append(token)


def test_hooks_on_the_parts_of_a_block_still_fire(base: Any) -> None:
    model, seen = build(base("llama"), {}, None, True), list[str]()
    for name, module in model.named_modules():
        if name.endswith(("self_attn", "mlp")):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(IDS)
    assert len(seen) == 2 * 3
