"""The Metal path, on a Mac's GPU (`pytest -m mps`), elsewhere on a simulated one: see metal.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from metal import MEMORY, Metal, MetalTensor, pretended_metal
from safetensors.torch import load_file

import eval as evaluation
import merge
import train
from nanoft import UserError, nf4
from nanoft.__main__ import main
from nanoft.attention import Documents, Rotation, Scores, SequenceContext
from nanoft.config import LoRAConfig, TrainingConfig
from nanoft.kernels import attention
from nanoft.kernels.attention import FastContext, attend
from nanoft.lora import top_singular_factors, variant_of
from nanoft.loss import token_nll
from nanoft.model import SelfAttention
from nanoft.optim import build_optimizer
from nanoft.recompute import run_block
from nanoft.runtime import memory
from nanoft.runtime.device import choose_device, choose_dtype, preserve_rng_state, rng_state
from nanoft.runtime.distributed import same_exception
from nanoft.runtime.memory import WATERMARK, OutOfMemory, memory_limit_bytes
from nanoft.training import doctor
from tiny_models import make_chat_model, train_run, write_records

ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "configs" / "tiny.py")
REAL = torch.backends.mps.is_available()
CPU = torch.device("cpu")


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metal]:
    with pretended_metal(monkeypatch) as here:
        yield here


@pytest.fixture
def mps(request: pytest.FixtureRequest) -> torch.device:
    """A Mac's GPU, or the simulated one."""
    if not REAL:
        request.getfixturevalue("metal")
    return torch.device("mps")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- What Metal computes is what the CPU computes

Pieces = list[torch.Tensor]


def attention_piece(device: torch.device, window: int | None, packed: bool) -> Pieces:
    q, k, v = (numbers(2, 300, heads, 16, seed=heads).to(device).requires_grad_() for heads in (4, 2, 2))
    lengths = (100, 200, 299, 1)
    bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int().to(device)
    y = attend(q, k, v, Scores(0.25, window), Documents(lengths, bounds) if packed else None)
    return [y.detach(), *torch.autograd.grad(y, (q, k, v), numbers(*y.shape).to(device))]


def rotation_piece(device: torch.device) -> Pieces:
    x, angle = numbers(2, 5, 3, 8).to(device).requires_grad_(), numbers(1, 5, 1, 4, seed=1).to(device)
    y, _ = FastContext([Rotation(angle.cos(), angle.sin())]).rotate(x, x, SimpleNamespace(kind=SelfAttention, rope=0))
    return [y.detach(), *torch.autograd.grad(y.sum(), x)]


def loss_piece(device: torch.device) -> Pieces:
    hidden, head = (numbers(n, 32).to(device).requires_grad_() for n in (50, 199))
    nll = token_nll(hidden, head, torch.arange(50).to(device), 0.1, 1e-3).sum()
    return [nll.detach(), *torch.autograd.grad(nll, (hidden, head))]


def packed_piece(device: torch.device, kind: str, double: bool) -> Pieces:
    """Codes, scales, what they stand for, and a product with it and its gradient."""
    weight, x = numbers(192, 128).to(device), numbers(7, 128, seed=1).to(device).requires_grad_()
    layer = nf4.quantize(weight, (kind, double), torch.float32)
    y = layer(x)
    return [*layer.parts, layer.dequantize(), y.detach(), *torch.autograd.grad(y.sum(), x)]


def adapter_piece(device: torch.device, **options: Any) -> Pieces:
    base = torch.nn.Linear(64, 96, bias=False, device="meta")
    base.weight = torch.nn.Parameter(numbers(96, 64).to(device), requires_grad=False)
    lora = LoRAConfig(rank=4, **options)
    adapter = variant_of(lora)(base, lora, torch.Generator().manual_seed(0))
    x = numbers(5, 64, seed=1).to(device)
    y = adapter(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (adapter.lora_A, adapter.lora_B))]


def optimizer_piece(device: torch.device, kind: str) -> Pieces:
    parameter = torch.nn.Parameter(numbers(40, 10).to(device))
    optimizer = build_optimizer([("weight", parameter)], TrainingConfig(optimizer=kind, momentum=0.9, weight_decay=0.1))
    for step in range(3):
        parameter.grad = numbers(40, 10, seed=step).to(device)
        optimizer.step()
    return [parameter.detach()]


PIECES: dict[str, tuple[Callable[..., Pieces], tuple[Any, ...], dict[str, Any]]] = {
    "attention": (attention_piece, (None, False), {}),
    "attention in a window": (attention_piece, (20, False), {}),
    "attention, packed": (attention_piece, (None, True), {}),
    "attention, packed, in a window": (attention_piece, (20, True), {}),
    "rotation": (rotation_piece, (), {}),
    "loss": (loss_piece, (), {}),
    "nf4": (packed_piece, ("nf4", False), {}),
    "nf4, double": (packed_piece, ("nf4", True), {}),
    "fp4": (packed_piece, ("fp4", True), {}),
    "8 bits": (packed_piece, ("int8", False), {}),
    "lora": (adapter_piece, (), {}),
    "dora": (adapter_piece, (), {"dora": True}),
    "pissa": (adapter_piece, (), {"init": "pissa"}),
    "adamw": (optimizer_piece, ("adamw",), {}),
    "sgd": (optimizer_piece, ("sgd",), {}),
}


