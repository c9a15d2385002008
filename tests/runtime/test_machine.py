"""`train.py auto`: the config for the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import train
from nanoft.config.loading import load_file
from nanoft.runtime import machine
from tiny_models import make_chat_model, write_records


@pytest.mark.parametrize(
    ("device_type", "memory_gb", "name"),
    [  # total memory as PyTorch gives it
        ("cuda", 6.2, "gpu_8gb"),  # GTX 1660
        ("cuda", 8.3, "gpu_8gb"),  # RTX 4060
        ("cuda", 12.5, "gpu_12gb"),  # RTX 3060
        ("cuda", 16.9, "gpu_12gb"),  # RTX 4080
        ("cuda", 23.8, "gpu_24gb"),  # A10G
        ("cuda", 25.4, "gpu_24gb"),  # RTX 4090
        ("cuda", 42.3, "gpu_24gb"),  # A100 40GB
        ("cuda", 85.0, "gpu_80gb"),  # H100
        ("cuda", 150.1, "gpu_80gb"),  # H200
        ("mps", 34.4, "m4"),
        ("cpu", 16.0, "cpu"),
        ("cuda without bfloat16", 6.2, "gpu_8gb"),  # RTX 2060
        ("cuda without bfloat16", 11.5, "gpu_8gb"),  # RTX 2080 Ti
        ("cuda without bfloat16", 15.6, "gpu_16gb_fp16"),  # T4
        ("cuda without bfloat16", 34.1, "gpu_16gb_fp16"),  # V100 32GB
    ],
)
def test_auto_takes_the_largest_config_that_the_device_has_memory_for(
    device_type: str, memory_gb: float, name: str
) -> None:
    device_type, _, rest = device_type.partition(" ")
    path = machine.config_for(device_type, memory_gb, torch.float16 if rest else torch.bfloat16)
    assert path.stem == name
    config = load_file(path)
    assert config.system.device == device_type
    assert not config.system.memory_gb or config.system.memory_gb <= max(8, memory_gb * 1.01)


@pytest.mark.parametrize(("has_bfloat16", "name"), [(True, "gpu_12gb"), (False, "gpu_16gb_fp16")])
def test_auto_knows_whether_the_gpu_has_bfloat16(
    has_bfloat16: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 GB with (RTX 4080) and without (T4)."""
    monkeypatch.setattr(machine, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(machine, "total_memory_gb", lambda _: 16.9)
    monkeypatch.setattr(machine, "describe_device", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    path = machine.pick_config([])
    assert path.stem == name
    dtype = machine.choose_dtype(load_file(path).override({"model.dtype": "auto"}).model.dtype, torch.device("cuda"))
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float16)


def test_auto_says_what_it_takes_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_chat_model(tmp_path / "base")
    own = [f"model.name={tmp_path / 'base'}", f"data.train_file={write_records(tmp_path / 'data.jsonl')}"]
    few = ["training.max_steps=1", "evaluation.prompts=2", "model.max_seq_length=256", "system.device=cpu"]
    assert train.main(["auto", *own, *few, f"output.dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.startswith("auto      configs/cpu.py, because this is CPU, ")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["model"]["name"] == str(tmp_path / "base")
    assert recorded["training"]["gradient_accumulation_steps"] == 8  # that of configs/cpu.py
