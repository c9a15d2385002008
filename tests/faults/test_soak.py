"""bench/soak.py, shortened: its promises are kept, and it notices broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--steps", "500", "--out", str(tmp_path / "soak")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    found = json.loads((tmp_path / "soak.json").read_text())
    promises = {name: good for name, good in found["promises"].items() if "memory" not in name}  # too short for it
    assert all(promises.values()), done.stdout
    assert found["figures"]["processes"] > 2


def test_lines_that_are_torn_missing_or_double_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))  # for this test alone: bench has a merge.py, as the root has
    from soak import Metrics

    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.update()
    path.write_text('{"event": "train", "step": 1}\n{"event": "eval", "step": 1}\n{"event": "tra')
    metrics.update()
    assert (metrics.step, metrics.lines, metrics.wrong) == (1, 2, [])
    with open(path, "a") as file:
        file.write('in", "step": 2}\n{"event": "train", "step": 2}\n{"event": "train", "step": 4}\n{"event": \n')
    metrics.update()
    assert metrics.wrong == ["step 2 after step 2", "step 4 after step 2", "not JSON: b'{\"event\": '"]
    path.rename(tmp_path / "before")
    path.write_text('{"event": "train", "step": 1}\n')  # a process has begun again
    metrics.update()
    assert (metrics.step, len(metrics.wrong)) == (1, 3)
