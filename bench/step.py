"""One optimizer step, nanoft beside transformers + peft: how fast, in how much memory, and is it the same step?

    python bench/step.py --shape small                 2 rows of 1,024 random tokens; ends with one line of JSON
    python bench/step.py --shape masked --nf4 --ckpt   7 of 10 tokens are prompt; 4-bit base; activation checkpointing
    python bench/step.py --shape packed --data a.json  real conversations: nanoft packs them, the peer pads them
    python bench/step.py --shape all --rounds 5        every shape; writes bench/step.json and bench/step.md
    python bench/step.py --peer "python other.py"      another peer with the options and the JSON line of bench/peer.py

Both sides run in fresh processes, one after another, in an order that turns every round. They draw the same base
weights, the same adapter and the same tokens from a seed, so losses and gradient norms must agree in every step: if
they do not, no ratio is given. Warm-up steps are thrown away. Tokens a second count real tokens, never padding; the
spread is p10 to p90 over all counted steps. Peak memory is the largest resident set of the process (ru_maxrss). A
control multiplies matrices of the step's own sizes and nothing else, so that speeds can be given as a share of what the
machine can do. This process imports no torch: a child's peak is never less than what its parent had at its start.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
PEER = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'peer.py'))}"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 32.0, 2e-4, 1.0
IGNORE = -100  # the label of a token that is not learned
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "long": {"seq": 4096, "bs": 1},
    "masked": {"masked": 0.7},
    "packed": {"packed": 1},
}
GRID = [("small", 0, 0), ("small", 1, 0), ("small", 0, 1), ("small", 1, 1), ("long", 0, 0), ("long", 0, 1)]
GRID += [("long", 1, 1), ("masked", 0, 0), ("masked", 1, 0), ("packed", 0, 0), ("packed", 1, 0)]
# Options that any peer must know, those that only bench/peer.py knows, and those that only nanoft has.
EVERY_PEER = "hidden layers heads kv ffn vocab seq bs steps warmup dtype ckpt nf4 r".split()  # noqa: SIM905
OWN_PEER = "masked packed micro threads seed ids".split()  # noqa: SIM905
OURS = "offload compile dequant".split()  # noqa: SIM905
# Median tokens of prompt and of reply, and the deviation of their logarithm: much like GSM8K in a chat template.
PROMPT_LENGTH, REPLY_LENGTH = (130, 0.4), (110, 0.6)
# Of the loss, in nats, and of the gradient norm, relative: about ten times what two orders of the same sums differ by;
# documents that see each other, or targets that are off by one, differ by several times as much again.
TOLERANCE = {"bfloat16": (0.002, 0.02), "float32": (1e-4, 1e-3)}


class Text(NamedTuple):
    """A conversation as token ids; labels are the same ids, or IGNORE where nothing is learned."""

    ids: Any  # (n,) int64
    labels: Any  # (n,) int64
    row: int  # of the packed batch


# ---- What both sides share: options, tokens, the stopwatch


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """What one contender is told; the names and the defaults are those of any peer."""
    add = parser.add_argument
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--kv", type=int, default=4)
    add("--ffn", type=int, default=1408)
    add("--vocab", type=int, default=32768)
    add("--seq", type=int, default=1024, help="tokens of a row")
    add("--bs", type=int, default=2, help="rows of a step")
    add("--steps", type=int, default=6, help="counted steps")
    add("--warmup", type=int, default=1, help="steps before them")
    add("--dtype", default="bfloat16", choices=list(TOLERANCE))
    add("--ckpt", type=int, nargs="?", const=1, default=0, help="activation checkpointing")
    add("--nf4", type=int, nargs="?", const=1, default=0, help="4-bit base, double quantisation")
    add("--r", type=int, default=16, help="rank")
    add("--masked", type=float, default=0.0, help="share of prompt tokens, which are not learned")
    add("--packed", type=int, default=0, help="conversations of different lengths instead of full rows")
    add("--micro", type=int, default=8, help="conversations that the peer pads together (transformers' default)")
    add("--threads", type=int, default=0, help="0: torch's own choice")
    add("--seed", type=int, default=0)
    add("--ids", type=Path, help="a .npz of token ids, labels, lengths, steps and rows")
    add("--offload", type=int, nargs="?", const=1, default=0, help="nanoft: checkpoints wait on the CPU")
    add("--compile", type=int, nargs="?", const=1, default=0, help="nanoft: torch.compile each block")
    add("--dequant", choices=["per_use", "cached"], default="per_use", help="nanoft: unpack 4-bit weights once only")


def read_steps(args: argparse.Namespace) -> list[list[Text]]:
    """The texts of every optimizer step: from the file, or full rows of random ids."""
    import numpy as np

    count = args.warmup + args.steps
    if args.ids is None:
        ids = np.random.default_rng(args.seed).integers(0, args.vocab, (count, args.bs, args.seq))
        labels = np.where(np.arange(args.seq) < round(args.masked * args.seq), IGNORE, ids)
        return [[Text(ids[s, row], labels[s, row], row) for row in range(args.bs)] for s in range(count)]
    stored = np.load(args.ids)
    steps: list[list[Text]] = [[] for _ in range(count)]
    at = 0
    for length, step, row in zip(stored["lengths"], stored["steps"], stored["rows"], strict=True):
        part = slice(at, at + int(length))
        steps[step].append(Text(stored["ids"][part].astype("int64"), stored["labels"][part].astype("int64"), int(row)))
        at += int(length)
    return steps


def hf_config(args: argparse.Namespace) -> dict[str, Any]:
    """The model's shape, as a config.json has it."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv,
        "intermediate_size": args.ffn,
        "vocab_size": args.vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }


