"""One contender of a benchmark, in its own process: nanoft's step, bare matmuls, or the creation of packed data.

    python bench/contender.py nanoft --seq 4096 --bs 1 --nf4     prints one line of JSON

What both sides share is here: the options, the seed of weights and tokens, the timing, and the FLOP of a step.
bench/step.py, bench/growth.py, bench/plan.py, bench/tricks.py and bench/gpu.py start it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanoft import kernels
from nanoft.batches import Batches, Sample, TokenDataset, collate
from nanoft.config import DataConfig, LoRAConfig, TrainingConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import build_datasets
from nanoft.kernels import fused
from nanoft.lora import inject_lora
from nanoft.loss import token_nll
from nanoft.model import Decoder
from nanoft.models.adapter_files import adapter_tensors, load_adapter_tensors
from nanoft.models.families import decoder_config
from nanoft.nf4 import quantize
from nanoft.optim import build_optimizer
from nanoft.recompute import keep_by_policy
from nanoft.runtime.device import choose_device, seed_everything

HERE = Path(__file__).resolve().parent
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA, LEARNING_RATE, MAX_GRAD_NORM = 32.0, 2e-4, 1.0
IGNORE = -100  # the label of a token that is not a target
# Options that any peer must accept, those that only bench/peer.py has as well, and those that only nanoft has.
EVERY_PEER = "hidden layers heads kv ffn vocab seq bs steps warmup dtype ckpt nf4 r".split()  # noqa: SIM905
OWN_PEER = "masked packed micro threads seed ids".split()  # noqa: SIM905
OURS = "offload compile dequant triton".split()  # noqa: SIM905
# Median tokens of prompt and of reply, and the deviation of their logarithm: much like GSM8K in a chat template.
PROMPT_LENGTH, REPLY_LENGTH = (130, 0.4), (110, 0.6)
# Of the loss, in nats, and of the gradient norm, relative: about ten times the effect of another order of summation.
# Documents that attend to each other, or targets that are off by one, exceed it several times.
TOLERANCE = {"bfloat16": (0.002, 0.02), "float32": (1e-4, 1e-3)}


class Text(NamedTuple):
    """A conversation as token ids; labels are the same ids, or IGNORE where there is no target."""

    ids: Any  # (n,) int64
    labels: Any  # (n,) int64
    row: int  # its sequence in the packed batch


# ---- What both sides share: options, tokens, timing


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """The options of a contender; names and defaults are the same for any peer."""
    add = parser.add_argument
    add("--hidden", type=int, default=512)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=8)
    add("--kv", type=int, default=4)
    add("--ffn", type=int, default=1408)
    add("--vocab", type=int, default=32768)
    add("--seq", type=int, default=1024, help="tokens per sequence")
    add("--bs", type=int, default=2, help="sequences per step")
    add("--steps", type=int, default=6, help="counted steps")
    add("--warmup", type=int, default=1, help="discarded steps before them")
    add("--dtype", default="bfloat16", choices=list(TOLERANCE))
    add("--ckpt", type=int, nargs="?", const=1, default=0, help="activation checkpointing")
    add("--nf4", type=int, nargs="?", const=1, default=0, help="4-bit base, double quantization")
    add("--r", type=int, default=16, help="rank")
    add("--masked", type=float, default=0.0, help="share of prompt tokens, which are not targets")
    add("--packed", type=int, default=0, help="conversations of different lengths instead of full sequences")
    add("--micro", type=int, default=8, help="conversations per padded batch of the peer (transformers' default)")
    add("--threads", type=int, default=0, help="0: torch's default")
    add("--seed", type=int, default=0)
    add("--ids", type=Path, help="a .npz of token ids, labels, lengths, steps and rows")
    add("--offload", type=int, nargs="?", const=1, default=0, help="nanoft: offload the inputs of blocks to the CPU")
    add("--compile", type=int, nargs="?", const=1, default=0, help="nanoft: torch.compile each block")
    add("--triton", type=int, default=1, help="nanoft: 0: PyTorch's operations in the place of Triton's kernels")
    add("--dequant", choices=["per_use", "cached"], default="per_use", help="nanoft: dequantize at each use, or once")


def read_steps(args: argparse.Namespace) -> list[list[Text]]:
    """The texts of every optimizer step: from the file, or full sequences of random ids."""
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
    """The shape of the model as a config.json."""
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
    """A float32 tensor that depends on the seed and its name only, so that both sides have the same one.

    Norms are 1 and matrices N(0, 0.02), as in transformers; of the adapters, B is 0 and A has Kaiming's variance.
    """
    import torch

    if ".lora_B." in name or len(shape) == 1:
        return torch.full(tuple(shape), float(len(shape) == 1), device=device)
    generator = torch.Generator(device).manual_seed(2**32 * args.seed + zlib.crc32(name.encode()))
    spread = (3 * shape[1]) ** -0.5 if ".lora_A." in name else 0.02
    return torch.randn(tuple(shape), generator=generator, device=device).mul_(spread)


def gflop_of_step(args: argparse.Namespace, texts: list[Text]) -> float:
    """Floating-point operations, in 10^9, that a step cannot avoid.

    A matmul with n weights costs 2 n per token forward and 2 n for the gradient of its input; only LoRA's weights have
    a gradient of their own. Causal attention: 2 hidden (len + 1) per token forward, 2.5 times that backward, because
    flash attention recomputes its scores (Dao et al. 2022). The head: target tokens only. Recomputation, padding, and
    logits of tokens without a target are not counted.
    """
    keys = args.kv * (args.hidden // args.heads)
    shapes = [(args.hidden, args.hidden)] * 2 + [(keys, args.hidden)] * 2 + [(args.ffn, args.hidden)] * 3
    linears = args.layers * sum(out * n for out, n in shapes)
    adapters = args.layers * args.r * sum(out + n for out, n in shapes)
    tokens = sum(len(text.ids) for text in texts)
    targets = sum(int((text.labels[1:] != IGNORE).sum()) for text in texts)
    pairs = sum(len(text.ids) * (len(text.ids) + 1) for text in texts)  # twice the pairs of attention
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
        to_batches: from texts to the argument of `train`, on the device; not timed.
        train: one optimizer step; returns the loss and the gradient norm.
    """
    import torch

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the peak of the steps, not of building the model
    loaded_mb = peak_rss_mb()
    steps = read_steps(args)
    seconds, losses, norms = [], [], []
    for texts in steps:
        batches = to_batches(texts)
        synchronize()
        started = time.perf_counter()
        loss, norm = train(batches)
        synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
        norms.append(float(norm))
    return figures(args, device, (seconds, losses, norms), loaded_mb)


