"""Trackers: plots, which are on by default, and TensorBoard, trackio and Weights & Biases, which are off by default.

`Run.log` passes each event, with access tokens redacted, to every tracker. A tracker must neither end nor slow a run:
one that raises is removed with a warning, and plots are drawn in a separate process, for at most a tenth of the time.
TensorBoard: `tensorboard --logdir RUN/tensorboard`. trackio: `TRACKIO_DIR=RUN/trackio trackio show`. Weights & Biases:
upload RUN/wandb with `wandb sync`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.config import Config, LoggingConfig
from nanoft.config.fields import nearest, parse
from nanoft.tracking.plots import number
from nanoft.tracking.run import Tracker

TRACKERS = ("tensorboard", "trackio", "wandb")  # and the package and extra of each
TIMEOUT_S = 60.0  # for drawing the plots once


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def chosen_trackers(report_to: str | tuple[str, ...]) -> list[str]:
    """The trackers that logging.report_to names; all: every one that is installed; auto: the first, but never W&B."""
    names = parse("logging.report_to", report_to, tuple[str, ...]) if isinstance(report_to, str) else report_to
    known = ("none", "auto", "all", *TRACKERS)
    for name in [name for name in names if name not in known]:
        raise UserError(f"logging.report_to: {name!r:.60} is not a tracker{nearest(name, known)}")
    installed = [name for name in TRACKERS if is_installed(name)]
    local = [name for name in installed if name != "wandb"]
    also = installed if "all" in names else local[:1] if "auto" in names else []
    return [name for name in TRACKERS if name in (*names, *also)]


def require_tracker_packages(wanted: LoggingConfig) -> None:
    """Raise a UserError that names the extra to install, if a tracker's package is missing."""
    for name in chosen_trackers(wanted.report_to):
        if not is_installed(name):
            raise UserError(f"logging.report_to: {name} is not installed: pip install -e '.[{name}]', or set none")


def build_trackers(config: Config, directory: Path, step: int) -> list[Tracker]:
    """The trackers that the config asks for, after `step` completed steps."""
    plots = config.logging.plots
    kinds: dict[str, type[TensorBoard | WandB]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": WandB}
    drawn: list[Tracker] = [Plots(directory, plots)] if plots != "none" and is_installed("matplotlib") else []
    return drawn + [kinds[name](directory, config, step) for name in chosen_trackers(config.logging.report_to)]


def scalars(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """The finite numbers of an event and their names: train/loss, gradients/modules/q_proj/norm."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ("step", "time"):
                yield from scalars(part, f"{name}/{key}")
    elif math.isfinite(number(value)):
        yield name, number(value)


class Plots:
    """Redraws plots/ after every logged step or epoch and at the end of the run, in a separate process."""

    name = "drawing plots"

    def __init__(self, directory: Path, when: str):
        self.directory, self.when = directory, when
        self._thread, self._drawing = ThreadPoolExecutor(1), Future[float]()
        self._drawing.set_result(0.0)
        self._epoch: int | None = None
        self._is_due = False

    def log(self, event: dict[str, Any]) -> None:
        """Start drawing if it is due and nothing is being drawn; a RuntimeError if the last drawing failed."""
        if event["event"] in ("train", "eval"):
            epoch = event.get("epoch", self._epoch)
            self._is_due |= self.when == "step" or (self.when == "epoch" and epoch != (self._epoch or 0))
            self._epoch = epoch
        if self._drawing.done() and time.monotonic() >= self._drawing.result() and self._is_due:
            self._is_due, self._drawing = False, self._thread.submit(self._draw)

    def close(self) -> None:
        """Draw a last time, and raise if that fails or takes longer than `TIMEOUT_S`."""
        self._drawing.result()
        self._draw()

    def _draw(self) -> float:
        """Returns when, on the monotonic clock, the next drawing may begin, to draw for at most a tenth of the time."""
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "nanoft", "plot", str(self.directory.resolve())],
            cwd=Path(__file__).parents[2],  # makes nanoft importable there
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
            start_new_session=True,  # Ctrl-C must reach only the training process
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(lines[-1].removeprefix("error: "))
        return time.monotonic() + 9 * (time.monotonic() - started)


class TensorBoard:
    """TensorBoard event files; after a resume or rollback, repeated steps replace the old ones."""

    name = "TensorBoard"

    def __init__(self, directory: Path, _: Config, step: int):
        self.directory, self.step = directory / "tensorboard", step
        self._writer: Any = None

    def log(self, event: dict[str, Any]) -> None:
        if event.get("what") == "rolled back":
            self.close()
            self._writer, self.step = None, event["step"]
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory), purge_step=self.step + 1, flush_secs=10)
        for name, value in scalars(event, event["event"]):
            self._writer.add_scalar(name, value, event["step"], walltime=event["time"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Weights & Biases, offline unless WANDB_MODE says otherwise."""

    name = "W&B"

    def __init__(self, directory: Path, config: Config, _: int):
        self.directory, self.config = directory, config
        self._run: Any = None

    def log(self, event: dict[str, Any]) -> None:
        self._run = self._run or self._start()
        if values := dict(scalars(event, event["event"])):
            self._send(values, event["step"])

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _start(self) -> Any:
        import wandb

        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanoft"),
            name=self.directory.name,
            dir=str(self.directory),
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            config=self.config.to_dict(),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        run.define_metric("*", step_metric="step")  # W&B's own step cannot decrease after a rollback
        return run

    def _send(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})


class Trackio(WandB):
    """trackio, whose API follows W&B's, in RUN/trackio unless TRACKIO_DIR says otherwise."""

    name = "trackio"

    def close(self) -> None:
        if self._run is not None:
            import trackio

            with contextlib.redirect_stdout(io.StringIO()):
                trackio.finish()

    def _start(self) -> Any:
        os.environ.setdefault("TRACKIO_DIR", str(self.directory.resolve() / "trackio"))
        import trackio

        off = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        with contextlib.redirect_stdout(io.StringIO()):  # it is talkative
            return trackio.init("nanoft", self.directory.name, config=self.config.flat(), resume="allow", **off)

    def _send(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)