def random_weight(args: argparse.Namespace, name: str, shape: Sequence[int], device: Any) -> Any:
    """A tensor in float32 that depends on the seed and its name only, so that both sides have the same one.

    Norms are 1 and matrices N(0, 0.02), as transformers begins; of the adapters B is 0 and A has Kaiming's variance.
    """
    import torch

    if ".lora_B." in name or len(shape) == 1:
        return torch.full(tuple(shape), float(len(shape) == 1), device=device)
    generator = torch.Generator(device).manual_seed(2**32 * args.seed + zlib.crc32(name.encode()))
    spread = (3 * shape[1]) ** -0.5 if ".lora_A." in name else 0.02
    return torch.randn(tuple(shape), generator=generator, device=device).mul_(spread)


def gflop_of_step(args: argparse.Namespace, texts: list[Text]) -> float:
    """Floating-point operations, in 10^9, that a step cannot do without.

    A product with n weights costs 2 n a token forward and 2 n more for the gradient of its input; the frozen weights
    have no gradient, LoRA's have. Causal attention: 2 hidden (len + 1) a token forward, 2.5 times that backward, as
    flash attention computes its scores again (Dao et al. 2022). The head: target tokens only. What is recomputed under
    checkpointing, padded, or multiplied for tokens without a target is not useful, so it is not counted.
    """
    keys = args.kv * (args.hidden // args.heads)
    shapes = [(args.hidden, args.hidden)] * 2 + [(keys, args.hidden)] * 2 + [(args.ffn, args.hidden)] * 3
    linears = args.layers * sum(out * n for out, n in shapes)
    adapters = args.layers * args.r * sum(out + n for out, n in shapes)
    tokens = sum(len(text.ids) for text in texts)
    targets = sum(int((text.labels[1:] != IGNORE).sum()) for text in texts)
    pairs = sum(len(text.ids) * (len(text.ids) + 1) for text in texts)  # twice those that attention compares
    attention = 3.5 * 2 * args.layers * args.hidden * pairs
    return (4 * linears * tokens + 6 * adapters * tokens + attention + 4 * args.vocab * args.hidden * targets) / 1e9


def measure(
    args: argparse.Namespace,
    device: Any,
    to_batches: Callable[[list[Text]], Any],
    train: Callable[[Any], tuple[Any, Any]],
) -> dict[str, Any]:
    """Train on every step's texts and time it.

    Args:
        to_batches: texts to what `train` takes, on the device; not timed.
        train: one optimizer step; its loss and its gradient norm.
    """
    import torch

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the steps' peak, not that of building the model
    loaded_mb = peak_rss_mb()
    steps = read_steps(args)
    seconds, losses, norms = [], [], []
    for texts in steps:
        batches = to_batches(texts)
        synchronise()
        started = time.perf_counter()
        loss, norm = train(batches)
        synchronise()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
        norms.append(float(norm))
    counted, seconds = steps[args.warmup :], seconds[args.warmup :]
    speeds = [sum(len(text.ids) for text in texts) / s for texts, s in zip(counted, seconds, strict=True)]
    work = [gflop_of_step(args, texts) for texts in counted]
    cuda = device.type == "cuda"
    return {
        "tok_s": round(statistics.median(speeds), 1),
        "step_s": round(statistics.median(seconds), 4),
        "gflop_s": round(statistics.median(w / s for w, s in zip(work, seconds, strict=True)), 2),
        "loss": round(losses[-1], 4),
        "peak_rss_mb": peak_rss_mb(),
        "peak_cuda_mb": torch.cuda.max_memory_allocated() // 2**20 if cuda else None,
        "reserved_cuda_mb": torch.cuda.max_memory_reserved() // 2**20 if cuda else None,
        "loaded_rss_mb": loaded_mb,  # the peak before the first step
        "threads": torch.get_num_threads(),
        "speeds": [round(speed, 2) for speed in speeds],
        "losses": [round(loss, 6) for loss in losses],
        "grad_norms": [round(norm, 6) for norm in norms],
        "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
    }


def peak_rss_mb() -> int:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


# ---- nanoft's side: all that this file knows of nanoft's model


def run_nanoft(args: argparse.Namespace) -> dict[str, Any]:
    """The step of train.py."""
    import torch

    from nanoft import runtime
    from nanoft.config import TrainingConfig
    from nanoft.lora import adapter_tensors, inject_lora, load_adapter_tensors
    from nanoft.loss import target_nll
    from nanoft.model import compile_blocks
    from nanoft.optim import build_optimizer

    runtime.prepare(args.seed, args.threads, deterministic=False)
    device = runtime.choose_device("auto")
    model = build_nanoft(args, device)
    adapters = inject_lora(model, ALL_LINEAR, args.r, ALPHA, 0.0, args.seed)
    shapes = {name: tensor.shape for name, tensor in adapter_tensors(adapters).items()}
    load_adapter_tensors(adapters, {name: random_weight(args, name, shapes[name], device) for name in shapes}, "seed")
    if args.ckpt:
        model.keep = ["offloaded" if args.offload else "input"] * args.layers
    if args.compile:
        compile_blocks(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, TrainingConfig(learning_rate=LEARNING_RATE))
    model.train()

    def train(batches: list[Any]) -> tuple[Any, Any]:
        optimizer.zero_grad(set_to_none=True)
        window_targets = sum(batch.target_tokens for batch in batches)
        loss = torch.zeros((), device=device)
        for batch in batches:
            hidden = model(batch.ids, batch.positions, batch.documents)
            micro_loss = target_nll(hidden, model.head, batch.rows, batch.targets) / window_targets
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], MAX_GRAD_NORM)
        optimizer.step()
        return loss, norm

    width = 64 if args.compile else 1  # few different shapes, few recompilations
    result = measure(args, device, lambda texts: [pack_rows(texts, width).to(device)], train)
    without = [name for name, p in trained if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not without, f"no gradient: {without}"  # those of the last step, which are still there
    return {**result, "lora_tensors": len(trained)}


def build_nanoft(args: argparse.Namespace, device: Any) -> Any:
    """The base, one random tensor at a time, quantised as it arrives: never more than one tensor above its size."""
    import torch

    from nanoft.model import Decoder, DecoderConfig
    from nanoft.nf4 import Linear4bit

    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        model = Decoder(DecoderConfig.from_hf(hf_config(args)))
    for name, shape in [(name, p.shape) for name, p in model.named_parameters()]:
        weight = random_weight(args, name, shape, device).to(dtype)
        place, _, leaf = name.rpartition(".")
        if args.nf4 and name.startswith("model.layers.") and weight.dim() == 2:
            packed = Linear4bit(weight, None, "nf4", True, dtype)
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, unpacked(packed) if args.dequant == "cached" else packed)
        else:
            setattr(model.get_submodule(place), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return model


def unpacked(layer: Any) -> Any:
    """The same product from the weight that four bits stand for, kept in 16: QLoRA's numbers at LoRA's speed."""
    import torch

    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
    return linear


def pack_rows(texts: list[Text], width: int) -> Any:
    """nanoft's batch of one step: each text in the row that it was packed into."""
    from nanoft.batches import Samples, collate
    from nanoft.chat import Sample

    samples = Samples.of([Sample(t.ids.astype("int32"), t.labels != IGNORE, n) for n, t in enumerate(texts)])
    rows = [[n for n, t in enumerate(texts) if t.row == row] for row in sorted({t.row for t in texts})]
    return collate(samples, rows, pad_id=0, pad_to_multiple_of=width)


# ---- Packed shapes: which texts


def write_packed(args: argparse.Namespace) -> dict[str, Any]:
    """Pack a data set as nanoft does and keep the windows of the steps; the peer pads the same texts."""
    import numpy as np

    from nanoft.batches import Batches

    samples = tokenised(args) if args.data else drawn(args)
    batches = Batches(samples, args.bs, 1, args.seed, pad_id=0, pack_length=args.seq)
    count = args.warmup + args.steps
    if batches.windows_in_epoch() < count:
        raise SystemExit(
            f"--data: {batches.windows_in_epoch()} windows of {args.bs} x {args.seq} tokens: {count} needed"
        )
    places = [
        (step, row, int(place))
        for step in range(count)
        for row, members in enumerate(batches.rows(step)[0])
        for place in members
    ]
    # within a step in random order: a user's padded batches are not sorted by length
    order = np.random.default_rng(args.seed).permutation(len(places))
    places = [places[n] for n in order]
    texts = [samples[place] for _, _, place in places]
    if max(int(text.ids.max()) for text in texts) >= args.vocab:
        raise SystemExit(f"--vocab: {args.vocab} is less than the tokenizer's")
    np.savez(
        args.ids,
        ids=np.concatenate([text.ids for text in texts]),
        labels=np.concatenate([np.where(text.is_target, text.ids, IGNORE) for text in texts]),
        lengths=[len(text.ids) for text in texts],
        steps=[step for step, _, _ in places],
        rows=[row for _, row, _ in places],
    )
    return {"texts": len(texts)}


def tokenised(args: argparse.Namespace) -> Any:
    """The records of a file, in the tokens of the repository's own tokenizer."""
    from nanoft.chat import ChatTokenizer
    from nanoft.config import DataConfig
    from nanoft.corpus import open_corpus

    chat = ChatTokenizer.from_directory(HERE.parent / "configs" / "tiny" / "base")
    data = DataConfig(train_file=str(args.data), validation_split=0.0)
    return open_corpus(data, args.seq, args.seed, chat, lambda _: None).training


def drawn(args: argparse.Namespace) -> Any:
    """Two thousand conversations of random ids, as long as real ones: both parts are log-normal."""
    import numpy as np

    from nanoft.batches import Samples
    from nanoft.chat import Sample

    chance = np.random.default_rng(args.seed)
    samples = []
    for record in range(2000):
        parts = [chance.lognormal(np.log(median), spread) for median, spread in (PROMPT_LENGTH, REPLY_LENGTH)]
        prompt, reply = (max(2, int(part)) for part in parts)
        length = min(prompt + reply, args.seq)
        ids = chance.integers(0, args.vocab, length).astype(np.int32)
        samples.append(Sample(ids, np.arange(length) >= min(prompt, length // 2), record))
    return Samples.of(samples)


# ---- The control: what the machine can do


def run_matmul(args: argparse.Namespace) -> dict[str, Any]:
    """GFLOP/s of a step's forward products as bare matrices, and the work of a step."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, tokens, keys = getattr(torch, args.dtype), args.bs * args.seq, args.kv * (args.hidden // args.heads)
    shapes = [(args.hidden, args.hidden)] * 2 + [(args.hidden, keys)] * 2 + [(args.hidden, args.ffn)] * 2
    shapes += [(args.ffn, args.hidden)]
    chance = torch.Generator(device).manual_seed(args.seed)

    def draw(*size: int) -> Any:
        return torch.randn(size, generator=chance, device=device).to(dtype)

    pairs = [(draw(tokens, n), draw(out, n)) for n, out in shapes] * args.layers
    pairs += [(draw(tokens, args.hidden), draw(args.vocab, args.hidden))]
    flop = sum(2 * x.shape[0] * x.shape[1] * weight.shape[0] for x, weight in pairs)
    seconds = []
    for _ in range(args.warmup + args.steps):
        started = time.perf_counter()
        for x, weight in pairs:
            x @ weight.T
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "gflop_s": round(flop / 1e9 / statistics.median(seconds[args.warmup :]), 1),
        "gflop_of_step": round(statistics.median(gflop_of_step(args, texts) for texts in read_steps(args)), 3),
    }


def device_name(_: argparse.Namespace) -> dict[str, str]:
    import torch

    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}


CONTENDERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "nanoft": run_nanoft,
    "matmul": run_matmul,
    "pack": write_packed,
    "device": device_name,
}


# ---- The contest


class Failed(Exception):
    """A process that gave no result, in one line."""


def own_command(contender: str) -> list[str]:
    return [sys.executable, str(HERE / "step.py"), "--contender", contender]


def flags(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    given = {name: getattr(args, name) for name in names}
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def in_process(command: list[str], timeout_s: float, bounded: bool = True) -> dict[str, Any]:
    """Run a command in a fresh process; its last line is JSON.

    Args:
        bounded: let it have no more than the memory that is free.
    Raises:
        Failed: it ended badly, ran too long or said something else.
    """
    paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout_s,
            preexec_fn=bound_memory if bounded else None,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"not done after {timeout_s:.0f} s") from None
    except OSError as error:
        raise Failed(f"{command[0]}: {error.strerror}") from None
    if done.returncode < 0:
        raise Failed(f"ended by signal {-done.returncode}: out of memory?")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]  # warnings may follow
        raise Failed((errors or lines)[-1][:200])
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed("the last line that it printed is not JSON") from None
    return result


def bound_memory() -> None:
    """In a child: fail with an error rather than make the machine swap or kill something else."""
    if sys.platform == "linux":
        with open("/proc/meminfo") as file:
            free_kb = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        resource.setrlimit(resource.RLIMIT_DATA, (free_kb * 900, free_kb * 900))  # nine tenths of what is free


def contest(args: argparse.Namespace) -> dict[str, Any]:
    """One shape: rounds of both sides, the control, and what follows from them; failures are part of the result."""
    foreign = args.peer != PEER
    with tempfile.TemporaryDirectory() as temporary:
        args.ids = Path(temporary) / "ids.npz" if args.packed else None
        os.environ["XDG_CACHE_HOME"] = temporary  # the tokenised data, too, is gone afterwards
        own = flags(args, [*EVERY_PEER, *OWN_PEER])
        commands = {
            "nanoft": [*own_command("nanoft"), *own, *flags(args, OURS)],
            "peer": [*shlex.split(args.peer), *(flags(args, EVERY_PEER) if foreign else own)],
        }
        try:
            if args.packed:
                in_process([*own_command("pack"), *own, *flags(args, ["data"])], args.timeout_s)
            control = in_process([*own_command("matmul"), *own], args.timeout_s)
        except Failed as error:
            raise SystemExit(f"{case_name(args)}: {error}") from None
        if foreign and args.packed:
            commands["peer"] = ["false"]  # it cannot read the texts
        results: dict[str, list[dict[str, Any]]] = {"nanoft": [], "peer": []}
        errors: dict[str, str] = {}
        for number in range(args.rounds):
            for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
                if name in errors:
                    continue
                try:
                    results[name].append(in_process(commands[name], args.timeout_s))
                    say(f"{case_name(args)}: round {number + 1}: {name}: {results[name][-1]['tok_s']:,.0f} tokens/s")
                except Failed as error:
                    errors[name] = str(error)
                    say(f"{case_name(args)}: {name}: {error}")
    return summary(args, results, errors, control, foreign)


def summary(
    args: argparse.Namespace,
    results: dict[str, list[dict[str, Any]]],
    errors: dict[str, str],
    control: dict[str, Any],
    foreign: bool,
) -> dict[str, Any]:
    """The line of JSON: ratios are taken within each round, then their median."""
    sides = {
        name: {"error": errors[name]} if name in errors else side_summary(runs, control)
        for name, runs in results.items()
    }
    if errors:
        check: dict[str, Any] = {"checked": False, "why": "a side failed"}
    elif foreign:
        check = {"checked": False, "why": "a peer of another make has weights and tokens of its own"}
    else:
        check = compare(args, results["nanoft"][0], results["peer"][0])
    counts = not errors and check.get("agree", True)
    pairs = list(zip(results["nanoft"], results["peer"], strict=True)) if counts else []
    speedups = [ours["tok_s"] / theirs["tok_s"] for ours, theirs in pairs]
    memories = [ours["peak_rss_mb"] / theirs["peak_rss_mb"] for ours, theirs in pairs]
    return {
        "shape": case_name(args),
        **sides,
        "speedup": round(statistics.median(speedups), 3) if counts else None,
        "memory_ratio": round(statistics.median(memories), 3) if counts else None,
        "speedups": [round(ratio, 3) for ratio in speedups],
        "memory_ratios": [round(ratio, 3) for ratio in memories],
        "losses": check,
        "gflop_of_step": control["gflop_of_step"],
        "matmul_gflop_s": control["gflop_s"],
        "rounds": args.rounds,
        "threads": next((run["threads"] for run in results["nanoft"] if "threads" in run), None),
    }


def side_summary(runs: list[dict[str, Any]], control: dict[str, Any]) -> dict[str, Any]:
    """Medians over a side's rounds, and the spread over all of their steps."""
    median = {
        key: statistics.median(run[key] for run in runs)
        for key in ("tok_s", "step_s", "peak_rss_mb", "loaded_rss_mb", "peak_cuda_mb", "reserved_cuda_mb")
        if runs[0].get(key) is not None
    }
    speeds = [speed for run in runs for speed in run.get("speeds", [run["tok_s"]])]
    low, high = spread(speeds)
    achieved = statistics.median(run.get("gflop_s", control["gflop_of_step"] / run["step_s"]) for run in runs)
    return {
        **median,
        "tok_s_p10": low,
        "tok_s_p90": high,
        "percent_of_matmul": round(100 * achieved / control["gflop_s"], 1),
    }


def spread(values: list[float]) -> tuple[float, float]:
    """p10 and p90."""
    if len(values) < 2:
        return values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return round(tenths[0], 1), round(tenths[-1], 1)


def compare(args: argparse.Namespace, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Whether every step of both sides had the same loss and the same gradient norm."""
    loss_tolerance, norm_tolerance = TOLERANCE[args.dtype]
    losses = [abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)]
    norms = [abs(a / b - 1) for a, b in zip(ours["grad_norms"], theirs["grad_norms"], strict=True)]
    agree = all(d <= loss_tolerance for d in losses) and all(d <= norm_tolerance for d in norms)  # NaN agrees with none
    return {"checked": True, "agree": agree, "largest_difference": largest(losses), "of_grad_norm": largest(norms)}


def largest(values: list[float]) -> float | None:
    """None where one is not finite: JSON has no word for it."""
    return round(max(values), 6) if all(map(math.isfinite, values)) else None


# ---- The report


def case_name(args: argparse.Namespace) -> str:
    """The shape and the options that were switched on."""
    switches = {"nf4": args.nf4, "cached": args.dequant == "cached", "ckpt": args.ckpt}
    switches |= {"offload": args.offload, "compile": args.compile}
    return " ".join([args.shape, *(name for name, on in switches.items() if on)])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def report(cases: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """A Markdown table, one line a shape."""
    columns = ["shape", "nanoft, tokens/s", "%", "peer, tokens/s", "%", "speedup"]
    columns += ["nanoft, MB", "peer, MB", "memory", "losses differ by"]
    lines = [
        f"# One optimizer step: nanoft beside {settings['peer']}",
        "",
        f"{settings['machine']}; {settings['versions']}; rounds: {settings['rounds']}.",
        "Written by `bench/step.py`, which says what is compared. Speeds are medians (p10 to p90 of all steps), ratios",
        "medians (and range) over the rounds; % is the share of what plain matrix products of the same sizes reach.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    return "\n".join([*lines, *map(table_row, cases)]) + "\n"


def table_row(case: dict[str, Any]) -> str:
    cells = [case["shape"]]
    for side in (case["nanoft"], case["peer"]):
        if "error" in side:
            cells += [f"failed: {side['error']}".replace("|", "/"), ""]
        else:
            cells += [
                f"{side['tok_s']:,.0f} ({side['tok_s_p10']:,.0f} to {side['tok_s_p90']:,.0f})",
                f"{side['percent_of_matmul']:.0f}",
            ]
    cells += [ratio(case["speedups"])]
    cells += [f"{side['peak_rss_mb']:,.0f}" if "error" not in side else "" for side in (case["nanoft"], case["peer"])]
    cells += [ratio(case["memory_ratios"])]
    check = case["losses"]
    cells += [difference(check)]
    return "| " + " | ".join(cells) + " |"


def difference(check: dict[str, Any]) -> str:
    """What `compare` found, as a cell."""
    if not check["checked"]:
        return "not checked"
    found = check["largest_difference"]
    return ("not finite" if found is None else f"{found:.0e}") + ("" if check["agree"] else " DISAGREE")


def ratio(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else ""


def machine() -> str:
    """The processor and how many cores of it there are."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="small")
    parser.add_argument("--peer", default=PEER, metavar="COMMAND", help="default: bench/peer.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data", type=Path, help="records for packed shapes; without it, lengths are drawn")
    parser.add_argument("--timeout-s", type=float, default=1800, help="for each process")
    parser.add_argument("--out", type=Path, default=HERE / "step", help="of --shape all, without its suffix")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    add_step_options(parser)
    return parser


def parse(argv: Sequence[str], **case: Any) -> argparse.Namespace:
    """The options, where those of a shape are the defaults."""
    parser = build_parser()
    shape = case.get("shape") or parser.parse_args(argv).shape
    parser.set_defaults(**SHAPES.get(shape, {}))
    args = parser.parse_args(argv)
    vars(args).update(case)
    return args


def run_grid(argv: Sequence[str]) -> None:
    args = parse(argv)
    peer = "transformers + peft" if args.peer == PEER else f"`{args.peer}`"
    settings = {"peer": peer, "machine": machine(), "versions": versions(), "rounds": args.rounds}
    cases = []
    for shape, nf4, ckpt in GRID:
        cases.append(contest(parse(argv, shape=shape, nf4=nf4, ckpt=ckpt)))
        print(json.dumps(cases[-1]), flush=True)
        args.out.with_suffix(".md").write_text(report(cases, settings), encoding="utf-8")
        args.out.with_suffix(".json").write_text(json.dumps({**settings, "cases": cases}, indent=2) + "\n")
    say(report(cases, settings))


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.contender:
        print(json.dumps(CONTENDERS[args.contender](args)))
        return 0
    if args.shape == "all":
        run_grid(argv)
        return 0
    result = contest(args)
    print(json.dumps(result))
    return 0 if result["speedup"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
