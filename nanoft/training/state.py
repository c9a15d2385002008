"""What a training run consists of (`TrainContext`), and what changes while it trains (`TrainState`).

A checkpoint holds exactly what changes: the trained weights, the optimizer's moments, the random number generators, the
loss scale and `TrainState`. So a run that is restored from one continues as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanoft import UserError, guard
from nanoft.batches import Batches, TokenDataset, Window
from nanoft.blocks.trained import Adapter
from nanoft.checkpoint import AsyncCheckpointWriter, Checkpoint, CheckpointCorrupted, CheckpointManager
from nanoft.config import Config
from nanoft.config.settings import TrainingConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset
from nanoft.evaluation.evaluate import held_out_prompts
from nanoft.kernels import sharding
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors, copy_matching, load_adapter_tensors
from nanoft.models.model_files import ModelFiles
from nanoft.objectives.objective import Objective
from nanoft.runtime import distributed
from nanoft.runtime.cores import SlowdownMonitor
from nanoft.runtime.device import Machine, set_rng_state
from nanoft.tracking.run import Meter, Run
from nanoft.training.memory_plan import Plan, Planner

ANOTHER = "start a new run with another output.dir"
RISES = 2  # consecutive rises of validation loss, while training loss falls, that are more than noise


@dataclass
class LossTrend:
    """Training and validation loss from one evaluation to the next, to notice when they diverge."""

    nats: float = 0.0  # of training since the last evaluation
    units: float = 0.0
    training: float = -math.inf  # mean loss between the last two evaluations
    validation: float = 0.0  # at the last evaluation
    rises: int = 0  # consecutive evaluations with a higher validation and a lower training loss

    def update(self, validation: float) -> str:
        """The text of a warning, or ""."""
        before, self.validation = self.validation, validation
        past, self.training = self.training, self.nats / max(self.units, 1e-9)
        self.nats = self.units = 0.0
        if not math.isfinite(validation):
            return f"validation loss is {validation}"
        is_apart = validation > before and self.training < past
        self.rises = self.rises + 1 if is_apart else 0 if validation < before else self.rises
        rise, fall = f"{before:.4f} -> {validation:.4f}", f"{past:.4f} -> {self.training:.4f}"
        return f"validation loss rises ({rise}) while training loss falls ({fall})" if self.rises >= RISES else ""


@dataclass
class TrainState:
    """Everything that changes while training, besides weights, moments, random numbers and the loss scale."""

    step: int = 0  # completed optimizer steps
    epoch: int = 0  # the position in the data: the window that comes next
    window: int = 0
    meter: Meter = field(default_factory=Meter)
    best_step: int = 0
    best_loss: float = float("inf")  # on the validation samples
    evaluations_without_gain: int = 0
    trend: LossTrend = field(default_factory=LossTrend)
    overflow_steps: int = 0  # windows skipped because their gradient overflowed float16
    updates: int = 0  # optimizer steps already taken on the next window, if it takes several
    micro_batch_rows: int = 0  # fewer than configured, after running out of memory; 0: as configured
    guard: guard.History = field(default_factory=guard.History)
    held_out: dict[str, float] = field(default_factory=dict)  # figures of the last evaluation
    begun: dict[str, float] = field(default_factory=dict)  # of the objective, at the first logged step
    warned: list[str] = field(default_factory=list)  # topics of warnings that are given once

    def advance(self, window: Window, loss: float, units: float, seconds: float, joules: float) -> None:
        """Count a completed optimizer step, whose loss is a mean over these units, and move on to the next window."""
        self.step += 1
        self.skip(window)
        self.meter.add(loss * units, units, window.tokens, window.target_tokens, seconds, joules)
        self.trend.nats += loss * units
        self.trend.units += units

    def skip(self, window: Window) -> None:
        """Move on to the next window without a further step."""
        self.epoch, self.window = window.next_position
        self.updates = 0

    def should_stop_early(self, t: TrainingConfig) -> bool:
        return 0 < t.early_stopping_patience <= self.evaluations_without_gain


@dataclass
class TrainContext:
    """The parts of one training run, built once."""

    config: Config
    run: Run
    machine: Machine
    files: ModelFiles
    tokenizer: ChatTokenizer
    corpus: PreparedDataset
    batches: Batches
    validation: TokenDataset
    model: Decoder
    adapters: dict[str, Adapter]  # empty when every parameter is trained
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    writer: AsyncCheckpointWriter
    planner: Planner
    plan: Plan
    slowdown: SlowdownMonitor = field(default_factory=SlowdownMonitor)

    @property
    def device(self) -> torch.device:
        return self.machine.device

    @property
    def checkpoints(self) -> CheckpointManager:
        return self.writer.checkpoints

    @property
    def total_steps(self) -> int:
        return int(self.corpus.report["steps"])

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """The held-out prompts to answer, read again from their files."""
        samples = self.corpus.untruncated(self.corpus.validation)
        return held_out_prompts(self.corpus.conversations(samples), self.config.evaluation.prompts)

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters by name; of a sharded model, this rank's shards."""
        sharding.reshard(self.model)
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def autocast(self) -> Any:
        """Full training keeps float32 weights and computes in model.dtype; adapters cast themselves."""
        wanted = not self.adapters and self.machine.dtype != torch.float32
        return torch.autocast(self.device.type, self.machine.dtype) if wanted else contextlib.nullcontext()

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that a checkpoint saves."""
        sharding.reshard(self.model)  # from here on, the adapters of a sharded model are shards
        every = self.model.named_parameters()  # also what is frozen in full training
        return adapter_tensors(self.adapters) if self.adapters else {name: p.detach() for name, p in every}

    @property
    def weights_file(self) -> str:
        return "adapter" if self.adapters else "model"


def restore(ctx: TrainContext, resume: str) -> TrainState:
    """The state that the run starts from, on every rank; `resume`: auto, never, or the path of a checkpoint."""
    try:
        return restore_from(ctx, lambda: find_checkpoint(ctx, resume))
    except CheckpointCorrupted as reason:
        raise UserError(f"{reason}: {ANOTHER}") from None


def find_checkpoint(ctx: TrainContext, resume: str) -> Checkpoint | None:
    """`auto`: the newest valid checkpoint, or a fresh start; `never`: a fresh start; PATH: that checkpoint."""
    if resume == "never":
        return None
    if resume != "auto":
        if Path(resume).resolve().parent != ctx.run.checkpoints.resolve() or not Path(resume).is_dir():
            steps = ctx.checkpoints.steps()
            raise UserError(f"--resume: {resume}: not a checkpoint of this run: choose one of steps {steps}")
        try:
            return ctx.checkpoints.verify(Path(resume))
        except (CheckpointCorrupted, OSError) as reason:
            raise UserError(f"--resume: {reason}") from None
    saved, damage = ctx.checkpoints.newest()
    if saved is None and ctx.run.finished_step():
        use = "use its result with eval.py and merge.py, or choose another output.dir to train again"
        raise UserError(f"output.dir: {ctx.run.directory}: this run has ended and has no checkpoints: {use}")
    for what in damage:
        ctx.run.print(f"warning: {what}: using an earlier checkpoint")
    return saved


def restore_from(ctx: TrainContext, choose: Callable[[], Checkpoint | None]) -> TrainState:
    """Restore the checkpoint that rank 0 chooses, on every rank; None: a fresh start."""

    def chosen() -> tuple[str, dict[str, Any]]:
        saved = choose()
        return (str(saved.path), saved.state) if saved else ("", {})

    path, contents = distributed.broadcast_from_rank0(chosen)
    if not path:
        distributed.broadcast_tensors(ctx.trained_weights().values())
        return TrainState()
    saved = Checkpoint(Path(path), contents)
    state = read_state(saved, ctx.scaler)
    load_weights(ctx, saved)
    moments = sharding.distribute_like(saved.tensors("optimizer"), optimizer_tensors(ctx.optimizer, ctx.trained))
    load_optimizer_tensors(ctx.optimizer, ctx.trained, moments)
    if state.micro_batch_rows:  # what fitted into memory
        ctx.batches.micro_batch_size = min(ctx.batches.micro_batch_size, state.micro_batch_rows)
    ctx.writer.last_step = state.step
    return state


def read_state(saved: Checkpoint, scaler: torch.amp.GradScaler) -> TrainState:
    """The TrainState of a checkpoint; also restores the random number generators and the loss scale."""
    values = dict(saved.state)
    try:
        rng = values.pop("rng")
        if loss_scale := values.pop("scaler", {}):  # empty if the run began in another dtype
            scaler.load_state_dict(loss_scale)
        for name, kind in (("meter", Meter), ("guard", guard.History), ("trend", LossTrend)):
            values[name] = kind(**values[name])
        state = TrainState(**values)
        set_rng_state(rng)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
        raise CheckpointCorrupted(f"{saved.path / 'state.json'}: {type(error).__name__}: {error}") from None
    return state


def load_weights(ctx: TrainContext, saved: Checkpoint) -> None:
    """Load only the weights of a checkpoint: to resume, or to use the best one as the result."""
    tensors = sharding.distribute_like(saved.tensors(ctx.weights_file), ctx.trained_weights())
    if ctx.adapters:
        load_adapter_tensors(ctx.adapters, tensors, str(saved.path))
    else:
        copy_matching(ctx.trained_weights(), tensors, str(saved.path), ANOTHER)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: `<parameter>.exp_avg`, ..., as the optimizer calls them.

    Tensors are the optimizer's own, not copies; plain numbers (bitsandbytes counts steps in an int) become tensors.
    """
    return {f"{name}.{key}": torch.as_tensor(value) for name, p in named for key, value in optimizer.state[p].items()}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: Sequence[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    """Fill the allocated state from `optimizer_tensors`, matched by name; a UserError if something does not fit."""
    copy_matching(optimizer_tensors(optimizer, named), tensors, "optimizer.safetensors", ANOTHER)
    for name, parameter in named:
        state = optimizer.state[parameter]
        state.update({key: int(tensors[f"{name}.{key}"]) for key, held in state.items() if isinstance(held, int)})
