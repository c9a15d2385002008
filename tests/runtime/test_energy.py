"""Energy readings, from system counters that the tests write as files."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import quick, stop_after

import train
from nanoft.batches import Window
from nanoft.runtime import energy
from nanoft.runtime.energy import EnergyMeter
from nanoft.training.state import TrainContext

CPU = torch.device("cpu")


def zone(root: Path, number: str, name: str, joules: float, end: float = 1000.0) -> Path:
    """A counter in powercap's layout."""
    path = root / f"intel-rapl:{number}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{end * 1e6:.0f}\n")
    say(path, joules)
    return path


def say(path: Path, joules: float) -> None:
    (path / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")


def test_packages_are_added_up_and_begin_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    one, two = zone(tmp_path, "0", "package-0", 100), zone(tmp_path, "1", "package-1", 990)
    part, whole = zone(tmp_path, "0:0", "core", 50), zone(tmp_path, "2", "psys", 5)
    counted = EnergyMeter(CPU)
    assert counted.used() == 0
    for path, joules in ((one, 130), (two, 15), (part, 70), (whole, 800)):
        say(path, joules)
    assert counted.used() == pytest.approx(30 + (1000 - 990 + 15))
    assert counted.used() == 0
    (two / "energy_uj").unlink()
    say(one, 131)
    assert counted.used() == pytest.approx(1)


def test_what_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    assert EnergyMeter(CPU).used() == 0
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    (zone(tmp_path, "0", "package-0", 100) / "energy_uj").unlink()  # as for whoever is not root
    (zone(tmp_path, "1", "package-1", 100) / "energy_uj").write_text("no number")
    assert EnergyMeter(CPU).used() == 0


def test_a_run_adds_up_what_its_steps_took_in_all_its_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    counter = zone(tmp_path, "0", "package-0", 0)
    take, spent = train.accumulate, [0.0]

    def spend(ctx: TrainContext, window: Window) -> tuple[float, float]:
        spent[0] += 7.2
        say(counter, spent[0])
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
    if not counted.counters:
        pytest.skip("this GPU has no counter that can be read")
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(200):
        x = (x @ x).clamp(-1, 1)
    torch.cuda.synchronize()
    time.sleep(0.2)  # the counter is brought up to date some ten times a second
    watts = counted.used() / (time.perf_counter() - started)
    assert 20 < watts < 3000
