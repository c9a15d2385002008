"""One training job: its parts, what changes while it trains, and how both are made, saved and brought back.

A job is made in an order in which whatever can be wrong is found early: the directory is claimed, the data read, then
the model loaded. What changes is little: the weights that learn, the optimizer's moments, the random numbers, and
`State`. A checkpoint holds exactly these, so a job that is brought back from one goes on as if nothing had been.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanoft import UserError, checkpoint, guard, kernels, parallel, runtime
from nanoft.adapter import adapter_tensors, load_adapter_tensors
from nanoft.batches import Batches, Samples
from nanoft.chat import ChatTokenizer
from nanoft.checkpoint import Background, Checkpoints, Outcome, Saved
from nanoft.config import Config, check_same_run, settled_hash
from nanoft.corpus import REJECTED, Corpus, data_hash, describe, open_corpus
from nanoft.lora import LoRALinear, disabled, inject_lora
from nanoft.metrics import Meter, Run
from nanoft.model import Decoder
from nanoft.models.dequantize import cache_weights
from nanoft.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from nanoft.plan import Plan, choose_activations, too_little
from nanoft.preflight import check_ids
from nanoft.recompute import compile_blocks
from nanoft.weights import (
    check_quantization,
    find_model,
    hash_files,
    load_model,
    quantization_of,
    read_shape,
    shard_paths,
)

Tensors = dict[str, torch.Tensor]
Provenance = dict[str, Any]  # what a run depends on: versions, hashes of data and base, device, date
IDENTITY = ("data_sha256", "base_sha256", "versions")  # of these, what a checkpoint says about itself


@dataclass
class State:
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
class Job:
    """The parts of one training job, made once and used together."""

    config: Config
    run: Run
    chat: ChatTokenizer
    model: Decoder
    adapters: dict[str, LoRALinear]  # empty when every parameter is trained
    optimizer: torch.optim.Optimizer
    corpus: Corpus
    batches: Batches
    validation: Samples
    checkpoints: Checkpoints
    saves: Background
    base_directory: Path
    device: torch.device
    dtype: torch.dtype
    plan: Plan

    @property
    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that learn, by name; if they are split over the ranks, this rank's parts."""
        parallel.split_up(self.model)
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def autocast(self) -> Any:
        """Full training keeps float32 weights and computes in model.dtype; adapters cast themselves."""
        wanted = not self.adapters and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if wanted else contextlib.nullcontext()


# ---- Made


def claim(config: Config, run: Run, resume: str) -> Provenance:
    """Make sure that the directory is this run's, fresh or to go on with, and write its config.json.

    Returns what the run depends on; the date, which a template may print, is that of its first session.
    """
    base = find_model(config.model.name)
    read_shape(base)  # a model that cannot be used is refused before its weights are hashed and the data is read
    check_quantization(base, quantization_of(config))
    weights = [] if config.model.random_init else shard_paths(base)
    tokenizer = [base / name for name in ("config.json", "tokenizer.json") if (base / name).is_file()]
    device = runtime.choose_device(config.system.device)
    recorded = run.recorded_config()
    date = str((recorded or {}).get("provenance", {}).get("date") or datetime.now().date().isoformat())
    provenance: Provenance = {
        "versions": runtime.versions(),
        "device": device.type,
        "dtype": str(runtime.choose_dtype(config.model.dtype, device)).removeprefix("torch."),
        "data_sha256": data_hash(config.data),
        "base_sha256": hash_files([*tokenizer, *weights]),
        "date": date,
    }
    if recorded is not None:
        if resume == "never":
            raise UserError(f"output.dir: {run.directory}: holds a run already: choose another output.dir")
        check_same_run(recorded, config, provenance, str(run.directory))
        if (before := recorded["provenance"].get("versions")) != provenance["versions"]:
            run.say(f"warning: other versions than when the run began ({before}): last bits may differ")
    text = json.dumps({**config.to_dict(), "provenance": provenance}, indent=2) + "\n"
    checkpoint.replace_file(run.directory / "config.json", text.encode())
    return provenance


def load_data(config: Config, run: Run, date: datetime) -> tuple[ChatTokenizer, Corpus, Batches]:
    """The tokenizer, the samples and their order; says what became of every record."""
    d, t, length, seed = config.data, config.training, config.model.max_seq_length, config.system.seed
    chat = ChatTokenizer.from_directory(find_model(config.model.name), d.template_args)
    chat.date = date
    started = time.perf_counter()
    bar = config.logging.progress_bar and not parallel.rank()
    corpus = parallel.rank_0_first(lambda: open_corpus(d, length, seed, chat, run.say, bar))
    parallel.check_alike({"data.train_file": corpus.directory.name})
    batches = Batches(
        corpus.training,
        config.micro_batch_rows(),
        t.gradient_accumulation_steps * config.system.ranks,
        seed,
        chat.pad_id,
        pack_length=length if d.packing else None,
        group_by_length=d.group_by_length,
        pad_to_multiple_of=d.pad_to_multiple_of,
    )
    windows = batches.windows_in_epoch()
    steps = t.max_steps or t.num_epochs * windows
    plan = {"steps_per_epoch": windows, "steps": steps, "epochs": round(steps / windows, 3)}
    corpus = replace(corpus, report={**corpus.report, **plan})
    if not parallel.rank():
        shutil.copyfile(corpus.directory / REJECTED, run.directory / REJECTED)
    for line in describe(corpus.report):
        run.say(line)
    used, seconds = batches.utilisation(), time.perf_counter() - started
    run.say(f"batches   {windows:,} steps an epoch, {used:.1%} of them no padding ({seconds:.1f} s)")
    return chat, corpus, batches


