"""Blocks whose frozen weights come from host memory: the same bits, and in which order they are copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import equal, losses, quick, result
from tiers import rest_is_slow
from torch import Tensor

import train
from nanoft import UserError, kernels
from nanoft.config import Config, LoRAConfig
from nanoft.generation import decode
from nanoft.kernels import streaming
from nanoft.lora import inject_lora
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from nanoft.recompute import keep_by_policy
from tiny_models import make_reference

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def build(
    directory: Path, bits: int, fast: bool, host: bool, lora: LoRAConfig, dtype: torch.dtype, device: torch.device = CPU
) -> Decoder:
    quantization = {4: ("nf4", True), 8: ("int8", False), 16: None}[bits]
    store = streaming.keep_on_host if host else None
    model = load_model(directory, device, dtype, quantization, store=store)
    inject_lora(model, lora, seed=0)
    if fast:
        assert not kernels.apply(model, lora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(0.1 * values)
    model.activation_policy = keep_by_policy("full", 1, model.config.num_layers)
    if host:
        streaming.stream_blocks(model, device)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    make_reference("mistral", directory, num_hidden_layers=4)
    return directory


def step(model: Decoder) -> dict[str, Tensor]:
    """Hidden states, gradients, and the trained parameters after a step of AdamW."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    hidden = model.train()(IDS.to(model.device))
    hidden.float().square().sum().backward()
    found = {"hidden": hidden.detach()} | {f"gradient of {n}": p.grad.clone() for n, p in trained.items()}
    optimizer.step()
    optimizer.zero_grad()
    return found | {name: p.detach().clone() for name, p in trained.items()}


@torch.inference_mode()
def generate(model: Decoder) -> Tensor:
    """The hidden states of three steps of generation."""
    model.eval()
    batch = decode.Decoding(model)
    hidden = [batch.join(IDS.tolist(), 3)]
    for token in (7, 8):
        hidden.append(batch.step(torch.tensor([token, token + 1])))
    return torch.stack(hidden)


@pytest.mark.parametrize("fast", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize(
    ("bits", "lora", "dtype"),
    [
        (16, LoRAConfig(rank=4), torch.bfloat16),
        (4, LoRAConfig(rank=4, dropout=0.1), torch.float32),
        (8, LoRAConfig(rank=4, target_modules=("attention",), modules_to_save=("norm",)), torch.float32),
        (4, LoRAConfig(rank=4, dora=True, init="pissa"), torch.float32),
    ],
    ids=["16", "nf4", "int8", "dora"],
)
def test_the_bits_are_those_of_resident_weights(
    base: Path, bits: int, lora: LoRAConfig, dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "choose_build", lambda model: None)  # no copies of the weights in another order
    resident, streamed = (build(base, bits, fast, host, lora, dtype) for host in (False, True))
    for _ in range(2):
        found = []
        for model in (resident, streamed):
            torch.manual_seed(0)
            found.append(step(model) | {"generated": generate(model)})
            with torch.no_grad():
                found[-1]["evaluated"] = model(IDS)
        assert found[0].keys() == found[1].keys()
        for name, tensor in found[0].items():
            assert tensor.equal(found[1][name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("bits", [16, 4])
def test_on_a_gpu_two_blocks_are_there_at_most(bits: int, tmp_path: Path) -> None:
    """Of 16 blocks of 50 MB in 16 bits, with the copies on a stream of their own."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "head_dim": 256}
    make_reference("mistral", tmp_path, **sizes)
    device, found, peaks = torch.device("cuda"), list[dict[str, Tensor]](), list[int]()
    for host in (False, True):
        model = build(tmp_path, bits, True, host, LoRAConfig(rank=4), torch.bfloat16, device)
        step(model)
        torch.cuda.reset_peak_memory_stats()
        found.append(step(model))
        peaks.append(torch.cuda.max_memory_allocated())
        del model
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-2, atol=1e-4, msg=name)
    linears = 16 * (2 * 1024 * 1024 + 2 * 512 * 1024 + 3 * 4096 * 1024) * bits / 8
    assert peaks[0] - peaks[1] > 0.8 * linears


Event = tuple[str, int]


def watch(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What happens from now on: "copy i" and, with the blocks that are on the device then, "compute i"."""
    events, request = list[Event](), streaming.BlockStream.request

    def noting(stream: streaming.BlockStream, index: int) -> None:
        request(stream, index)
        assert len(stream.arrivals) <= 2
        host, own = stream.blocks[index], [held[name].data_ptr() for held, name in stream.blocks[index].places]
        start = host.buffer.data_ptr()
        assert not any(start <= pointer < start + host.buffer.nbytes for pointer in own)  # copies
        events.append(("copy", index))

    monkeypatch.setattr(streaming.BlockStream, "request", noting)
    for index, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_, index=index: events.append(("compute", index)))
    return events


def test_the_next_block_is_requested_before_a_block_computes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four blocks, forward and backward; where one ends, the other begins with what is there."""
    model = build(base, 16, True, True, LoRAConfig(rank=4), torch.float32)
    events = watch(model, monkeypatch)
    step(model)
    forward = "copy 0, copy 1, compute 0, copy 2, compute 1, copy 3, compute 2, compute 3"
    backward = "copy 1, compute 2, copy 0, compute 1, compute 0"
    assert ", ".join(f"{what} {index}" for what, index in events) == f"{forward}, {backward}"
    events.clear()
    step(model)  # blocks 0 and 1 are there
    again = forward.removeprefix("copy 0, copy 1, ")
    assert ", ".join(f"{what} {index}" for what, index in events) == f"{again}, {backward}"
    events.clear()
    with torch.no_grad():
        model.eval()(IDS)
        model(IDS)
    evaluated = "compute 0, copy 2, compute 1, copy 3, compute 2, copy 0, compute 3"
    round_again = "copy 1, compute 0, copy 2, compute 1, copy 3, compute 2, copy 0, compute 3"
    assert ", ".join(f"{what} {index}" for what, index in events) == f"{evaluated}, {round_again}"


@pytest.mark.parametrize("bits", rest_is_slow([16, 4], 4))
def test_a_whole_run_is_the_same(bits: int, tmp_path: Path) -> None:
    """Begun with streamed blocks, ended with resident ones; its losses, evaluations and adapter."""
    short = {"quantization__bits": bits, "training__lr_scheduler": "constant", "training__warmup_ratio": 0.0}
    for name, device, steps in (("whole", "auto", 8), ("run", "host", 5), ("run", "auto", 8)):
        own = {"model__base_device": device, "training__max_steps": steps, "evaluation__prompts": 1}
        assert train.main(quick(tmp_path / name, **short, **own)) == 0
    for event in ("train", "eval"):
        expected = dict(losses(tmp_path / "whole", event))
        assert [expected[step] for step, _ in losses(tmp_path / "run", event) if step in expected] == [
            loss for step, loss in losses(tmp_path / "run", event) if step in expected
        ]
    assert equal(result(tmp_path / "run"), result(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"training.method": "full"}, "model.base_device: host: not supported with training.method=full: nothing is"),
        ({"training.sharding": "full"}, "model.base_device: host: not supported with training.sharding=full: remove"),
        ({"training.compile": True}, "model.base_device: host: not supported with training.compile: set that to false"),
        ({"training.checkpointing": "none"}, "training.checkpointing: none: model.base_device=host recomputes blocks"),
    ],
)
def test_what_host_excludes_is_one_line(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Config().override({"model.base_device": "host", **changes})
