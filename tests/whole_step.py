"""Training steps, each in a process of its own: python whole_step.py

Takes lines of JSON from stdin: the path of a config.json, dtype, rows, length, what blocks keep. For each it prints the
peak of a process that ran a step, and what the memory plan says, in bytes. The processes are forks: what all of them
import is imported once.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from nanoft import kernels
from nanoft.config import Config
from nanoft.lora import inject_lora
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.models.families import decoder_config
from nanoft.optim import build_optimizer
from nanoft.runtime.memory import held_bytes
from nanoft.training.memory_plan import count_parameters, estimate_memory

CPU = torch.device("cpu")


def peak_bytes() -> float:
    """The largest resident set since the process started; ru_maxrss would count the parent's, too."""
    if sys.platform == "linux":
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def run_step(path: str, dtype_name: str, rows: int, length: int, keep: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    decoder, config, dtype = decoder_config(json.loads(Path(path).read_text())), Config(), getattr(torch, dtype_name)
    policy, baseline = [keep] * decoder.num_layers, held_bytes(CPU)
    with torch.device("meta"):
        model = Decoder(decoder).to(dtype).requires_grad_(False)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    inject_lora(model, config.lora, 0)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert kernels.apply(model) == ""
    model.train().activation_policy = policy
    optimizer = build_optimizer(trained, config.training)
    ids = torch.randint(0, decoder.vocab_size, (rows, length))
    for _ in range(2):
        hidden = model(ids)
        token_nll(hidden, model.head, ids.flatten().roll(-1), cap=decoder.logit_cap).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    counts = count_parameters(decoder, config)
    plan = estimate_memory(decoder, counts, config, "cpu", dtype, rows, length, policy, baseline)
    return {"measured": peak_bytes(), "planned": plan.peak, "parts": plan.parts}


if __name__ == "__main__":
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            print(json.dumps(run_step(*json.loads(line))), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("{}", flush=True)