def prepare(
    config: Config, run: Run, provenance: Provenance, chat: ChatTokenizer, corpus: Corpus, batches: Batches
) -> Job:
    """Model, adapters and optimizer; the data is there already, because it fails fastest."""
    t, device = config.training, runtime.choose_device(config.system.device)
    dtype = runtime.choose_dtype(config.model.dtype, device)
    base = find_model(config.model.name)
    check_ids(corpus, read_shape(base).vocab_size)
    keep, plan = choose_activations(config, *batches.longest().ids.shape)  # from what is free before loading
    model = load_base(config, base, torch.device("cpu") if t.sharding == "full" else device, dtype)
    model.activation_policy = parallel.tell(lambda: keep)
    model.neftune_alpha = t.neftune_alpha
    adapters: dict[str, LoRALinear] = {}
    if t.method == "lora":
        adapters = inject_lora(model, config.lora, config.system.seed)
    if config.system.kernels == "auto" and (warning := kernels.apply(model, config.lora if adapters else None)):
        run.say(f"warning: {warning}")
    if t.compile:
        compile_blocks(model)
    if t.sharding == "full":
        parallel.shard(model, device)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, t)
    validation = corpus.validation[: config.evaluation.max_samples]
    identity = {"config_sha256": settled_hash(config)} | {name: provenance[name] for name in IDENTITY}
    saves = parallel.NoSaves if parallel.rank() else Background
    checkpoints = Checkpoints(run.checkpoints, t.keep_checkpoints, t.keep_every, identity, owner=not parallel.rank())
    return Job(
        config,
        run,
        chat,
        model,
        adapters,
        optimizer,
        corpus,
        batches,
        validation,
        checkpoints,
        saves(checkpoints, runtime.free_host_bytes),
        base,
        device,
        dtype,
        plan,
    )


