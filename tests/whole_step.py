"""One training step in its own process: python whole_step.py CONFIG_JSON DTYPE ROWS LENGTH KEEP

Prints the peak of the process and what the memory plan says, in bytes.
"""

from __future__ import annotations

import json
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
    """The largest resident set since the program started; ru_maxrss would count the parent's, too."""
    if sys.platform == "linux":
        line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(path: str, dtype_name: str, rows: str, length: str, keep: Any) -> None:
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
    ids = torch.randint(0, decoder.vocab_size, (int(rows), int(length)))
    for _ in range(2):
        hidden = model(ids)
        token_nll(hidden, model.head, ids.flatten().roll(-1), cap=decoder.logit_cap).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    counts = count_parameters(decoder, config)
    plan = estimate_memory(decoder, counts, config, "cpu", dtype, int(rows), int(length), policy, baseline)
    print(json.dumps({"measured": peak_bytes(), "planned": plan.peak, "parts": plan.parts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
