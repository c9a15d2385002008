"""Between two optimizer steps: the progress bar, `train` events, validation, memory warnings, and checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any, Literal, TypeVar

from nanoft import TrainingFailed
from nanoft.batches import Sample, eval_batches
from nanoft.checkpoint import SaveResult
from nanoft.evaluation import evaluate
from nanoft.io.bars import Bar
from nanoft.io.untrusted import one_line
from nanoft.kernels import sharding
from nanoft.metrics.answers import Metric
from nanoft.metrics.rewards import Prompt
from nanoft.model import Decoder
from nanoft.objectives.preference import Preference
from nanoft.runtime import distributed
from nanoft.runtime.device import rng_state
from nanoft.runtime.memory import MemoryMonitor, OutOfMemory, peak_memory_gb, read_memory, release_memory
from nanoft.training.state import TrainContext, TrainState, optimizer_tensors

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits 80 columns
Cadence = int | float | Literal["epoch", "auto"]  # as in training.eval_steps
Figures = TypeVar("Figures")
REWARDS = "rewards/chosen", "rewards/rejected"
EARLY = 0.1  # of all steps: too soon for every pair to be ranked right by a margin of 1
LONGER = 2.0  # times the tokens of the first answers to the samples
COLLAPSED = 0.2  # of the entropy of the first answers
GAINED = 0.1  # reward in training between two evaluations, while that of held-out prompts falls
UNEQUAL = 0.05  # nats between the log-probabilities of a token where it is sampled and where it is trained on
FALLEN = -1.0  # reward of chosen answers; with a beta of 0.1, they are 10 nats less likely than under the reference


def progress_bar(ctx: TrainContext, state: TrainState) -> Any:
    """A bar over the optimizer steps; updated less often in a file or notebook, where every update stays."""
    looks: dict[str, Any] = {} if sys.stderr.isatty() else {"ncols": 80, "dynamic_ncols": False, "mininterval": 5.0}
    hidden = not ctx.config.logging.progress_bar or bool(distributed.process_rank())
    looks |= {"disable": hidden, "delay": 0.0, "bar_format": BAR, "unit_scale": False}
    return Bar(total=ctx.total_steps, initial=state.step, **looks)


def steps_between(every: Cadence, total_steps: int, epoch_steps: int) -> Fraction:
    """Optimizer steps between two evaluations, checkpoints or log lines, at least 1; 0: only after the last step.

    It may be fractional: 0.25 of 10 steps are 2.5, and every 2.5 steps means after steps 3, 5, 8 and 10.
    """
    if every == 0:
        return Fraction(0)
    if every == "auto":  # at least four in an epoch and in the run
        return Fraction(max(1, min(100, epoch_steps // 4, total_steps // 4)))
    steps = epoch_steps if every == "epoch" else Fraction(repr(every)) * (total_steps if every < 1 else 1)
    return max(Fraction(1), Fraction(steps))


def is_due(ctx: TrainContext, state: TrainState, every: Cadence) -> bool:
    """Whether something that happens every so many steps, and after the last one, is due now."""
    steps = steps_between(every, ctx.total_steps, ctx.corpus.report["steps_per_epoch"])
    return state.step == ctx.total_steps or (steps > 0 and state.step // steps > (state.step - 1) // steps)


def before_first_step(ctx: TrainContext, state: TrainState) -> None:
    """Evaluate if configured, and save the state for a rollback, which also shows at once whether saving works."""
    if ctx.config.evaluation.on_start:
        log_validation(ctx, state)
    if ctx.config.guard.max_rollbacks:
        save(ctx, state)


def log_step(ctx: TrainContext, state: TrainState, bar: Any, loss: float, lr: float, grad_norm: float) -> None:
    """Move the bar, and when due log a `train` event: means since the last one, and current values."""
    bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {state.meter.tokens_per_second():,.0f} tok/s", False)
    bar.update(state.step - bar.n)  # negative after a rollback
    if is_due(ctx, state, ctx.config.training.log_steps):
        memory = {"peak_memory_gb": peak_memory_gb(ctx.device), **read_memory(ctx.device)}
        values = {"learning_rate": lr, "grad_norm": grad_norm, **memory}
        if ctx.scaler.is_enabled():
            values |= {"loss_scale": ctx.scaler.get_scale(), "overflow_steps": state.overflow_steps}
        figures = ctx.objective.figures()
        ctx.run.log("train", state.step, **state.meter.flush(), **values, **figures, epoch=state.epoch)
        warn_of_training(ctx, state, figures)
    if ctx.device.type == "cpu" and distributed.world_size() == 1:  # other ranks are other processes, too
        warn_once(ctx, state, "speed", ctx.slowdown.check(state.meter.total_tokens, state.meter.total_seconds))


def validate_if_due(ctx: TrainContext, state: TrainState) -> None:
    """Evaluate on the validation samples every training.eval_steps; remember the best step."""
    if not len(ctx.validation) or not is_due(ctx, state, ctx.config.training.eval_steps):
        return
    # rank 0 knows whether the best step so far was saved
    state.best_step, state.best_loss = distributed.broadcast_from_rank0(lambda: (state.best_step, state.best_loss))
    if (loss := log_validation(ctx, state)) is None:
        return
    gained = loss < state.best_loss - ctx.config.training.early_stopping_threshold
    state.evaluations_without_gain = 0 if gained else state.evaluations_without_gain + 1
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
    what = "validation loss" if math.isfinite(loss) else "validation loss that is not a number"
    warn_once(ctx, state, what, state.trend.update(loss))


def warn_of_training(ctx: TrainContext, state: TrainState, now: dict[str, float]) -> None:
    """Warn, by the figures of a step, of pairs that are too easy; of sampled answers that lose variety or keep
    growing, or whose probabilities differ between sampling and training."""
    state.begun = first = state.begun or now
    chosen, rejected = (now.get(name, 0.0) for name in REWARDS)
    if now.get("rewards/accuracies") == 1.0 and chosen - rejected > 1 and state.step <= EARLY * ctx.total_steps:
        what = "every answer is already ranked correctly: check whether good ones differ in length or by a marker"
        warn_once(ctx, state, "accuracy", f"{what} (train.py --show-batch), or lower training.learning_rate")
    if "reward" not in now:
        return
    if now["entropy"] < COLLAPSED * first["entropy"]:
        fall = f"{first['entropy']:.3f} -> {now['entropy']:.3f} nats per token"
        warn_once(ctx, state, "entropy", f"answers lose their variety ({fall}): lower training.learning_rate")
    if now["completion_tokens"] > LONGER * first["completion_tokens"] and now["stop_rate"] < first["stop_rate"]:
        grown = f"{first['completion_tokens']:.0f} -> {now['completion_tokens']:.0f} tokens"
        warn_once(ctx, state, "completions", f"answers grow ({grown}) and stop less often: reward short ones too")
    if now.get("sampling_error", 0.0) > UNEQUAL:
        what = f"sampling and training differ by {now['sampling_error']:.3f} nats per token"
        warn_once(ctx, state, "sampling", f"{what}: check whether model.dtype=float32 removes the difference")


def warn_of_held_out(ctx: TrainContext, state: TrainState, now: dict[str, float]) -> None:
    """Warn, by the figures of an evaluation, of chosen answers that become clearly less likely than under the
    reference, like rejected ones; and of rewards that have risen in training, but fallen on held-out prompts."""
    last, has_reference = state.held_out, isinstance(ctx.objective, Preference) and ctx.objective.uses_reference
    if has_reference and all(now.get(name, 0.0) < min(FALLEN, last.get(name, 0.0)) for name in REWARDS):
        what = f"chosen answers become less likely, like rejected ones (rewards/chosen {now[REWARDS[0]]:.2f})"
        fix = "lower training.learning_rate, raise preference.beta, or with dpo set preference.sft_weight"
        warn_once(ctx, state, "falling", f"{what}: {fix}")
    if "reward" not in now:
        return
    now["training_reward"] = training = ctx.objective.figures().get("reward", 0.0)
    if training - last.get("training_reward", math.inf) > GAINED and now["reward"] < last["reward"]:
        rise = f"rises in training ({last['training_reward']:.3f} -> {training:.3f})"
        fall = f"falls on held-out prompts ({last['reward']:.3f} -> {now['reward']:.3f})"
        warn_once(ctx, state, "held-out reward", f"reward {rise} but {fall}: use more, or more varied, prompts")


def warn_once(ctx: TrainContext, state: TrainState, what: str, text: str) -> None:
    if text and what not in state.warned:
        state.warned.append(what)
        ctx.run.log("warning", state.step, what=what, text=text)
        ctx.run.print(f"warning: step {state.step}: {text}")


def validate(ctx: TrainContext, batch_size: int) -> dict[str, float]:
    return ctx.objective.evaluate(ctx.model, eval_batches(ctx.validation, batch_size, ctx.tokenizer.pad_id))


def log_validation(ctx: TrainContext, state: TrainState) -> float | None:
    """Evaluate on the validation samples, log and print the figures and sample answers; the loss, None if it fails."""
    try:
        figures = in_smaller_batches(ctx, ctx.config.evaluation.batch_size, lambda size: validate(ctx, size))
    except Exception as error:  # does not end the run
        report_failure(ctx, state, "evaluation", error)
        return None
    log_memory(ctx, state, "evaluated")
    ctx.run.log("eval", state.step, **figures)
    warn_of_held_out(ctx, state, figures)
    best = " (best so far)" if state.step and figures["loss"] < state.best_loss else ""
    what = f"validation loss {figures['loss']:.4f}"
    more = f", perplexity {figures['perplexity']:.4g}" if "perplexity" in figures else ""
    if "reward" in figures:
        what, more = f"held-out reward {figures['reward']:.4g}", f", stop rate {figures['stop_rate']:.0%}"
    if "rewards/accuracies" in figures:
        margin = f"margin {figures['rewards/margins']:.3f}" if "kl" not in figures else f"KL {figures['kl']:.3f}"
        more = f", accuracy {figures['rewards/accuracies']:.1%}, {margin}"
    ctx.run.print(f"step {state.step}: {what}{more}{best}")
    samples = ctx.config.evaluation.samples
    try:  # always the same prompts, with random numbers of their own
        answers = measure(ctx, ctx.model, [], ctx.prompts[:samples] if samples else []).completions
    except Exception as error:
        report_failure(ctx, state, "sampling answers", error)
        answers = []
    for c in answers:
        said = {"prompt": c.prompt, "reference": c.reference, "answer": c.answer, "stopped": c.stopped}
        ctx.run.log("sample", state.step, **said, **c.rewards)
        ctx.run.print(f"  {one_line(c.prompt):.100} -> {one_line(c.answer):.200}{'' if c.stopped else ' ...'}{c.worth}")
    length = sum(c.tokens for c in answers) / max(1, len(answers))
    if (begun := state.held_out.get("sample_tokens", length)) * LONGER < length and not all(c.stopped for c in answers):
        warn_once(ctx, state, "length", f"answers to the samples have grown from {begun:.0f} to {length:.0f} tokens")
    state.held_out = {**figures, "sample_tokens": begun}
    return figures["loss"]


def measure(
    ctx: TrainContext, model: Decoder, samples: Sequence[Sample], prompts: Sequence[Prompt],
    metrics: Sequence[Metric] = (), general: Sequence[Sample] = (),
) -> evaluate.EvalResult:  # fmt: skip
    """`evaluate.measure` with the settings of the run, in batches that fit into memory."""
    c = ctx.config
    e, options = replace(c.evaluation, max_new_tokens=c.answer_tokens), (c.system.seed, ctx.objective.rewards)

    def measured(size: int) -> evaluate.EvalResult:
        given = replace(e, batch_size=min(size, e.batch_size), prompt_batch_size=min(size, e.prompt_batch_size))
        what = ctx.tokenizer, samples, prompts, given, c.model.max_seq_length, metrics, general
        return evaluate.measure(model, *what, *options)

    largest = max(e.batch_size if len(samples) or len(general) else 1, min(e.prompt_batch_size, len(prompts)))
    return in_smaller_batches(ctx, largest, measured)


def in_smaller_batches(ctx: TrainContext, size: int, evaluate: Callable[[int], Figures]) -> Figures:
    """`evaluate(size)`, with half the batch size whenever memory runs out."""
    while True:
        try:
            with distributed.same_exception(ctx.device), ctx.autocast():
                return evaluate(size)
        except OutOfMemory as error:
            release_memory(ctx.device, error)
        if size == 1:
            raise TrainingFailed("out of memory at batch size 1")
        size //= 2


def watch_memory(ctx: TrainContext, state: TrainState, monitor: MemoryMonitor) -> None:
    """Warn before memory runs out, and when it keeps growing."""
    for warning in monitor.check(state.step):
        ctx.run.log("warning", state.step, what="memory", text=warning)
        ctx.run.print(f"warning: memory after step {state.step}: {warning}")


def log_memory(ctx: TrainContext, state: TrainState, stage: str) -> None:
    """Log a `memory` event: the memory held, and its limit, at a stage of the run."""
    ctx.run.log("memory", state.step, stage=stage, **read_memory(ctx.device))


def report_failure(ctx: TrainContext, state: TrainState, what: str, error: Exception) -> None:
    """Log and print a failure that training can survive."""
    ctx.run.log("warning", state.step, what=f"{what} failed", error=f"{type(error).__name__}: {error}")
    ctx.run.print(f"warning: {what} failed after step {state.step}: {type(error).__name__}: {error}")


def save(ctx: TrainContext, state: TrainState) -> None:
    """Start writing a checkpoint in the background. It becomes the best one only once it is on disk."""
    ctx.run.sync()
    log_save(ctx, state, ctx.writer.collect(wait=True))
    tensors = {ctx.weights_file: ctx.trained_weights(), "optimizer": optimizer_tensors(ctx.optimizer, ctx.trained)}
    tensors = {name: sharding.gather_full(named) for name, named in tensors.items()}
    best = (state.best_step, state.best_loss) if state.best_step else None
    others = {"rng": rng_state(), "scaler": ctx.scaler.state_dict()}
    ctx.writer.start(state.step, tensors, {**asdict(state), **others}, best)


def save_if_due(ctx: TrainContext, state: TrainState) -> None:
    """Save every training.save_steps, at the best step so far, and again some time after a save that failed."""
    log_save(ctx, state, ctx.writer.collect())
    retry = distributed.all_reduce_any(ctx.writer.overdue())
    if is_due(ctx, state, ctx.config.training.save_steps) or state.best_step == state.step or retry:
        save(ctx, state)


def log_save(ctx: TrainContext, state: TrainState, outcome: SaveResult | None) -> None:
    """Log a finished save. A save that failed is a warning: there will be another."""
    if outcome is None:
        return
    if outcome.error is None:
        where = str(outcome.path.relative_to(ctx.run.directory))
        seconds = {"seconds": outcome.seconds, "waited_seconds": outcome.waited_seconds}
        ctx.run.log("checkpoint", outcome.step, path=where, **seconds)
    else:
        if state.best_step == outcome.step:  # its weights are lost: return to the best one on disk
            state.best_step, state.best_loss = ctx.checkpoints.best() or (0, float("inf"))
        report_failure(ctx, state, f"saving step {outcome.step}", outcome.error)


def ensure_final_checkpoint(ctx: TrainContext, state: TrainState) -> None:
    """Save a checkpoint of the current state unless there is one; raises the OSError of a failed write."""

    def last_saved(must_work: bool) -> int:
        outcome = ctx.writer.collect(wait=True)
        log_save(ctx, state, outcome)
        if must_work and outcome is not None and outcome.error is not None:
            raise outcome.error
        return ctx.writer.last_step

    if distributed.broadcast_from_rank0(lambda: last_saved(False)) != state.step:
        save(ctx, state)
        distributed.broadcast_from_rank0(lambda: last_saved(True))