@pytest.mark.mps
@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_is_the_same_as_on_the_cpu(piece: str, mps: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compute, arguments, options = PIECES[piece]
    monkeypatch.setattr(attention, "CHUNK", 64)
    found = [part.cpu() for part in compute(mps, *arguments, **options)]
    expected = compute(CPU, *arguments, **options)
    for one, other in zip(found, expected, strict=True):
        if one.dtype in (torch.uint8, torch.int8):
            assert torch.equal(one, other)
        else:
            assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.mps
def test_a_recomputed_block_has_the_same_dropout_masks(mps: torch.device) -> None:
    class Dropping(torch.nn.Module):
        takes: tuple[()] = ()
        gives: tuple[()] = ()

        def forward(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
            return F.dropout(x, 0.5)

    def gradient(keep: Any) -> torch.Tensor:
        torch.manual_seed(5)
        x = torch.ones(64, 64).to(mps).requires_grad_()
        y = x
        for _ in range(3):
            y = run_block(Dropping(), y, SequenceContext([]), None, keep)
        after = torch.mps.get_rng_state()
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(torch.mps.get_rng_state(), after)
        assert torch.equal(x.grad.cpu(), y.detach().cpu())  # both are what the three dropouts multiply by
        return x.grad.cpu()

    assert gradient("all").std() > 0.5
    for keep in ("input", "offloaded"):
        assert torch.equal(gradient(keep), gradient("all"))


@pytest.mark.mps
def test_looking_ahead_draws_no_random_numbers(mps: torch.device) -> None:
    before = rng_state()
    with preserve_rng_state():
        torch.zeros(4).to(mps).uniform_()
        torch.rand(4)
    assert rng_state() == before
    torch.zeros(4).to(mps).uniform_()
    assert rng_state()["mps"] != before["mps"]


@pytest.mark.mps
@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["quantization.bits=4", "model.dtype=bfloat16"]], ids=["float32", "nf4"])
def test_what_is_promised_holds_on_metal(
    more: list[str], mps: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["data.max_samples=40", "lora.dropout=0.1", "training.checkpointing=full", *more]
    assert train.main([TINY, "system.device=mps", *changes, "--selftest"]) == 0
    assert "FAIL" not in capsys.readouterr().out


# ---- A whole job, with a CUDA that must not be touched


def test_the_whole_job_takes_the_metal_path(
    tmp_path: Path, metal: Metal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack = nf4.unpack_bitsandbytes

    def only_elsewhere(parts: list[torch.Tensor], *rest: Any) -> torch.Tensor:
        assert parts[0].device.type == "cpu", "bitsandbytes was called on Metal"
        return unpack(parts, *rest)

    monkeypatch.setattr(nf4, "unpack_bitsandbytes", only_elsewhere)
    base, records = tmp_path / "base", write_records(tmp_path / "data.jsonl")
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        make_chat_model(base)
    settings: dict[str, Any] = {
        "system__device": "mps",
        "model__dtype": "auto",
        "quantization__bits": 4,
        "lora__dropout": 0.1,
        "training__checkpointing": "full",
        "training__keep_checkpoints": 5,
        "data__packing": True,
        "evaluation__prompts": 2,
    }
    run = train_run(tmp_path / "run", base, records, **settings)
    said = capsys.readouterr().out
    assert "computing in bfloat16" in said
    assert "chunks of 256 queries, documents of similar length batched" in said
    assert {"embedding", "_softmax_backward_data", "_fused_adamw_", "bernoulli_"} <= metal.operations
    assert metal.fraction == 1.0

    whole = load_file(run / "adapter" / "adapter_model.safetensors")
    for path in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(run / path)
    (run / "best.json").unlink()
    metal.seed(123)
    train_run(run, base, records, **settings)  # the same command goes on from step 2
    assert "resuming  after step 2 of 4" in capsys.readouterr().out
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())

    measured = tmp_path / "measured.json"
    assert evaluation.main([str(run), "--data", str(records), "--json", str(measured), "--compare-base"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert json.loads(measured.read_text())["tuned"]["perplexity"] == pytest.approx(report["tuned"]["perplexity"], 0.3)
    assert main(["chat", str(run), "--prompt", "Say 3 please.", "--max-new-tokens", "8"]) == 0
    assert merge.main([str(run), "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


OTHERS: dict[str, dict[str, Any]] = {
    "full": {"training__method": "full", "training__optimizer": "sgd", "training__momentum": 0.9},
    "dora, 8 bits": {"lora__dora": True, "quantization__bits": 8, "training__checkpointing": "offload"},
    "pissa": {"lora__init": "pissa", "training__neftune_alpha": 5.0, "training__z_loss": 1e-4},
    "rank patterns": {"lora__rslora": True, "lora__bias": "lora_only", "training__label_smoothing": 0.1},
    "cached": {"quantization__bits": 4, "quantization__dequantize": "cached", "training__lora_plus_ratio": 4.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS)
def test_other_methods_run_on_metal(case: str, tmp_path: Path, metal: Metal) -> None:
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        make_chat_model(tmp_path / "base", "mistral-window")
    records = write_records(tmp_path / "data.jsonl")
    settings = {"system__device": "mps", "training__max_steps": 2, "evaluation__prompts": 2, **OTHERS[case]}
    run = train_run(tmp_path / "run", tmp_path / "base", records, **settings)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event for event in events if event["event"] == "warning"] == []
    assert evaluation.main([str(run), "--data", str(records)]) == 0


def test_the_stand_in_refuses_what_metal_refuses(metal: Metal) -> None:
    x = torch.ones(3).to("mps")
    assert isinstance(x, MetalTensor)
    assert x.device.type == "mps"
    for fault in (
        lambda: torch.zeros(3, device="mps", dtype=torch.float64),
        lambda: torch.zeros(3, dtype=torch.float64).to("mps"),
        lambda: x.double(),
        lambda: x.sum(dtype=torch.float64),
        lambda: x + torch.ones(3),
        lambda: x.numpy(),
        lambda: torch.linalg.qr(x[None]),
    ):
        with pytest.raises((TypeError, RuntimeError)):
            fault()
    with pytest.raises(AssertionError, match="freed"):
        torch.ones(3).to("mps", non_blocking=True)
    with pytest.raises(AssertionError, match=r"torch\.cuda\.synchronize"):
        torch.cuda.synchronize()


# ---- Number formats and memory


def test_bfloat16_is_tried_not_believed(metal: Metal) -> None:
    device = torch.device("mps")
    assert choose_dtype("auto", device) == torch.bfloat16
    metal.without = (torch.bfloat16,)
    assert choose_dtype("auto", device) == torch.float32
    with pytest.raises(UserError, match=r"bfloat16 matmul is not supported on this GPU: set model\.dtype"):
        choose_dtype("bfloat16", device)


def test_the_budget_is_what_metal_recommends_or_what_is_free(metal: Metal, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("mps")
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 100e9)
    assert memory_limit_bytes(device) == MEMORY
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 5e9)  # other programs hold the rest
    assert memory_limit_bytes(device) == 6e9
    monkeypatch.setenv(WATERMARK, "0.8")
    choose_device("mps")
    assert metal.fraction is None  # as the user says


@pytest.mark.parametrize(
    "text", ["MPS backend out of memory (MPS allocated: 18.50 GiB)", "Invalid buffer size: 16 GiB"]
)
def test_a_shortage_gives_the_cache_back(text: str, metal: Metal) -> None:
    with pytest.raises(OutOfMemory), same_exception(torch.device("mps")):
        raise RuntimeError(text)
    assert metal.emptied == 1


@pytest.mark.mps
@pytest.mark.skipif(not REAL, reason="needs a Mac")
def test_the_limit_is_an_error_that_is_understood() -> None:
    device = choose_device("mps")
    torch.mps.set_per_process_memory_fraction(0.05)
    try:
        with pytest.raises(OutOfMemory), same_exception(device):
            [torch.ones(1 << 26, device=device) for _ in range(1000)]  # 268 MB each
        with pytest.raises(OutOfMemory), same_exception(device):
            torch.empty(1 << 40, dtype=torch.int8, device=device)
    finally:
        torch.mps.set_per_process_memory_fraction(1.0)


WATERMARKS = {
    None: ("ok", "what Metal recommends"),
    "0.7": ("ok", "WATERMARK_RATIO=0.7"),
    "1.0": ("ok", "WATERMARK_RATIO=1.0"),
    "1.5": ("warn", "WATERMARK_RATIO=1.5"),
    "0.0": ("warn", "WATERMARK_RATIO=0.0"),
    "half": ("warn", "WATERMARK_RATIO=half"),
}


@pytest.mark.parametrize("ratio", WATERMARKS)
def test_the_environment_check_judges_the_watermark(ratio: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WATERMARK, raising=False)
    if ratio:
        monkeypatch.setenv(WATERMARK, ratio)
    line = doctor.metal()
    assert line.outcome == WATERMARKS[ratio][0]
    assert WATERMARKS[ratio][1] in line.found


@pytest.mark.mps
def test_the_environment_check_runs_on_metal(mps: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line.name: line for line in doctor.check_machine(choose_device("mps"))}
    assert "bfloat16" in lines["precision"].found
    assert "chunks of 256 queries" in lines["attention"].found
    assert "table look-up" in lines["4-bit weights"].found
    assert "Metal recommends" in lines["device memory"].found


def test_principal_components_are_found_on_the_cpu(metal: Metal) -> None:
    b, a = top_singular_factors(numbers(8, 6).to("mps"), 6, torch.Generator())
    assert torch.allclose(b @ a, numbers(8, 6), atol=1e-5)
