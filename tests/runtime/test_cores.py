"""Cores, threads and how they wait: the decision as a table, real processes, and a slowdown that is played."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, quick

from nanoft.runtime import cores
from nanoft.runtime.cores import SLEEP, SPIN, SlowdownMonitor, decide

SLEEPS, SPINS = dict([SLEEP]), dict([SPIN])
FREE = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
# A command on a machine of which others take so many cores.
COMMAND = """
import runpy, sys
from nanoft.runtime import cores
cores.cores_of_others = lambda: {others}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("environment", "count", "granted", "others", "chosen"),
    [
        ({}, 2, math.inf, 0.1, SPINS),
        ({}, 2, math.inf, 1.0, SLEEPS),
        ({}, 64, math.inf, 1.0, SLEEPS),  # whose thread shares its core, while the other 63 wait
        ({}, 64, 4.0, 30.0, {**SPINS, "OMP_NUM_THREADS": "4"}),  # a container with more than enough idle cores
        ({}, 64, 4.0, 61.0, {**SLEEPS, "OMP_NUM_THREADS": "4"}),
        ({}, 2, 0.5, 0.0, {**SPINS, "OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "1"}, 2, math.inf, 1.0, {}),  # as torchrun sets it
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 2, math.inf, 1.0, {}),
        ({"GOMP_SPINCOUNT": "0"}, 2, 1.0, 0.0, {}),
        ({"KMP_BLOCKTIME": "0"}, 2, math.inf, 0.0, {}),
    ],
)
def test_what_is_decided(
    environment: dict[str, str], count: int, granted: float, others: float, chosen: dict[str, str]
) -> None:
    assert decide(environment, count, granted, others) == chosen


def test_large_tensors_lie_in_huge_pages() -> None:
    allowed = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not allowed.is_file() or "[never]" in allowed.read_text("utf-8"):
        pytest.skip("this kernel gives no huge pages")
    program = (
        "from nanoft.runtime import cores; cores.prepare(0.01)\n"
        "import re, torch; kept = torch.ones(64 << 18)\n"  # 64 MiB
        "print(sum(map(int, re.findall(r'AnonHugePages: +(\\d+) kB', open('/proc/self/smaps').read()))))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(found.stdout) >= 48 << 10  # KiB; of single pages none may be free


def test_the_quota_is_the_lowest_of_the_groups_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "cgroup")
    assert cores.quota() == math.inf  # not Linux
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    assert cores.quota() == math.inf
    (tmp_path / "job" / "step" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "job" / "cpu.max").write_text("150000 100000\n")
    assert cores.quota() == 1.5


def test_what_others_take_is_measured_on_the_allowed_cores_without_the_process_itself() -> None:
    program = (
        "import os, sys, time; from nanoft.runtime.cores import allowed_cores, cores_of_others\n"
        "os.sched_setaffinity(0, {allowed_cores()[0]}); cores_of_others(); start = time.monotonic()\n"
        "while time.monotonic() < start + 0.7: pass\n"
        "print(cores_of_others())"
    )
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system cannot bind a process to a core")
    first = f"import os; os.sched_setaffinity(0, {{{cores.allowed_cores()[0]}}})\nwhile True: pass"
    neighbor = subprocess.Popen([sys.executable, "-c", first])
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    finally:
        neighbor.kill()
        neighbor.wait()
    assert 0.25 < float(done.stdout) <= 1.0  # half of the core; more if the machine does other things


def test_a_run_waits_by_the_load_of_its_session_with_the_threads_of_its_first(tmp_path: Path) -> None:
    threads = []
    for others, steps, (name, value) in ((2.0, 1, SLEEP), (0.0, 2, SPIN)):
        script = COMMAND.format(others=others)
        words = [
            sys.executable,
            "-c",
            script,
            str(ROOT / "train.py"),
            *quick(tmp_path / "run", training__max_steps=steps),
        ]
        if steps == 2:
            path = tmp_path / "run" / "config.json"
            recorded = json.loads(path.read_text())
            recorded["provenance"]["threads"] = threads[0] = threads[0] + 1  # as if begun on more cores
            path.write_text(json.dumps(recorded))
        shown = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=FREE, check=True).stdout
        recorded = json.loads((tmp_path / "run" / "config.json").read_text())["provenance"]
        assert recorded["waiting"] == f"{name}={value}"
        assert ("other processes take 2.0 of" in shown) == (steps == 1)
        assert f"CPU, {recorded['threads']} thread" in shown
        threads.append(recorded["threads"])
    assert threads[0] == threads[1]


@pytest.mark.parametrize("script", ["eval.py", "merge.py", "nanoft/__main__.py"])
def test_every_command_decides_before_torch_is_imported(script: str) -> None:
    arguments = {"eval.py": ["x"], "merge.py": ["x", "--out", "y"]}.get(script, ["doctor"])
    program = (
        "import os, sys\nclass Spy:\n    def find_spec(self, name, *_):\n"
        "        if name == 'torch': print(os.environ['OMP_WAIT_POLICY'], flush=True); os._exit(0)\n"
        "sys.meta_path.insert(0, Spy())" + COMMAND.format(others=2.0)
    )
    words = [sys.executable, "-c", program, script, *arguments]
    assert subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=FREE).stdout == "PASSIVE\n"


def test_a_slowdown_is_reported_if_others_take_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlowdownMonitor, "SECONDS", 0.0)
    taken = 0.0
    monkeypatch.setattr(cores, "cores_of_others", lambda: taken)
    monitor, tokens, seconds, said = SlowdownMonitor(), 0, 0.0, []

    def steps(speed: float) -> None:
        nonlocal tokens, seconds
        for _ in range(SlowdownMonitor.STEPS):
            tokens, seconds = tokens + 100, seconds + 100 / speed
            said.append(monitor.check(tokens, seconds))

    steps(2000)
    steps(900)  # slower, and nobody else is there: the run's own affair
    taken = 1.0
    steps(1100)  # more than half
    assert not any(said)
    tokens, seconds = tokens - 500, seconds - 1.0  # a rollback
    monitor.check(tokens, seconds)
    steps(900)
    assert [text[:51] for text in said if text] == ["900 tokens/s instead of 2,000, while other processe"]
    assert "take 1.0 of" in said[-1]
    assert "system.threads=1" in said[-1]
