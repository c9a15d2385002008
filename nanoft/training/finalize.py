"""After the last step of a run: write the result, evaluate it, and report.

The best weights are written first, so that a failed evaluation costs a line of the report, not the result.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanoft import TrainingFailed, UserError
from nanoft.checkpoint import Checkpoint, CheckpointCorrupted
from nanoft.data.dataset import describe_data
from nanoft.data.filters import preferred
from nanoft.evaluation import evaluate
from nanoft.evaluation.held_out import read_general
from nanoft.evaluation.report import ReportInputs, leakage_of_run, report, settings_of
from nanoft.export.merge import save_result
from nanoft.generation.sampling import NotFinite
from nanoft.io.tables import format_duration
from nanoft.kernels import sharding
from nanoft.lora import inject_lora
from nanoft.metrics import answers
from nanoft.model import Decoder
from nanoft.runtime import distributed
from nanoft.runtime.command import StopRequest
from nanoft.runtime.energy import JOULES_PER_WH
from nanoft.runtime.memory import peak_memory_gb
from nanoft.tracking import plots, rank_usage
from nanoft.tracking.trackers import is_installed
from nanoft.training import progress
from nanoft.training.progress import log_memory, report_failure
from nanoft.training.setup import base_model, load_base
from nanoft.training.state import TrainContext, TrainState, load_weights

STOPPED_BY_SIGNAL = 75  # the exit code after a checkpoint was saved


def finalize(ctx: TrainContext, state: TrainState, stop: StopRequest) -> int:
    """Take the best weights as the result, save them, measure base and tuned, and write the report.

    Returns the exit code: 0, or 75 if a signal stopped a measurement; the same command resumes there.
    """
    where, step = ctx.run.directory, distributed.broadcast_from_rank0(lambda: best_step(ctx, state))
    if step != state.step:
        load_weights(ctx, Checkpoint(ctx.checkpoints.path(step), {}))
    if bad := next((name for name, p in ctx.trained if not sharding.full_tensor(p.isfinite().all())), None):
        rate = ctx.config.training.learning_rate
        raise TrainingFailed(f"after step {step}, {bad} is not finite: lower training.learning_rate ({rate:g})")
    result = distributed.broadcast_from_rank0(lambda: str(export(ctx, step)))
    if not ctx.adapters:
        with torch.no_grad():
            for _, parameter in ctx.trained:  # measure the rounded weights that are stored
                parameter.copy_(parameter.to(ctx.files.dtype()))
    seconds, speed = round(state.meter.total_seconds, 3), round(state.meter.tokens_per_second(), 1)
    training = {"steps": state.step, "best_step": state.best_step, "seconds": seconds, "tokens_per_second": speed}
    training["peak_memory_gb"] = round(peak_memory_gb(ctx.device), 3)
    if ctx.scaler.is_enabled():
        training["overflow_steps"] = state.overflow_steps
    if state.meter.total_joules and distributed.world_size() == 1:  # the energy of other ranks is unknown
        training["energy_wh"] = round(state.meter.total_joules / JOULES_PER_WH, 6)
    tuned, base = measure(ctx, state, ctx.model), None
    if not distributed.stop_requested(stop) and not ctx.config.model.random_init and not ctx.model.config.has_score:
        try:
            with base_model(ctx) as model:
                base = measure(ctx, state, model)
        except Exception as error:
            report_failure(ctx, state, "evaluation of the base", error)
    if distributed.stop_requested(stop):
        ctx.run.print(f"stopped   by {stop.signal_name} before the report: the same command writes it")
        return STOPPED_BY_SIGNAL
    if distributed.process_rank():
        return 0
    chart = curves = ""
    if ctx.config.logging.plots != "none":  # drawn when the run has ended, or now as text
        chart = "" if is_installed("matplotlib") else "\n".join(["", *plots.loss_chart(plots.read_events(where))])
        curves = f"```{chart}\n```" if chart else "![curves](plots/curves.png)"
    values, terminal, markdown = report(replace(report_inputs(ctx, base, tuned, training), curves=curves))
    data = "\n".join(describe_data(ctx.corpus.report))
    usage, advice, section = dict[str, Any](), "", ""
    try:
        adapters = ctx.adapters if ctx.config.training.sharding == "none" else {}
        usage, advice, section = rank_usage.rank_report(adapters, step)
    except Exception as error:  # a decomposition need not converge
        report_failure(ctx, state, "the adapters' report", error)
    markdown += f"{section}\n## Data\n\n{data}\n"
    log_memory(ctx, state, "finished")
    ctx.run.log("done", state.step, **training)
    ctx.run.write_report({**values, **usage, "data": ctx.corpus.report}, markdown)  # marks the end of the run
    ctx.run.print(f"{chart}\n{terminal}{advice}" if chart else terminal + advice)
    done = f"{state.step} steps in {format_duration(seconds)}, {speed:,.0f} tokens/s"
    ctx.run.print(f"\nresult    {result}: {done}\n          report in {where}/report.html")
    return 0


def best_step(ctx: TrainContext, state: TrainState) -> int:
    """The step of the best checkpoint if it is valid, otherwise the last step."""
    step = state.best_step or state.step
    if step != state.step:
        try:
            ctx.checkpoints.verify(ctx.checkpoints.path(step))
        except CheckpointCorrupted as reason:
            ctx.run.print(f"warning: {reason}: the result is the last checkpoint, not the best")
            return state.step
    return step


def export(ctx: TrainContext, step: int) -> Path:
    """Write the model's weights after `step`; a sharded model is assembled on the CPU from the checkpoint."""
    if ctx.config.training.sharding == "full":
        model = load_base(ctx.config, ctx.machine, ctx.files, ctx.model.config.vocab_size, on_cpu=True)
        adapters = inject_lora(model, ctx.config.lora, ctx.config.system.seed) if ctx.adapters else {}
        ctx = replace(ctx, model=model, adapters=adapters)
        load_weights(ctx, Checkpoint(ctx.checkpoints.path(step), {}))
    where, base, tokenizer = ctx.run.directory, ctx.files.directory, ctx.tokenizer.directory
    return save_result(where, ctx.model, ctx.adapters, base, ctx.config, step, ctx.machine.dtype, tokenizer)


