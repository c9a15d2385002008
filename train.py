"""Fine-tune a causal language model: LoRA, QLoRA, or every parameter.

    python train.py                                       the embedded demo, configs/tiny.py
    python train.py configs/tiny.py training.max_steps=20
    python train.py my.yaml data.train_file=chats.jsonl model.name=mistralai/Mistral-7B-Instruct-v0.3
    python train.py auto data.train_file=chats.jsonl      the config for this machine, from configs/

An interrupted run resumes when the same command is given again.
"""

from __future__ import annotations

import sys

from nanoft.runtime.command import FORCEABLE, Arguments, StopRequest, command, ignore_broken_output


def build_parser() -> Arguments:
    parser = Arguments(prog="train.py", description=__doc__)
    parser.add_argument("config", nargs="?", help="Python, YAML, JSON file, or auto; default: configs/tiny.py")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="a setting to change, or a file")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="default: auto")
    parser.add_argument("--show-batch", action="store_true", help="show the first batch as the model sees it, and stop")
    parser.add_argument("--show-step", type=int, metavar="N", help="print the batch of optimizer step N, and stop")
    parser.add_argument("--plan", action="store_true", help="estimate memory and time, load nothing, and stop")
    parser.add_argument("--preflight", action="store_true", help="check data, memory and disk, and stop")
    parser.add_argument("--selftest", action="store_true", help="check nanoft's guarantees on this config, and stop")
    parser.add_argument("--force", action="append", default=[], choices=FORCEABLE, help="continue if this check fails")
    return parser


if __name__ == "__main__":
    build_parser().check(sys.argv[1:])  # --help, --version and mistakes, before torch is imported

import argparse
import tempfile
import time
from dataclasses import replace

import torch

from nanoft import UserError, guard, kernels
from nanoft.batches import Batches, Window, share_of_rank
from nanoft.config import Config
from nanoft.config.loading import CONFIGS
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import PreparedDataset
from nanoft.data.inspection import check_embeddings, show_step
from nanoft.guard import RollBack, SkipStep
from nanoft.kernels import sharding
from nanoft.lora import inject_lora
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import TrainedAdapter
from nanoft.objectives import build_objective
from nanoft.optim import build_optimizer, build_scaler, learning_rate, set_learning_rate
from nanoft.runtime import distributed
from nanoft.runtime.device import Machine, choose_device, library_versions, pick_config, seed_everything, select_device
from nanoft.runtime.energy import EnergyMeter
from nanoft.runtime.memory import MemoryMonitor, OutOfMemory
from nanoft.tracking.profiler import Profiler
from nanoft.tracking.run import Run
from nanoft.training import progress, recovery, self_test, setup
from nanoft.training.doctor import validate_environment
from nanoft.training.finalize import STOPPED_BY_SIGNAL, finalize
from nanoft.training.memory_plan import Planner, explained_out_of_memory
from nanoft.training.plan import show_plan
from nanoft.training.preflight import preflight, require_room
from nanoft.training.setup import Provenance
from nanoft.training.state import TrainContext, TrainState, restore


@command
@distributed.distributed_main
def main(argv: list[str]) -> int:
    args = build_parser().parse(argv)
    positional = [args.config, *args.overrides] if args.config is not None else args.overrides
    path = positional.pop(0) if positional and "=" not in positional[0] else CONFIGS / "tiny.py"
    source = setup.read_source(pick_config(positional) if path == "auto" else path, positional)
    config, start = setup.read_start(source.config)  # None, unless lora.start_from continues from an adapter
    if args.plan:
        if distributed.world_size() > 1:  # a single process plans for system.ranks processes
            config = distributed.resolve_world_size(config)
        return distributed.broadcast_from_rank0(lambda: show_plan(config))
    if args.selftest:
        if distributed.world_size() > 1:
            raise UserError("--selftest: runs in one process: start train.py without torchrun")
        with tempfile.TemporaryDirectory(prefix="nanoft-selftest-") as scratch:
            return fine_tune(config.override({"output.dir": f"{scratch}/run", "system.ranks": 1}), args, start)
    return fine_tune(config, args, start)