def figures(
    args: argparse.Namespace, device: Any, steps_taken: tuple[list[float], list[float], list[float]], loaded_mb: int
) -> dict[str, Any]:
    """The line of JSON, from seconds, losses and gradient norms of all steps, and the peak memory before the first."""
    import torch

    seconds, losses, norms = steps_taken
    counted, seconds = read_steps(args)[args.warmup :], seconds[args.warmup :]
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
        "loaded_rss_mb": loaded_mb,
        "threads": torch.get_num_threads(),
        "speeds": [round(speed, 2) for speed in speeds],
        "losses": [round(loss, 6) for loss in losses],
        "grad_norms": [round(norm, 6) for norm in norms],
        "args": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
    }


def peak_rss_mb() -> int:
    """The largest resident set of this process; ru_maxrss would include the parent process before exec."""
    if sys.platform == "linux":
        return memory_kb("VmHWM") // 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20  # bytes on macOS


def memory_kb(name: str) -> int:
    """A field of /proc/self/status."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))


# ---- nanoft's side


def run_nanoft(args: argparse.Namespace) -> dict[str, Any]:
    """The step of train.py."""
    import torch

    seed_everything(args.seed, args.threads, deterministic=False)
    device = choose_device("auto")
    bare_mb = memory_kb("VmRSS") // 2**10 if sys.platform == "linux" else peak_rss_mb()  # libraries only
    model = build_nanoft(args, device)
    adapters = inject_lora(model, LoRAConfig(rank=args.r, alpha=ALPHA), args.seed)
    shapes = {name: tensor.shape for name, tensor in adapter_tensors(adapters).items()}
    load_adapter_tensors(adapters, {name: random_weight(args, name, shapes[name], device) for name in shapes}, "seed")
    if args.ckpt:
        model.activation_policy = keep_by_policy("offload" if args.offload else "full", 1, args.layers)
    if not args.triton:
        fused.enable = lambda _: ""
    warning = kernels.apply(model)
    assert not warning, warning  # the reference path is not what is measured
    if args.compile:
        kernels.compile_blocks(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(trained, TrainingConfig(learning_rate=LEARNING_RATE))
    model.train()

    def train(batches: list[Any]) -> tuple[Any, Any]:
        optimizer.zero_grad(set_to_none=True)
        window_targets = sum(batch.target_tokens for batch in batches)
        loss = torch.zeros((), device=device)
        for batch in batches:
            hidden = model(batch.ids, batch.positions, batch.documents, batch.target_positions)
            micro_loss = token_nll(hidden, model.head, batch.targets).sum() / window_targets
            micro_loss.backward()
            loss += micro_loss.detach()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], MAX_GRAD_NORM)
        optimizer.step()
        return loss, norm

    width = 64 if args.compile else 1  # few different shapes, few recompilations
    result = measure(args, device, lambda texts: [pack_rows(texts, width).to(device)], train)
    without = [name for name, p in trained if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not without, f"no gradient: {without}"  # those of the last step, which are still there
    return {**result, "lora_tensors": len(trained), "bare_rss_mb": bare_mb}


def build_nanoft(args: argparse.Namespace, device: Any) -> Any:
    """The base, one random tensor at a time, quantized at once: at most one unquantized tensor is in memory."""
    import torch

    dtype = getattr(torch, args.dtype)
    config = decoder_config(hf_config(args))  # computes angles, which are checked
    with torch.device("meta"):
        model = Decoder(config)
    for name, shape in [(name, p.shape) for name, p in model.named_parameters()]:
        weight = random_weight(args, name, shape, device).to(dtype)
        place, _, leaf = name.rpartition(".")
        if args.nf4 and name.startswith("model.layers.") and weight.dim() == 2:
            packed = quantize(weight, ("nf4", True), dtype)
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, unpacked(packed) if args.dequant == "cached" else packed)
        else:
            setattr(model.get_submodule(place), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return model


def unpacked(layer: Any) -> Any:
    """The same matmul with the weight dequantized once: the numbers of QLoRA at the speed of LoRA."""
    import torch

    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(layer.dequantize(), requires_grad=False)
    return linear


def pack_rows(texts: list[Text], width: int) -> Any:
    """nanoft's batch of one step: each text in the sequence that it was packed into."""
    samples = TokenDataset.of([Sample(t.ids.astype("int32"), t.labels != IGNORE, n) for n, t in enumerate(texts)])
    rows = [[n for n, t in enumerate(texts) if t.row == row] for row in sorted({t.row for t in texts})]
    return collate(samples, rows, pad_id=0, pad_to_multiple_of=width)


