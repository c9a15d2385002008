"""Looking closer at the steps of a run: gradients by module, where the time goes, which operation makes a NaN.

    logging.gradient_steps=10    a `gradients` line every ten steps: norm, largest entry, share of zeros by module
    system.profile=true          a few steps recorded by torch.profiler, for chrome://tracing or ui.perfetto.dev
    system.debug=true            the run ends at the first operation whose gradient is NaN, and says which

None of them changes a result: they read, and take time. (`system.debug` does change what follows: the guard, which
would leave such a window out, is not asked.)
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoft import TrainingFailed
from nanoft.config import Config

SETTLING, WARM_UP, RECORDED = 2, 1, 3  # steps before, steps that the profiler warms up with, steps in the trace
TOP = 15  # operators in the table
NAN = re.compile(r"Function '(\w+)' returned nan values")  # what torch's anomaly mode raises
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')  # of the traceback that it warns with before


class Profiler:
    """What a config asks to look at. `with Probe(...) as probe:` around the loop, `probe.step(...)` in each step."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        log: Callable[..., None],
        print: Callable[[str], None],
        records: bool = True,
    ):
        """
        Args:
            log: takes the event, the step and its values, as `Run.log` does.
            print: takes a line for people.
            records: whether this process writes the profile; of several, one does.
        """
        self.config, self.directory, self.log, self.print, self.records = config, directory, log, print, records
        self._open = contextlib.ExitStack()
        self._profile: torch.profiler.profile | None = None

    def __enter__(self) -> Profiler:
        if self.config.system.debug:
            self._open.enter_context(named_anomalies())
        if self.config.system.profile and self.records:
            schedule = torch.profiler.schedule(wait=SETTLING, warmup=WARM_UP, active=RECORDED, repeat=1)
            self._profile = torch.profiler.profile(schedule=schedule, on_trace_ready=self._keep)
            self._profile.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._end_profile()
        self._open.__exit__(*error)

    def step(self, step: int, trained: Iterable[tuple[str, nn.Parameter]], grad_norm: float) -> None:
        """After an optimizer step, while its gradients are there.

        Args:
            grad_norm: of the gradient before it was clipped.
        """
        every = self.config.logging.gradient_steps
        if every and step % every == 0:
            limit = self.config.training.max_grad_norm
            unclipped = max(1.0, (grad_norm + 1e-6) / limit) if limit else 1.0  # as clip_grad_norm_ has scaled it
            self.log("gradients", step, modules=gradients_by_module(trained, unclipped))
        if self._profile is not None:
            self._profile.step()

    def _end_profile(self) -> None:
        assert self._profile is not None
        early = self._profile.step_num < SETTLING + WARM_UP
        self._profile.stop()
        self._profile = None
        if early:
            self.print(f"profile   nothing: it begins after {SETTLING + WARM_UP} steps, and there were fewer")

    def _keep(self, profile: torch.profiler.profile) -> None:
        """The trace to the disk, the operators that take the time to train.log."""
        path = self.directory / "profile" / "trace.json"
        try:
            path.parent.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # the disk refuses: a run is worth more than a look at it
            self.log("warning", 0, what="profile failed", error=str(error))
            self.print(f"warning: profile failed: {error}")
        operators = profile.key_averages()
        on_device = any(operator.self_device_time_total for operator in operators)
        order = "self_device_time_total" if on_device else "self_cpu_time_total"
        self.print(f"profile   {RECORDED} steps in {path}: open it in ui.perfetto.dev or chrome://tracing")
        self.print(operators.table(sort_by=order, row_limit=TOP, max_name_column_width=40))


def gradients_by_module(trained: Iterable[tuple[str, nn.Parameter]], scale: float = 1.0) -> dict[str, dict[str, float]]:
    """Norm, largest magnitude and share of zeros of the gradients of all modules of one name (q_proj, down_proj, ...).

    The squares of the norms add up to that of the whole gradient. A large share of zeros: tokens or features that a
    module never sees; a norm far below the others': a module that does not learn.

    Args:
        trained: (name, parameter); one without gradient counts as zeros.
        scale: factor on the gradients, to undo clipping.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trained:
        parts.setdefault(module_type(name), []).append(parameter)
    return {name: _figures(parameters, scale) for name, parameters in parts.items()}


def module_type(name: str) -> str:
    """layers.3.self_attn.q_proj.lora_A -> q_proj.lora_A; layers.3.mlp.down_proj.weight -> down_proj."""
    words = name.removesuffix(".weight").split(".")
    return ".".join(words[-2:] if words[-1].startswith(("lora_", "bias")) else words[-1:])


def _figures(parameters: list[nn.Parameter], scale: float) -> dict[str, float]:
    gradients = [p.grad.detach().float() for p in parameters if p.grad is not None]
    entries = sum(p.numel() for p in parameters)
    if not gradients:
        return {"norm": 0.0, "max": 0.0, "zeros": 1.0}
    norms = torch.stack([torch.linalg.vector_norm(g) for g in gradients])
    largest = torch.stack([g.abs().amax() for g in gradients]).amax()
    filled = torch.stack([torch.count_nonzero(g) for g in gradients]).sum()
    norm, most, count = torch.stack([torch.linalg.vector_norm(norms), largest, filled.to(norms)]).tolist()  # one wait
    return {"norm": scale * norm, "max": scale * most, "zeros": 1 - count / entries}


@contextlib.contextmanager
def named_anomalies() -> Iterator[None]:
    """torch's anomaly mode, whose two messages (which operation, and where it was called) become one line.

    Raises:
        TrainingFailed: an operation gave NaN in the backward pass.
    """
    with warnings.catch_warnings(record=True) as told, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            found = NAN.search(str(error))
            if not found:
                raise
            traces = [str(w.message) for w in told if "Traceback of forward call" in str(w.message)]
            raise TrainingFailed(
                f"system.debug: the gradient of {found[1]} is NaN{_place(traces)}: see what goes into that operation, "
                "or lower training.learning_rate; without system.debug such a window is left out"
            ) from None


def _place(traces: list[str]) -> str:
    """Where the operation was called: the innermost line of the program that is not torch's."""
    frames = [f for trace in traces[-1:] for f in FRAME.findall(trace) if "/torch/" not in f[0]]
    return f", called in {Path(frames[-1][0]).name}, line {frames[-1][1]} ({frames[-1][2]})" if frames else ""
