"""After the last step of a job: the result, what it is worth, and the report.

The best weights are written first. Measuring them comes after, and what fails there costs a line of the report, not the
result.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanoft import TrainingFailed, UserError, checkpoint
from nanoft.checkpoint import Checkpoint
from nanoft.data.dataset import describe_data
from nanoft.evaluation import evaluate
from nanoft.evaluation.report import ReportInputs, leakage_of_run, report, settings_of
from nanoft.export.adapters import save_result
from nanoft.io.tables import format_duration
from nanoft.lora import inject_lora
from nanoft.metrics import answers
from nanoft.model import Decoder
from nanoft.models.weights import stored_dtype
from nanoft.runtime import distributed
from nanoft.runtime.command import StopRequest
from nanoft.runtime.energy import JOULES_PER_WH
from nanoft.runtime.memory import Shortage, peak_memory_gb
from nanoft.tracking import rank_usage
from nanoft.tracking.trackers import curves_section
from nanoft.training.saving import log_memory, report_failure
from nanoft.training.setup import base_model, load_base
from nanoft.training.state import TrainContext, TrainState, load_weights


def finalize(job: TrainContext, state: TrainState, stop: StopRequest) -> bool:
    """Take the best weights as the result, save them, measure base and tuned, and write the report.

    Returns whether it got that far; a signal ends it after a measurement, and the same command does it again.
    """
    where, step = job.run.directory, distributed.broadcast_from_rank0(lambda: best_step(job, state))
    if step != state.step:
        load_weights(job, Checkpoint(job.checkpoints.path(step), {}))
    if bad := next((name for name, p in job.trained if not distributed.full_tensor(p.isfinite().all())), None):
        rate = job.config.training.learning_rate
        raise TrainingFailed(f"after step {step} {bad} is not finite: lower training.learning_rate ({rate:g})")
    result = distributed.broadcast_from_rank0(lambda: str(export(job, step)))
    if not job.adapters:
        with torch.no_grad():
            for _, parameter in job.trained:  # measure what is stored, not what was rounded to store it
                parameter.copy_(parameter.to(stored_dtype(job.base_directory)))
    training = {
        "steps": state.step,
        "best_step": state.best_step,
        "seconds": round(state.meter.total_seconds, 3),
        "tokens_per_second": round(state.meter.tokens_per_second(), 1),
        "peak_memory_gb": round(peak_memory_gb(job.device), 3),
    }
    if state.meter.total_joules and distributed.world_size() == 1:  # what other ranks took is not known here
        training["energy_wh"] = round(state.meter.total_joules / JOULES_PER_WH, 6)
    tuned = measure(job, state, job.model)
    base = None
    if not distributed.stop_requested(stop) and not job.config.model.random_init:
        base = measure_base(job, state)
    if distributed.stop_requested(stop):
        return False
    if distributed.process_rank():
        return True
    values, terminal, markdown = report(report_inputs(job, base, tuned, training))
    data = "\n".join(describe_data(job.corpus.report))
    usage, advice, section = rank_report(job, state, step)
    markdown += section + curves_section(job.config.logging) + f"\n## Data\n\n{data}\n"
    log_memory(job, state, "finished")
    job.run.log("done", state.step, **training)
    job.run.write_report({**values, **usage, "data": job.corpus.report}, markdown)  # after it, the run has ended
    job.run.print(terminal + advice)
    seconds, speed = format_duration(training["seconds"]), training["tokens_per_second"]
    job.run.print(
        f"\nresult    {result}: {state.step} steps in {seconds}, {speed:,.0f} tokens/s; report in {where}/report.md"
    )
    return True


def best_step(job: TrainContext, state: TrainState) -> int:
    """The step of the best checkpoint that is whole, or of the last."""
    step = state.best_step or state.step
    if step != state.step:
        try:
            job.checkpoints.verify(job.checkpoints.path(step))
        except checkpoint.CheckpointCorrupted as reason:
            job.run.print(f"warning: {reason}: the result is not the best checkpoint, but the last")
            return state.step
    return step


def export(job: TrainContext, step: int) -> Path:
    """Write the result: the weights of that step, which the model has.

    One that is split is put together on the CPU, from the base and the checkpoint.
    """
    if job.config.training.sharding == "full":
        model = load_base(job.config, job.base_directory, torch.device("cpu"), job.dtype)
        adapters = inject_lora(model, job.config.lora, job.config.system.seed) if job.adapters else {}
        job = replace(job, model=model, adapters=adapters)
        load_weights(job, Checkpoint(job.checkpoints.path(step), {}))
    return save_result(job.run.directory, job.model, job.adapters, job.base_directory, job.config, step, job.dtype)


def measure(job: TrainContext, state: TrainState, model: Decoder) -> evaluate.EvalResult:
    """Validation loss and answers to held-out prompts; nothing, and an event, if that fails: the result is saved."""
    c, e = job.config, job.config.evaluation
    try:
        conversations = job.corpus.conversations(job.corpus.untruncated(job.corpus.validation), e.prompts)
        prompts, metrics = evaluate.held_out_prompts(conversations, e.prompts), answers.select_metrics(e.metrics)
        while True:
            with Shortage(job.device), job.autocast():
                return evaluate.measure(
                    model, job.chat, job.validation, prompts, e, c.model.max_seq_length, metrics, seed=c.system.seed
                )
            if e.batch_size == e.prompt_batch_size == 1:
                raise TrainingFailed("out of memory with one row")
            halves = {name: max(1, getattr(e, name) // 2) for name in ("batch_size", "prompt_batch_size")}
            e = replace(e, **halves)
    except Exception as error:
        report_failure(job, state, "evaluation", error)
        return evaluate.EvalResult()


def measure_base(job: TrainContext, state: TrainState) -> evaluate.EvalResult | None:
    """The same of the model as it was before training."""
    try:
        with base_model(job) as model:
            return measure(job, state, model)
    except Exception as error:
        report_failure(job, state, "evaluation of the base", error)
        return None


def rank_report(job: TrainContext, state: TrainState, step: int) -> tuple[dict[str, Any], str, str]:
    """What `ranks.report` says of the adapters; nothing, and an event, if that fails."""
    try:
        adapters = job.adapters if job.config.training.sharding == "none" else {}
        return rank_usage.rank_report(adapters, job.optimizer, step)
    except Exception as error:  # a decomposition need not converge
        report_failure(job, state, "the adapters' report", error)
        return {}, "", ""


def report_inputs(
    job: TrainContext, base: evaluate.EvalResult | None, tuned: evaluate.EvalResult, training: dict[str, float]
) -> ReportInputs:
    """What the report is made of."""
    e, groups = job.config.evaluation, {}
    if e.by_field and len(job.validation):
        try:
            groups = {e.by_field: job.corpus.field_values(job.validation, e.by_field)}
        except UserError as reason:  # the run is done: no reason to lose its report
            job.run.print(f"warning: {reason}")
    provenance = (job.run.recorded_config() or {}).get("provenance", {})
    return ReportInputs(
        job.run.directory.name,
        tuned,
        base,
        primary=next(iter(e.metrics), "exact_match"),
        limit=e.max_new_tokens,
        groups=groups,
        places=[job.corpus.location(record) for record in job.validation.records.tolist()],
        leakage=leakage_of_run(job.corpus.report, job.config.data.near_leaks) if len(job.validation) else {},
        training=training,
        provenance={
            "base": job.config.model.name,
            "data": job.config.data.train_file,
            "settings": settings_of(job.config),
            **provenance,
        },
        shown=e.samples,
        seed=job.config.system.seed,
    )