def load_base(config: Config, directory: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The base model: as it is, quantised while it streams in, or random."""
    if config.training.method == "full":
        dtype = torch.float32  # AdamW's small updates are lost when they are added to bfloat16
    seed = config.system.seed if config.model.random_init else None
    model = load_model(directory, device, dtype, quantization_of(config), seed)
    cache_weights(model, config.quantization.dequantize)
    return model


@contextlib.contextmanager
def base_model(job: Job) -> Iterator[Decoder]:
    """The model as it was before training: adapters switched off, or read again if every parameter was trained."""
    if job.adapters:
        with disabled(job.adapters):
            yield job.model
    else:
        job.optimizer.state.clear()  # its memory is needed for the second model
        split = job.config.training.sharding == "full"
        model = load_base(job.config, job.base_directory, torch.device("cpu") if split else job.device, job.dtype)
        if split:
            parallel.shard(model, job.device)
        yield model


# ---- Saved


def save(job: Job, state: State) -> None:
    """Begin to write a checkpoint; when it is on the disk, and only then, it may be called the best."""
    job.run.sync()
    report_save(job, state, job.saves.collect(wait=True))
    tensors = {weights_file(job): trained_weights(job), "optimizer": optimizer_tensors(job.optimizer, job.trained)}
    tensors = {name: parallel.gathered(named) for name, named in tensors.items()}
    contents = {**asdict(state), "rng": runtime.rng_state()}
    best = (state.best_step, state.best_loss) if state.best_step else None
    job.saves.start(state.step, tensors, contents, best)


def report_save(job: Job, state: State, outcome: Outcome | None) -> None:
    """Log what became of a save. One that failed is no end of training, and there will be another."""
    if outcome is None:
        return
    if outcome.error is None:
        where = str(outcome.path.relative_to(job.run.directory))
        seconds = {"seconds": outcome.seconds, "waited_seconds": outcome.waited_seconds}
        job.run.log("checkpoint", outcome.step, path=where, **seconds)
        return
    if state.best_step == outcome.step:  # its weights are lost: the best is the one before, whose are not
        state.best_step, state.best_loss = job.checkpoints.best() or (0, float("inf"))
    report_failure(job, state, f"saving step {outcome.step}", outcome.error)


def make_sure_of_the_last_save(job: Job, state: State) -> None:
    """A checkpoint of where the run stands, whatever was saved before.

    Raises:
        OSError: the disk refuses; what was saved before is untouched.
    """

    def last_saved(refused: bool) -> int:
        outcome = job.saves.collect(wait=True)
        report_save(job, state, outcome)
        if refused and outcome is not None and outcome.error is not None:
            raise outcome.error
        return job.saves.last_step

    if parallel.tell(lambda: last_saved(False)) != state.step:
        save(job, state)
        parallel.tell(lambda: last_saved(True))


def trained_weights(job: Job) -> dict[str, torch.Tensor]:
    return adapter_tensors(job.adapters) if job.adapters else {name: p.detach() for name, p in job.trained}


def weights_file(job: Job) -> str:
    return "adapter" if job.adapters else "model"


# ---- Brought back


def starting_state(job: Job, resume: str) -> State:
    """Where the run begins, on every rank.

    Raises:
        UserError: `resume` names no checkpoint of this run, or none is whole.
    """
    try:
        return start_from(job, lambda: find_start(job, resume))
    except checkpoint.Damaged as reason:
        raise UserError(f"{reason}: start anew with another output.dir") from None


def find_start(job: Job, resume: str) -> Saved | None:
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
        except (checkpoint.Damaged, OSError) as reason:
            raise UserError(f"--resume: {reason}") from None
    saved, damage = job.checkpoints.newest()
    if saved is None and job.run.finished_at():
        raise UserError(
            f"output.dir: {job.run.directory}: this run has ended, and its checkpoints are gone: eval.py and merge.py "
            "take what it learned; to train again choose another output.dir"
        )
    for what in damage:
        job.run.say(f"warning: {what}: going back to an earlier checkpoint")
    return saved


def start_from(job: Job, choose: Callable[[], Saved | None]) -> State:
    """On every rank, the checkpoint that rank 0 chooses (its state is told, its tensors are read); None: fresh."""

    def chosen() -> tuple[str, dict[str, Any]]:
        saved = choose()
        return (str(saved.path), saved.state) if saved else ("", {})

    path, state = parallel.tell(chosen)
    if path:
        return restore(job, Saved(Path(path), state))
    parallel.broadcast(trained_weights(job).values())
    return State()


def restore(job: Job, saved: Saved) -> State:
    """Put a checkpoint's weights, optimizer, position and random numbers back.

    Raises:
        Damaged: its hashes are right, and yet it is no checkpoint.
    """
    values = dict(saved.state)
    try:
        rng = values.pop("rng")
        state = State(**{**values, "meter": Meter(**values["meter"]), "guard": guard.History(**values["guard"])})
        runtime.set_rng_state(rng)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise checkpoint.Damaged(f"{saved.path / 'state.json'}: {type(error).__name__}: {error}") from None
    load_weights(job, saved)
    moments = parallel.parted(saved.tensors("optimizer"), optimizer_tensors(job.optimizer, job.trained))
    load_optimizer_tensors(job.optimizer, job.trained, moments)
    if state.micro_batch_rows:  # what fitted into memory
        job.batches.micro_batch_size = min(job.batches.micro_batch_size, state.micro_batch_rows)
    job.batches.seek(state.epoch, state.window)
    job.saves.last_step = state.step
    return state


def load_weights(job: Job, saved: Saved) -> None:
    """Only the weights of a checkpoint: to go on, or to take the best one as the result."""
    tensors = parallel.parted(saved.tensors(weights_file(job)), trained_weights(job))
    if job.adapters:
        load_adapter_tensors(job.adapters, tensors, str(saved.path))
        return
    checkpoint.fill({name: parameter.detach() for name, parameter in job.trained}, tensors, str(saved.path))


# ---- Said, and made smaller


def halve(job: Job, state: State) -> None:
    """Out of memory: go on from where `state` stands with micro-batches of half the rows; the window stays the same.

    Raises:
        TrainingFailed: they have one row; says what would help.
    """
    rows = job.batches.micro_batch_size
    if rows == 1:
        raise too_little(job.config, rows)
    job.optimizer.zero_grad(set_to_none=True)
    job.batches.micro_batch_size = state.micro_batch_rows = (rows + 1) // 2
    job.batches.seek(state.epoch, state.window)
    if job.run.begun:
        job.run.log("warning", state.step, what="out of memory", micro_batch_rows=state.micro_batch_rows)
    job.run.say(
        f"warning: out of memory after step {state.step} with micro-batches of {rows} rows: again with "
        f"{state.micro_batch_rows}; same samples a step, same loss"
    )


def log_memory(job: Job, state: State, stage: str) -> None:
    """What is held and what may be, at a stage of the run."""
    job.run.log("memory", state.step, stage=stage, **runtime.memory_now(job.device).figures())


def report_failure(job: Job, state: State, what: str, error: Exception) -> None:
    """Something that training can do without went wrong."""
    job.run.log("warning", state.step, what=f"{what} failed", error=f"{type(error).__name__}: {error}")
    job.run.say(f"warning: {what} failed after step {state.step}: {type(error).__name__}: {error}")
