"""Diagnostics inside the training loop: gradients by module, a profile of a few steps, the operation that produces NaN.

    logging.gradient_steps=10    every 10 steps, a `gradients` event: norm, maximum and share of zeros by module type
    system.profile=true          a few steps recorded by torch.profiler, for chrome://tracing or ui.perfetto.dev
    system.debug=true            the run ends at the first operation whose gradient is NaN, with its name and traceback

None of them changes a result; with `system.debug` a NaN ends the run, where the guard would skip the window.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from nanoft import TrainingFailed
from nanoft.config import Config
from nanoft.tracking.run import NullRun, Run

WAIT, WARM_UP, ACTIVE = 2, 1, 3  # steps of the profiler's schedule; the active ones are in the trace


class Profiler:
    """The diagnostics that a config asks for: a context around the loop, with `step` called after each step."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run
        self._open = contextlib.ExitStack()
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> Profiler:
        if self.config.system.debug:
            self._open.enter_context(named_anomalies())
        if self.config.system.profile and not isinstance(self.run, NullRun):  # only rank 0 records
            schedule = torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1)
            self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._save_profile)
            self._profile.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            if self._profile.step_num < WAIT + WARM_UP:
                self.run.print(f"profile   empty: recording starts after {WAIT + WARM_UP} steps, but the run had fewer")
            self._profile.stop()
        self._open.__exit__(*error)

    def step(self, step: int, trained: Iterable[tuple[str, nn.Parameter]], grad_norm: float) -> None:
        """Record an optimizer step, before its gradients are freed; grad_norm is the norm before clipping."""
        every = self.config.logging.gradient_steps
        if every and step % every == 0:
            limit = self.config.training.max_grad_norm
            unclipped = max(1.0, (grad_norm + 1e-6) / limit) if limit else 1.0  # as clip_grad_norm_ has scaled it
            self.run.log("gradients", step, modules=gradients_by_module(trained, unclipped))
        if self._profile is not None:
            self._profile.step()

    def _save_profile(self, profile: torch.profiler.profile) -> None:
        """Write the trace to disk and the most expensive operators to train.log."""
        path, operators = self.run.directory / "profile" / "trace.json", profile.key_averages()
        try:
            path.parent.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # disk full, for example: training continues
            self.run.log("warning", 0, what="profile failed", error=str(error))
            self.run.print(f"warning: profile failed: {error}")
        order = "self_device_time_total" if any(o.self_device_time_total for o in operators) else "self_cpu_time_total"
        self.run.print(f"profile   {ACTIVE} steps in {path}: open it in ui.perfetto.dev or chrome://tracing")
        self.run.print(operators.table(sort_by=order, row_limit=15, max_name_column_width=40))


def gradients_by_module(trained: Iterable[tuple[str, nn.Parameter]], scale: float = 1.0) -> dict[str, dict[str, float]]:
    """Norm, maximum magnitude and share of zeros of the gradients by module type (q_proj, down_proj, ...).

    Many zeros mean features that a module never sees; a norm far below the others means a module that does not learn.
    A parameter without a gradient counts as zeros; `scale` undoes clipping.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained:
        parts.setdefault(module_type(name), []).append(parameter)
    return {name: _gradient_figures(parameters, scale) for name, parameters in parts.items()}


def module_type(name: str) -> str:
    """layers.3.self_attn.q_proj.lora_A -> q_proj.lora_A; layers.3.mlp.down_proj.weight -> down_proj."""
    words = name.removesuffix(".weight").split(".")
    return ".".join(words[-2:] if words[-1].startswith(("lora_", "bias")) else words[-1:])


def _gradient_figures(parameters: list[nn.Parameter], scale: float) -> dict[str, float]:
    gradients = [p.grad.detach().float() for p in parameters if p.grad is not None]
    entries = sum(p.numel() for p in parameters)
    if not gradients:
        return {"norm": 0.0, "max": 0.0, "zeros": 1.0}
    norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
    largest = torch.stack([g.abs().amax() for g in gradients]).amax()
    filled = torch.stack([torch.count_nonzero(g) for g in gradients]).sum()
    norm, most, count = torch.stack([torch.linalg.vector_norm(norms), largest, filled.to(norms)]).tolist()  # one sync
    return {"norm": scale * norm, "max": scale * most, "zeros": 1 - count / entries}


@contextlib.contextmanager
def named_anomalies() -> Iterator[None]:
    """torch's anomaly mode: it warns with the traceback of the forward call; its error becomes a TrainingFailed."""
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.filterwarnings("always", "Error detected in")
        try:
            yield
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            raise TrainingFailed(
                f"system.debug: {error} The warning above has the line that called it: check the inputs of that "
                "operation or lower training.learning_rate; without system.debug the window would be skipped"
            ) from None