def fine_tune(config: Config, args: argparse.Namespace, start: TrainedAdapter | None) -> int:
    """One run, from its directory to its report; returns the exit code."""
    ignore_broken_output()
    seed_everything(config.system.seed, config.system.threads, config.system.deterministic)
    config = distributed.resolve_world_size(config)
    select_device(choose_device(config.system.device), config.training.sharding)
    machine = Machine.detect(config)
    validate_environment(config, machine)  # exit code 2 before anything is downloaded
    distributed.assert_same_on_all_ranks({"the device": machine.name, **library_versions(), **config.flat()})
    with Run.open(config.output.dir) as run, StopRequest(enabled=not args.selftest) as stop:
        files = distributed.main_process_first(lambda: ModelFiles.find(config.model.reference))  # config.json only
        planner = setup.plan_run(config, machine, files, run)
        if args.selftest:
            planner = replace(planner, config=self_test.shorten(planner.config))
        config, shows_data = planner.config, args.show_batch or args.show_step is not None
        if not (shows_data or args.preflight or args.selftest):  # for these, the lines are the result
            run.level = config.logging.level
        if not shows_data:
            require_room(planner, args.force)  # before a large model is downloaded
        files = distributed.main_process_first(files.fetch)
        provenance = distributed.broadcast_from_rank0(
            lambda: setup.init_run_dir(config, run, machine, files, args.resume, start)
        )
        torch.set_num_threads(provenance["threads"])
        with explained_out_of_memory(planner):
            tokenizer = setup.load_tokenizer(config, files, provenance["date"], run, start)
            planner = setup.with_tokens(planner, tokenizer)
            corpus, batches = setup.build_datasets(config, tokenizer, run)
            if shows_data:
                for line in show_step(batches, corpus, tokenizer, args.show_step, run.skipped_windows()):
                    run.print(line)
                return 0
            require_room(planner, args.force, planner.longest_shape(batches)[1])
            ctx = build(planner, run, provenance, files, tokenizer, corpus, batches, start)
            setup.begin_objective(ctx)
            if args.selftest:
                return self_test.run(ctx, train)
            state = restore(ctx, args.resume)
            if not args.preflight and setup.is_complete(ctx, state):
                return 0
            seconds_per_step = preflight(ctx, state, args.force)  # longest batch, one evaluation batch, one save
            setup.print_summary(ctx, state, seconds_per_step)
            if args.preflight:
                return 0
            setup.start_logging(ctx, state)
            state = train(ctx, state, stop)
            if distributed.stop_requested(stop) and state.step < ctx.total_steps:
                run.print(f"stopped   by {stop.signal_name} after step {state.step}: the same command resumes there")
                return STOPPED_BY_SIGNAL
            return finalize(ctx, state, stop)


def build(
    planner: Planner, run: Run, provenance: Provenance, files: ModelFiles,
    tokenizer: ChatTokenizer, corpus: PreparedDataset, batches: Batches, start: TrainedAdapter | None,
) -> TrainContext:  # fmt: skip
    """Model, adapters, optimizer and checkpoints."""
    config, machine = planner.config, planner.machine
    tokens = setup.vocabulary(files, tokenizer, start)
    check_embeddings(corpus, tokens, planner.decoder.positions, config)
    plan = planner.choose_activations(*planner.longest_shape(batches))  # from what is free before the model is loaded
    model = setup.load_base(config, machine, files, tokens)  # quantized while it streams from disk
    model.activation_policy = distributed.broadcast_from_rank0(lambda: plan.keep)
    model.neftune_alpha = config.training.neftune_alpha
    adapters = inject_lora(model, config.lora, config.system.seed) if config.training.method == "lora" else {}
    if start:
        setup.load_start(adapters, start)
    if config.system.kernels == "auto" and (warning := kernels.apply(model, config.lora if adapters else None)):
        run.print(f"warning: {warning}")
    if config.training.compile:
        kernels.compile_blocks(model)
    setup.place_model(model, config, machine.device)
    optimizer = build_optimizer([(n, p) for n, p in model.named_parameters() if p.requires_grad], config.training)
    return TrainContext(
        config=config, run=run, machine=machine, files=files, tokenizer=tokenizer, corpus=corpus, batches=batches,
        validation=corpus.validation.units(slice(config.evaluation.max_samples)), model=model, adapters=adapters,
        plan=plan, objective=build_objective(config, adapters, corpus, tokenizer, run.print),
        optimizer=optimizer, scaler=build_scaler(machine.device, machine.dtype),
        writer=setup.open_checkpoints(config, run, provenance), planner=planner,
    )  # fmt: skip


