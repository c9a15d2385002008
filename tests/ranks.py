"""Runs of train.py in several processes, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ROOT, quick

# train.py with something done before, and the exit code written down: torchrun itself ends with 1 whatever it was
WORKER = """
import os, sys, pathlib
import torch, train
from nanoft.objectives import sft
from nanoft.runtime import distributed
from nanoft.training import progress, setup
rank = int(os.environ["RANK"])
{before}
try:
    code = train.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
pathlib.Path({codes!r}, str(rank)).write_text(str(code))
sys.exit(code)
"""
EXACT = {
    "lora__dropout": 0.0,
    "system__threads": 1,
    "evaluation__batch_size": 3,
    "evaluation__prompt_batch_size": 1,
    "evaluation__temperature": 0.7,
}


def torchrun(processes: int, program: list[str]) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *program], env=environment, cwd=ROOT, **pipes)


def start(processes: int, directory: Path, before: str = "", **changes: Any) -> subprocess.Popen[str]:
    codes = directory.with_name(directory.name + "-codes")
    codes.mkdir(exist_ok=True)
    worker = codes / "worker.py"
    worker.write_text(WORKER.format(before=before, codes=str(codes)))
    return torchrun(processes, [str(worker), *quick(directory, **{**EXACT, **changes})])


def codes(directory: Path) -> dict[int, int]:
    found = directory.with_name(directory.name + "-codes")
    return {int(path.name): int(path.read_text()) for path in found.iterdir() if path.name.isdigit()}


def run(processes: int, directory: Path, before: str = "", **changes: Any) -> tuple[str, str]:
    """Run the command; returns stdout and stderr."""
    is_packed = changes.get("quantization__bits", 16) < 16 and changes.get("training__sharding") == "full"
    if is_packed and torch.__version__ < "2.12":
        pytest.skip("refused before PyTorch 2.12: see test_shards_of_integers_need_pytorch_2_12")
    process = start(processes, directory, before, **changes)
    try:
        return process.communicate(timeout=180)
    finally:
        process.kill()


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], allowed: float) -> None:
    a, b = (torch.cat([part[name].flatten().double() for name in sorted(expected)]) for part in (found, expected))
    assert ((a - b).norm() / b.norm()).item() <= allowed
