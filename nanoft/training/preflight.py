"""Before the first step: does the model see what you think it sees, and will it fit?

Without these checks, memory may run out at the longest batch after an hour, and the disk at the first save. Both are
tried before the run begins: one check, one line, and one fix. nanoft/data/inspection.py has the checks of the tokens.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanoft import UserError
from nanoft.batches import TokenDataset, Window, eval_batches, share_of_rank
from nanoft.blocks.trained import TrainedRows
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.inspection import check_data, preview
from nanoft.io.tensor_files import write_tensors
from nanoft.kernels import sharding
from nanoft.model import Decoder
from nanoft.objectives.reference import sequence_logps
from nanoft.runtime import distributed
from nanoft.runtime.command import Check, require_passed
from nanoft.runtime.device import preserve_rng_state
from nanoft.runtime.memory import OutOfMemory, peak_memory_gb, release_memory
from nanoft.training.memory_plan import Planner, suggest_savings
from nanoft.training.progress import in_smaller_batches
from nanoft.training.recovery import halve_micro_batch
from nanoft.training.state import TrainContext, TrainState, optimizer_tensors

PAIRS_CHECKED = 64  # evenly spread
WEAK, STRONG = 0.25, 4.0  # norm of a row of the head, relative to the median row


def preflight(ctx: TrainContext, state: TrainState, forced: list[str]) -> float:
    """Check data, head, memory and disk; raise a UserError for a failure unless forced; return the seconds per step."""
    checks = []
    if ctx.adapters and not ctx.config.model.random_init and not ctx.model.config.has_score:
        checks.append(check_head(ctx.model, ctx.tokenizer, ctx.corpus.training))  # on every rank: it may be sharded

    def check_samples() -> None:
        text = preview(ctx.corpus, ctx.tokenizer, ctx.config.system.seed)
        (ctx.run.directory / "preview.txt").write_text(text, encoding="utf-8")
        require_shown([*check_data(ctx.corpus, ctx.tokenizer, ctx.config.data.train_on), *checks], ctx, forced)

    distributed.broadcast_from_rank0(check_samples)
    seconds_per_token = rehearse_step(ctx, state)
    measured, predicted = peak_memory_gb(ctx.device), ctx.plan.peak / 1e9
    ctx.run.print(f"memory    {ctx.plan.recomputed}; predicted {predicted:.2f} GB, measured {measured:.2f} GB")
    if len(ctx.validation):
        rehearse_evaluation(ctx)
    if ctx.objective.learns == "pairs" and ctx.model.score is None and not state.step:
        ctx.run.print(check_preferences(ctx).preflight_line())
    weights = sharding.gather_full(ctx.trained_weights())
    moments = sharding.gather_full(optimizer_tensors(ctx.optimizer, ctx.trained))
    out, keep = ctx.run.directory, ctx.config.training.keep_checkpoints
    distributed.broadcast_from_rank0(lambda: require_shown([rehearse_save(out, weights, moments, keep)], ctx, forced))
    return seconds_per_token * ctx.objective.tokens_per_step(ctx.config, ctx.batches) / distributed.world_size()


def require_shown(checks: list[Check], ctx: TrainContext, forced: list[str]) -> None:
    for check in checks:
        ctx.run.print(check.preflight_line())
    require_passed(checks, forced)


def check_room(planner: Planner, length: int = 0) -> Check:
    """Whether the plan fits into memory, before anything is loaded: the model, and one row of `length` tokens."""
    keep = planner.keep_by(planner.config.training.checkpointing)
    needed, there = planner.plan(1, length, keep).peak, planner.machine.memory_bytes
    what = f"the model and a sequence of {length:,} tokens take" if length else "the model alone takes"
    found = f"{what} at least {needed / 1e9:.2f} GB, and {there / 1e9:.2f} GB are available"
    fix = "" if needed <= there else f"set {suggest_savings(planner, 1, length)}"
    return Check.of("room", needed <= there, found, fix)


def require_room(planner: Planner, forced: list[str], length: int = 0) -> None:
    """Refuse a run that cannot fit, on every rank, with a UserError that suggests savings."""
    distributed.broadcast_from_rank0(lambda: require_passed([check_room(planner, length)], forced))


def rehearse_step(ctx: TrainContext, state: TrainState) -> float:
    """Forward and backward over the longest micro-batch, a smaller one if memory runs out; seconds per token."""
    while True:
        try:
            with distributed.same_exception(ctx.device):
                check, seconds_per_token = rehearse(ctx)
            ctx.run.print(check.preflight_line())  # when it fits on every rank
            return seconds_per_token
        except OutOfMemory as error:
            halve_micro_batch(ctx, state, error)


def rehearse(ctx: TrainContext) -> tuple[Check, float]:
    """Forward and backward over the longest micro-batch, and its seconds per token; nothing is changed."""
    longest, seconds = ctx.objective.longest(ctx.batches), []
    batch, window = longest.to(ctx.device), Window([longest], [0, 0], [0, 0])
    with preserve_rng_state():
        for _ in range(2):  # the first one warms up, and leaves its gradients
            started = time.perf_counter()
            with ctx.autocast():
                ctx.objective.prepare(ctx.model, window)
                loss = ctx.objective.loss(ctx.model, batch)
            loss.backward()
            is_finite = math.isfinite(loss.item())  # waits for the device
            seconds.append(time.perf_counter() - started)
    if not is_finite and ctx.machine.dtype == torch.float16:  # which no loss scale can prevent
        where = f"weights or activations overflow float16 on the longest batch, {tuple(batch.ids.shape)}"
        raise UserError(f"model.dtype: {where}: set model.dtype=bfloat16 or float32")
    for _, parameter in ctx.trained:
        parameter.grad = None
    check = Check.of("batch", True, f"the longest, {tuple(batch.ids.shape)}: forward and backward fit")
    return check, min(seconds) / longest.tokens


def rehearse_evaluation(ctx: TrainContext) -> None:
    samples, size = ctx.validation, ctx.config.evaluation.batch_size
    longest = samples.units(np.argsort(-samples.unit_lengths(), kind="stable")[:size])
    try:
        with distributed.same_exception(ctx.device), ctx.autocast():
            ctx.objective.evaluate(ctx.model, eval_batches(longest, size, ctx.tokenizer.pad_id))
        check = Check.of("eval", True, f"{len(longest)} sequences of up to {longest.lengths.max()} tokens fit")
        ctx.run.print(check.preflight_line())
    except OutOfMemory as error:
        release_memory(ctx.device, error)
        ctx.run.print(f"warning: out of memory with evaluation.batch_size={size}: smaller batches will be used")


def check_preferences(ctx: TrainContext) -> Check:
    """How often the model, which is the reference, already prefers the chosen answer."""
    count = len(ctx.corpus.training) // 2
    pairs = ctx.corpus.training.units(np.linspace(0, count - 1, min(PAIRS_CHECKED, count)).astype(int))

    @torch.no_grad()
    def evaluate(size: int) -> dict[str, float]:
        batches = share_of_rank(eval_batches(pairs, size, ctx.tokenizer.pad_id))
        with distributed.same_exception(ctx.device):
            logps = [sequence_logps(ctx.model, batch.to(ctx.device)) for batch in batches]
        return {"preferred": distributed.all_reduce_sum(sum(int((logp[::2] > logp[1::2]).sum()) for logp in logps))[0]}

    with preserve_rng_state():
        preferred = in_smaller_batches(ctx, ctx.config.evaluation.batch_size, evaluate)["preferred"]
    found = f"before training, the chosen answer is more likely in {preferred:.0f} of {len(pairs) // 2} pairs"
    return Check.of("pairs", True, found)


def check_head(model: Decoder, tokenizer: ChatTokenizer, samples: TokenDataset) -> Check:
    """A frozen head whose row for the stop token was never trained cannot learn to stop."""
    first = (samples[at] for at in range(min(100, len(samples))))
    ends = {int(s.ids[s.is_target][-1]) for s in first if s.is_target.any()}
    trained = model.output.ids.tolist() if isinstance(model.output, TrainedRows) else []
    stops = sorted(ends & set(tokenizer.stop_ids) - set(trained)) if trained or not model.head.requires_grad else []
    norms = sharding.full_tensor(model.head.detach()).float().norm(dim=1)
    median = norms[norms > 0].median().item()  # rows of zeros only fill up the vocabulary
    ratios = {tokenizer.decode([token], keep_special=True): norms[token].item() / median for token in stops}
    found = ", ".join(f"{token!r}: {ratio:.2f}" for token, ratio in ratios.items()) or "no stop token in use"
    found = f"norm of the stop token's row in the head, relative to the median row: {found}"
    fix = "the base has not learned this token: use a template whose end of turn it knows, or training.method=full"
    return Check.of("head", all(WEAK <= ratio <= STRONG for ratio in ratios.values()), found, fix)


def rehearse_save(directory: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], keep: int) -> Check:
    """Write the weights of a checkpoint and remove them; then check the disk space for the run's checkpoints."""
    staging = directory / f".tmp-preflight-{os.getpid()}"
    try:
        write_tensors(staging, weights)
        size = staging.stat().st_size
    except OSError as error:
        raise UserError(f"output.dir: {directory}: cannot be written: {error.strerror}") from None
    finally:
        staging.unlink(missing_ok=True)
    return check_disk(directory, size + sum(tensor.nbytes for tensor in moments.values()), keep)


def check_disk(directory: Path, size: int, keep: int) -> Check:
    """Whether the disk has room for the checkpoints that exist at once, besides those already written."""
    there = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    free, needed = shutil.disk_usage(directory).free, max(size * (keep + 2) - there, 0)
    found = f"{needed / 1e9:.2f} GB more for {keep + 2} checkpoints, {free / 1e9:.2f} GB free in output.dir"
    fix = "free disk space, lower training.keep_checkpoints, or choose another output.dir"
    return Check.of("disk", free > needed, found, fix)