def measure(ctx: TrainContext, state: TrainState, model: Decoder) -> evaluate.EvalResult:
    """Validation loss and answers to held-out prompts; if that fails, an event and an empty result.

    Raises:
        NotFinite: the model's logits are NaN, so the result is useless.
    """
    e = ctx.config.evaluation
    try:
        metrics, general = answers.select_metrics(e.metrics), read_general(e.general_file, ctx.tokenizer)
        return progress.measure(ctx, model, ctx.validation, ctx.prompts, metrics, general)
    except NotFinite:
        raise
    except Exception as error:
        report_failure(ctx, state, "evaluation", error)
        return evaluate.EvalResult()


def report_inputs(
    ctx: TrainContext, base: evaluate.EvalResult | None, tuned: evaluate.EvalResult, training: dict[str, float]
) -> ReportInputs:
    e, groups = ctx.config.evaluation, {}
    if e.by_field and len(ctx.validation):
        try:
            groups = {e.by_field: ctx.corpus.field_values(preferred(ctx.validation), e.by_field)}
        except UserError as reason:  # must not cost the report
            ctx.run.print(f"warning: {reason}")
    provenance: dict[str, Any] = {"base": ctx.config.model.name, "data": ctx.config.data.train_file}
    provenance |= {"settings": settings_of(ctx.config), **(ctx.run.recorded_config() or {}).get("provenance", {})}
    leakage = leakage_of_run(ctx.corpus.report, ctx.config.data.near_leaks) if len(ctx.validation) else {}
    return ReportInputs(
        ctx.run.directory.name, tuned, base, primary=next(iter(e.metrics), "exact_match"), groups=groups,
        limit=ctx.config.answer_tokens, leakage=leakage, training=training, provenance=provenance, shown=e.samples,
        seed=ctx.config.system.seed,
    )  # fmt: skip
