"""TODO."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoft import UserError, checkpoint, guard
from nanoft.batches import Batches, TokenDataset
from nanoft.checkpoint import AsyncCheckpointWriter, Checkpoint, CheckpointManager
from nanoft.config import Config
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset
from nanoft.kernels import sharding
from nanoft.lora import LoRALinear
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors, load_adapter_tensors
from nanoft.objectives import Objective
from nanoft.optim import load_optimizer_tensors, optimizer_tensors
from nanoft.runtime import distributed
from nanoft.runtime.device import set_rng_state
from nanoft.tracking.run import Meter, Run
from nanoft.training.memory_plan import Plan

Tensors = dict[str, torch.Tensor]


@dataclass
class TrainState:
    """Everything that changes while training, besides the weights and the optimizer's moments."""

    step: int = 0  # completed optimizer steps
    epoch: int = 0  # where the data stands: the window that comes next
    window: int = 0
    meter: Meter = field(default_factory=Meter)
    best_step: int = 0
    best_loss: float = float("inf")  # on the validation samples, nats per target token
    evaluations_without_gain: int = 0
    micro_batch_rows: int = 0  # fewer than configured, since memory was short; 0: as configured
    guard: guard.History = field(default_factory=guard.History)


@dataclass
class TrainContext:
    """The parts of one training job, made once and used together."""

    config: Config
    run: Run
    chat: ChatTokenizer
    model: Decoder
    adapters: dict[str, LoRALinear]  # empty when every parameter is trained
    objective: Objective
    optimizer: torch.optim.Optimizer
    corpus: PreparedDataset
    batches: Batches
    validation: TokenDataset
    checkpoints: CheckpointManager
    saves: AsyncCheckpointWriter
    base_directory: Path
    device: torch.device
    dtype: torch.dtype
    plan: Plan

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that learn, by name; if they are split over the ranks, this rank's parts."""
        sharding.reshard(self.model)
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def autocast(self) -> Any:
        """Full training keeps float32 weights and computes in model.dtype; adapters cast themselves."""
        wanted = not self.adapters and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if wanted else contextlib.nullcontext()


def trained_weights(job: TrainContext) -> dict[str, torch.Tensor]:
    return adapter_tensors(job.adapters) if job.adapters else {name: p.detach() for name, p in job.trained}


def weights_file(job: TrainContext) -> str:
    return "adapter" if job.adapters else "model"


# ---- Brought back


def starting_state(job: TrainContext, resume: str) -> TrainState:
    """Where the run begins, on every rank.

    Raises:
        UserError: `resume` names no checkpoint of this run, or none is whole.
    """
    try:
        return start_from(job, lambda: find_start(job, resume))
    except checkpoint.CheckpointCorrupted as reason:
        raise UserError(f"{reason}: start anew with another output.dir") from None


def find_start(job: TrainContext, resume: str) -> Checkpoint | None:
    """`auto`: the newest checkpoint that is whole, or a fresh start; `never`: a fresh start; PATH: that checkpoint."""
    if resume == "never":
        return None
    if resume != "auto":
        if Path(resume).resolve().parent != job.run.checkpoints.resolve():
            raise UserError(f"--resume: {resume}: is not in {job.run.checkpoints}: name a checkpoint of this run")
        if not Path(resume).is_dir():
            raise UserError(
                f"--resume: {resume}: no such checkpoint: there are those of steps {job.checkpoints.steps()}"
            )
        try:
            return job.checkpoints.verify(Path(resume))
        except (checkpoint.CheckpointCorrupted, OSError) as reason:
            raise UserError(f"--resume: {reason}") from None
    saved, damage = job.checkpoints.newest()
    if saved is None and job.run.finished_step():
        raise UserError(
            f"output.dir: {job.run.directory}: this run has ended, and its checkpoints are gone: eval.py and merge.py "
            "take what it learned; to train again choose another output.dir"
        )
    for what in damage:
        job.run.print(f"warning: {what}: going back to an earlier checkpoint")
    return saved


def start_from(job: TrainContext, choose: Callable[[], Checkpoint | None]) -> TrainState:
    """On every rank, the checkpoint that rank 0 chooses (its state is told, its tensors are read); None: fresh."""

    def chosen() -> tuple[str, dict[str, Any]]:
        saved = choose()
        return (str(saved.path), saved.state) if saved else ("", {})

    path, state = distributed.broadcast_from_rank0(chosen)
    if path:
        return restore(job, Checkpoint(Path(path), state))
    distributed.broadcast_tensors(trained_weights(job).values())
    return TrainState()


def restore(job: TrainContext, saved: Checkpoint) -> TrainState:
    """Put a checkpoint's weights, optimizer, position and random numbers back.

    Raises:
        Damaged: its hashes are right, and yet it is no checkpoint.
    """
    values = dict(saved.state)
    try:
        rng = values.pop("rng")
        state = TrainState(**{**values, "meter": Meter(**values["meter"]), "guard": guard.History(**values["guard"])})
        set_rng_state(rng)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise checkpoint.CheckpointCorrupted(f"{saved.path / 'state.json'}: {type(error).__name__}: {error}") from None
    load_weights(job, saved)
    moments = distributed.distribute_like(saved.tensors("optimizer"), optimizer_tensors(job.optimizer, job.trained))
    load_optimizer_tensors(job.optimizer, job.trained, moments)
    if state.micro_batch_rows:  # what fitted into memory
        job.batches.micro_batch_size = min(job.batches.micro_batch_size, state.micro_batch_rows)
    job.batches.seek(state.epoch, state.window)
    job.saves.last_step = state.step
    return state


def load_weights(job: TrainContext, saved: Checkpoint) -> None:
    """Only the weights of a checkpoint: to go on, or to take the best one as the result."""
    tensors = distributed.distribute_like(saved.tensors(weights_file(job)), trained_weights(job))
    if job.adapters:
        load_adapter_tensors(job.adapters, tensors, str(saved.path))
        return
    checkpoint.copy_matching({name: parameter.detach() for name, parameter in job.trained}, tensors, str(saved.path))
