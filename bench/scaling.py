"""A model of compute and communication on many GPUs, for data parallel and fully sharded training.

    python bench/scaling.py                                  Mistral-7B, LoRA, 8 GPUs per node, up to 512 GPUs
    python bench/scaling.py --tflops 90 --between 3          another speed of the GPU, and 25 Gbit/s between nodes
    python bench/scaling.py --method full --batch 2 --recompute

Nothing here is measured: the figures follow from the parameters by the equations of docs/scaling.md. Speed and
bandwidths are assumptions; replace them by your own measurements (bench/gpu.py, nccl-tests).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from nanoft.config import Config
from nanoft.models.families import decoder_config
from nanoft.training.memory_plan import count_parameters
from nanoft.training.plan import gflop_per_token

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "sliding_window": None,
}
BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Job:
    """The work of one rank on a window, and what it sends."""

    layers: int
    micro_batches: int
    tokens: int  # of a micro-batch
    forward_s: float  # of a block, of one micro-batch
    backward_s: float
    block_bytes: float  # weights of a block
    gradient_bytes: float  # gradients of a block


@dataclass(frozen=True)
class Network:
    """Bandwidths from a GPU to its neighbor in the ring, bytes per second, and latency in seconds."""

    gpus_per_node: int
    within: float
    between: float
    latency: float

    def ring_s(self, size: float, ranks: int, rounds: int = 1) -> float:
        """An all-gather or reduce-scatter of `size` bytes in all (rounds=1), or an all-reduce (2), around a ring:
        rounds (N - 1) (size / N / bandwidth + latency); the slowest link counts (Patarasuk & Yuan 2009)."""
        bandwidth = self.within if ranks <= self.gpus_per_node else self.between
        return rounds * (ranks - 1) * (size / ranks / bandwidth + self.latency)


def data_parallel_s(job: Job, network: Network, ranks: int) -> float:
    """Compute, then one all-reduce of all gradients."""
    compute = job.micro_batches * job.layers * (job.forward_s + job.backward_s)
    return compute + network.ring_s(job.layers * job.gradient_bytes, ranks, rounds=2)


def sharded_s(job: Job, network: Network, ranks: int, recompute: bool) -> float:
    """Two queues, played through: blocks are computed in one, gathered and reduced in the other.

    A block is computed when it was gathered; the next one is gathered meanwhile, and no more than that one, which is
    what its memory allows. In backward every block is gathered anew, a third time if its activations are computed
    again, and its gradients are reduced behind it.
    """
    gather = network.ring_s(job.block_bytes, ranks)
    reduce = network.ring_s(job.gradient_bytes, ranks)
    visits = [(job.forward_s, 0.0)] * job.layers
    for _ in range(job.layers):
        visits += [(job.forward_s, 0.0)] * recompute + [(job.backward_s - job.forward_s * recompute, reduce)]
    computed = network_free = before = 0.0  # when the last block was done, the network is free, the one before was done
    for seconds, to_reduce in visits * job.micro_batches:
        gathered = max(network_free, before) + gather
        before = computed
        computed = max(computed, gathered) + seconds
        network_free = gathered
        if to_reduce:
            network_free = max(gathered, computed - seconds) + to_reduce  # of the block before, about now
    return max(computed, network_free)


def job_of(args: argparse.Namespace) -> Job:
    """From the model's shape and the GPU's speed."""
    decoder = decoder_config(MISTRAL_7B)
    config = Config().override({"training.method": args.method, "lora.rank": args.rank})
    counts = count_parameters(decoder, config)
    tokens = args.batch * args.length
    flop = 1e9 * gflop_per_token(decoder, counts, config, args.length, float(args.recompute)) * tokens
    seconds = flop / (args.tflops * 1e12) / decoder.num_layers
    forward = seconds / (
        (3 if args.method == "full" else 2) + args.recompute
    )  # backward: its input's, its weight's gradient
    stored = 4 if args.method == "full" else 2
    return Job(
        layers=decoder.num_layers,
        micro_batches=args.micro_batches,
        tokens=tokens,
        forward_s=forward,
        backward_s=seconds - forward,
        block_bytes=stored * (counts.linears + counts.others) / decoder.num_layers,
        gradient_bytes=4 * counts.trained / decoder.num_layers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=["lora", "full"], default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="micro-batch size, sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens per sequence")
    parser.add_argument("--micro-batches", type=int, default=4, help="per rank and window")
    parser.add_argument("--recompute", action="store_true", help="recompute activations (training.checkpointing=full)")
    parser.add_argument("--tflops", type=float, default=300, help="reached by a GPU, 10^12 FLOP/s (assumed)")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--within", type=float, default=200, help="GB/s per GPU within a node (assumed)")
    parser.add_argument("--between", type=float, default=40, help="GB/s per GPU between nodes (assumed)")
    parser.add_argument("--latency", type=float, default=10, help="microseconds per message (assumed)")
    args = parser.parse_args()

    job, network = job_of(args), Network(args.gpus_per_node, args.within * 1e9, args.between * 1e9, args.latency * 1e-6)
    alone = data_parallel_s(job, network, 1)
    print("A model, not a measurement: see docs/scaling.md for its equations.\n")
    gradients, weights = (job.layers * size / 1e9 for size in (job.gradient_bytes, job.block_bytes))
    window = f"a window of {job.micro_batches} x {job.tokens:,} tokens per GPU, {alone:.2f} s on one GPU"
    print(f"{args.method}: {window}; gradients {gradients:.3g} GB, weights {weights:.3g} GB\n")
    print("| GPUs | data parallel, tokens/s | of ideal | fully sharded, tokens/s | of ideal |")
    print("|------|-------------------------|----------|-------------------------|----------|")
    shares = []
    for ranks in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        times = data_parallel_s(job, network, ranks), sharded_s(job, network, ranks, args.recompute)
        speeds = [ranks * job.micro_batches * job.tokens / seconds for seconds in times]
        shares.append((ranks, [alone / seconds for seconds in times]))
        cells = " | ".join(f"{speed:23,.0f} | {alone / t:8.1%}" for speed, t in zip(speeds, times, strict=True))
        print(f"| {ranks:4} | {cells} |")
    for column, name in enumerate(("data parallel", "fully sharded")):
        print(f"\n{name}: share of the ideal speed (a model)")
        for ranks, ideal in shares:
            print(f"{ranks:5} {'#' * round(BAR * ideal[column])} {ideal[column]:.0%}")


if __name__ == "__main__":
    main()