# ---- Packed shapes: which texts


def write_packed(args: argparse.Namespace) -> dict[str, Any]:
    """Pack a dataset as nanoft does, and write the windows of the steps; the peer pads the same texts."""
    import numpy as np

    samples = tokenized(args) if args.data else drawn(args)
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


def tokenized(args: argparse.Namespace) -> Any:
    """The records of a file, tokenized by the demo's tokenizer."""
    chat = ChatTokenizer(HERE.parent / "configs" / "tiny" / "base")
    data = DataConfig(train_file=str(args.data), validation_split=0.0)
    return build_datasets(data, chat, args.seq, args.seed, lambda _: None).training


def drawn(args: argparse.Namespace) -> Any:
    """Two thousand conversations of random ids with realistic, log-normal lengths of prompt and reply."""
    import numpy as np

    chance = np.random.default_rng(args.seed)
    samples = []
    for record in range(2000):
        parts = [chance.lognormal(np.log(median), spread) for median, spread in (PROMPT_LENGTH, REPLY_LENGTH)]
        prompt, reply = (max(2, int(part)) for part in parts)
        length = min(prompt + reply, args.seq)
        ids = chance.integers(0, args.vocab, length).astype(np.int32)
        samples.append(Sample(ids, np.arange(length) >= min(prompt, length // 2), record))
    return TokenDataset.of(samples)


# ---- The control: the speed of the machine


def run_matmul(args: argparse.Namespace) -> dict[str, Any]:
    """GFLOP/s of the forward matmuls of a step alone, and the GFLOP of a step."""
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


def time_kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Triton's kernels and their formulas, forward and backward, in sizes of the model: microseconds, difference."""
    import torch

    from nanoft.kernels.triton_kernels import with_formulas

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for heads, size in ((1, args.hidden), (args.heads, args.hidden // args.heads)):
        chance = torch.Generator(device).manual_seed(args.seed)
        x = torch.randn(1, args.seq, heads, size, generator=chance, device=device).to(torch.bfloat16).requires_grad_()
        angles = torch.rand(1, args.seq, 1, size // 2, generator=chance, device=device)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        for name, functions in with_formulas(x, cos, sin, torch.ones(size, device=device).bfloat16()).items():
            outputs, times = zip(*(timed(function, x, device) for function in functions), strict=True)
            differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*outputs, strict=True)]
            found[f"{name}, {args.seq} x {heads} x {size}"] = {
                "us": round(times[0], 1),
                "formula_us": round(times[1], 1),
                "speedup": round(times[1] / times[0], 2),
                "difference": max(differences),  # relative to the largest number
            }
    return {"kernels": found}


def timed(function: Callable[[], Any], x: Any, device: Any) -> tuple[list[Any], float]:
    """What a function of x returns, with its gradient if it has one, in float32; and the median of microseconds."""
    import torch

    seconds = []
    for _ in range(12 if device.type == "cuda" else 1):
        started = time.perf_counter()
        outputs = [function()]
        if outputs[0].requires_grad:
            outputs += torch.autograd.grad(outputs[0], x, outputs[0].detach().cos())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return [output.detach().float() for output in outputs], 1e6 * statistics.median(seconds)


def print_result(run: Callable[[argparse.Namespace], dict[str, Any]], documentation: str | None) -> None:
    """The main program of a peer."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser)
    print(json.dumps(run(parser.parse_args())))


def device_name(_: argparse.Namespace) -> dict[str, str]:
    import torch

    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}


CONTENDERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "nanoft": run_nanoft,
    "matmul": run_matmul,
    "pack": write_packed,
    "device": device_name,
    "kernels": time_kernels,
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=list(CONTENDERS))
    parser.add_argument("--data", type=Path, help="records, for pack; default: random lengths")
    add_step_options(parser)
    args = parser.parse_args(argv)
    print(json.dumps(CONTENDERS[args.contender](args)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
