"""What a command does not import: PyTorch's compiler takes as long as all the rest until the first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runs import ROOT, quick

PROGRAM = """
import sys, train
from nanoft.training import progress
def first_step(*_):
    print("compiler:", "torch._dynamo" in sys.modules)
    raise KeyboardInterrupt
progress.log_step = first_step
train.main(sys.argv[1:])
"""


def test_the_first_step_is_done_without_torchs_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PROGRAM, *quick(tmp_path / "run")]
    assert "compiler: False" in subprocess.run(words, capture_output=True, text=True, env=environment).stdout