def train(ctx: TrainContext, state: TrainState, stop: StopRequest) -> TrainState:
    """The loop. Returns the state after the last step, which has been saved in a checkpoint."""
    c, monitor, energy = ctx.config, MemoryMonitor(ctx.device), EnergyMeter(ctx.device)
    ctx.model.train()
    with ctx.writer, Profiler(c, ctx.run) as profiler, progress.progress_bar(ctx, state) as bar:
        if state.step == 0:
            progress.before_first_step(ctx, state)
        while (
            state.step < ctx.total_steps
            and not distributed.stop_requested(stop)
            and not state.should_stop_early(c.training)
        ):
            try:
                started = time.perf_counter()
                window = ctx.batches.next_window(state.epoch, state.window, state.guard.skipped_windows)
                lr = state.guard.lr_scale * learning_rate(state.step, ctx.total_steps, c.training)
                set_learning_rate(ctx.optimizer, lr)
                with ctx.autocast():
                    windows = ctx.objective.windows(ctx.model, window, ctx.batches.micro_batch_size, stop)
                if not windows:  # a signal arrived while answers were being sampled
                    continue
                for window in windows:
                    loss, grad_norm = accumulate(ctx, window)  # raises GradientOverflow
                    spike = guard.check(c.guard, state.guard, loss, grad_norm, window)  # raises SkipStep, RollBack
                    if spike:
                        recovery.warn_of_window(ctx, state, "spike", SkipStep(spike, loss, grad_norm, window))
                    state.updates += 1  # from here on, running out of memory would leave half a step
                    with distributed.same_exception(ctx.device):
                        ctx.optimizer.step()
                    profiler.step(state.step + 1, ctx.trained, grad_norm)
                    ctx.optimizer.zero_grad(set_to_none=True)
                units = ctx.objective.count(window)
                state.advance(window, loss, units, time.perf_counter() - started, energy.used())

                progress.log_step(ctx, state, bar, loss, lr, grad_norm)
                progress.validate_if_due(ctx, state)
                progress.watch_memory(ctx, state, monitor)
                progress.save_if_due(ctx, state)
            except OutOfMemory as error:
                state = recovery.halve_micro_batch(ctx, state, error)  # the same window again, in smaller pieces
            except RollBack as bad:
                state = recovery.roll_back(ctx, state, bad)
            except SkipStep as bad:  # also GradientOverflow
                recovery.skip_window(ctx, state, bad)
        progress.ensure_final_checkpoint(ctx, state)
    return state


def accumulate(ctx: TrainContext, window: Window) -> tuple[float, float]:
    """Forward and backward over a window: leaves its gradient, clipped, in the parameters.

    Returns:
        The loss per unit of the objective (SFT: nats per target token), and the gradient's norm before clipping.
    """
    objective, model, parameters = ctx.objective, ctx.model, [p for _, p in ctx.trained]
    loss = torch.zeros((), device=ctx.device)
    with distributed.gradients_summed_over_ranks(loss, parameters, (ctx.config.system.seed, *window.position)):
        with ctx.autocast():
            objective.prepare(model, window)
        units = objective.count(window)  # of the WINDOW: the gradient is the same however the window is split
        for batch in share_of_rank(window):
            with ctx.autocast():
                micro_loss = objective.loss(model, batch.to(ctx.device)) / units
            ctx.scaler.scale(micro_loss).backward()  # unscaled, unless the dtype is float16
            loss += micro_loss.detach()
    with distributed.same_exception(ctx.device):
        loss_scale = ctx.scaler.get_scale()
        ctx.scaler.unscale_(ctx.optimizer)  # after the sum over the ranks, so all ranks see the same overflow
        ctx.scaler.update()
        grad_norm = sharding.clip_grad_norm(parameters, ctx.config.training.max_grad_norm)
    guard.check_overflow(loss_scale, loss.item(), grad_norm, window)
    return loss.item(), grad_norm


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
