"""Energy readings, from a counter that the tests play."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import quick, stop_after

import train
from nanoft.batches import Window
from nanoft.runtime import energy
from nanoft.runtime.energy import EnergyMeter
from nanoft.training.state import TrainContext


def test_a_counter_that_the_gpu_does_not_have_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(energy.ctypes, "CDLL", no_library)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1"))
    for kind in ("cpu", "cuda"):
        assert EnergyMeter(torch.device(kind)).used() == 0


def test_a_run_adds_up_what_its_steps_took_in_all_its_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, spent = train.accumulate, [100.0]
    monkeypatch.setattr(EnergyMeter, "read", lambda _: spent[0])

    def spend(ctx: TrainContext, window: Window) -> tuple[float, float]:
        spent[0] += 7.2
        return take(ctx, window)

    monkeypatch.setattr(train, "accumulate", spend)
    with monkeypatch.context() as patch:
        stop_after(2, patch, signal.SIGTERM)
        assert train.main(quick(tmp_path / "run", training__max_steps=5)) == train.STOPPED_BY_SIGNAL
    assert train.main(quick(tmp_path / "run", training__max_steps=5)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["training"]["energy_wh"] == pytest.approx(5 * 7.2 / 3600)
    assert report["cost"]["training_energy_wh"] == report["training"]["energy_wh"]
    assert "| energy, Wh " in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_counts_what_products_take() -> None:
    device = torch.device("cuda")
    counted, started = EnergyMeter(device), time.perf_counter()
    if counted.read() == 0:
        pytest.skip("this GPU has no counter that can be read")
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(200):
        x = (x @ x).clamp(-1, 1)
    torch.cuda.synchronize()
    time.sleep(0.2)  # the counter is brought up to date some ten times a second
    watts = counted.used() / (time.perf_counter() - started)
    assert 20 < watts < 3000
