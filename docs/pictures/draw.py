"""The pictures of the documents, made from nanoft's own functions and the demo's data.

    python docs/pictures/draw.py [DIRECTORY]       writes the SVG files beside this script, or into the directory

    conversation.svg   the tokens of a conversation, and which of them are targets
    window.svg         a window of micro-batches, and the one optimizer step that it becomes
    packed.svg         what the positions of a packed sequence see
    memory.svg         the memory of a QLoRA step by part, from the plan of configs/gpu_12gb.py

The functions that draw take data, so notebooks draw their own examples with them. Pictures have a light background of
their own: they can be read in a light and in a dark page. The same source and matplotlib give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a clone is the installation; tests/shapes.py: published models

from nanoft.attention import causal_mask  # noqa: E402
from nanoft.batches import Batch, Sample, TokenDataset, collate  # noqa: E402
from nanoft.config.loading import load_file  # noqa: E402
from nanoft.data.chat_tokenizer import ChatTokenizer  # noqa: E402
from nanoft.models.families import decoder_config  # noqa: E402
from nanoft.runtime.device import Machine  # noqa: E402
from nanoft.training.memory_plan import Plan, Planner  # noqa: E402

DARK, GRAY, PALE, TARGET = "#24292f", "#6e7781", "#e7eaee", "#f4b860"
ADAPTER, WEIGHTS, OTHER, LEAK = "#0072b2", "#9aa5b1", "#cfd6dd", "#d55e00"
PAD = "#ffffff"
MONO, WIDE = 0.602, 1.9  # of a monospaced letter, of the font size: its width, and the height of a box
STYLE = {
    "svg.hashsalt": "nanoft",  # otherwise names of clip paths are random
    "svg.fonttype": "path",  # letters are shapes: the same width everywhere
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": DARK,
    "axes.labelcolor": DARK,
    "axes.edgecolor": GRAY,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


# --- A conversation and its target mask


def pieces(chat: ChatTokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token, a space shown as ␣."""
    return [chat.control.shown([int(i)], chat.decode).replace(" ", "␣").replace("\n", "⏎") for i in ids]


def draw_tokens(texts: Sequence[str], is_target: Sequence[bool], width: float = 700, size: float = 10) -> Figure:
    """Tokens in boxes, targets colored, wrapped to `width` points."""
    rows: list[list[tuple[float, float, str, bool]]] = [[]]
    x = left = 12.0
    for text, target in zip(texts, is_target, strict=True):
        wide = MONO * size * len(text) + 7
        if x + wide > width - left:
            rows.append([])
            x = left
        rows[-1].append((x, wide, text, bool(target)))
        x += wide + 2
    step = WIDE * size + 8
    height = len(rows) * step + 36
    figure, axes = canvas(width, height)
    for number, row in enumerate(rows):
        y = height - 4 - (number + 1) * step
        for x, wide, text, target in row:
            color = TARGET if target else PALE
            axes.add_patch(Rectangle((x, y), wide, WIDE * size, facecolor=color, edgecolor="none"))
            axes.text(x + wide / 2, y + WIDE * size / 2, plain(text), size=size, family="DejaVu Sans Mono", **MIDDLE)
    x = left
    for color, said in (
        (PALE, "read by the model, never predicted"),
        (TARGET, "targets: the loss is the mean of −log p over them"),
    ):
        axes.add_patch(Rectangle((x, 12), 12, 12, facecolor=color, edgecolor="none"))
        axes.text(x + 18, 18, said, va="center")
        x += 230
    return figure


def conversation() -> Figure:
    """The first record of the demo, as the tour has it."""
    config = load_file(ROOT / "configs" / "tiny.py")
    chat = ChatTokenizer.from_config(Path(config.model.name), config)
    sample = demo_samples(chat, 1)[0]
    return draw_tokens(pieces(chat, sample.ids.tolist()), sample.is_target.tolist(), width=700)


def demo_samples(chat: ChatTokenizer, count: int) -> list[Sample]:
    """The first conversations of the demo as samples."""
    with open(ROOT / "configs" / "tiny" / "conversations.jsonl", encoding="utf-8") as file:
        records = [json.loads(next(file)) for _ in range(count)]
    rendered = [item for n, r in enumerate(records) for item in chat.render_samples(r["messages"], n)]
    return chat.encode_now(rendered)


# --- Window, micro-batches, optimizer step


def draw_rows(axes: Any, batch: Batch, x: float, top: float, token: float = 1.3, row: float = 9.0) -> float:
    """The rows of a micro-batch as strips: prompt, targets, padding; returns the y below the last one."""
    height, width = batch.ids.shape
    kinds = np.zeros(height * width)  # 0 padding, 1 prompt, 2 target
    lengths = batch.samples.lengths
    kinds.reshape(height, width)[:] = np.arange(width) < lengths[:, None]
    kinds[(batch.target_positions + 1).numpy()] = 2
    for y, strip in enumerate(kinds.reshape(height, width)):
        edges = [0, *(np.flatnonzero(np.diff(strip)) + 1).tolist(), width]
        for start, end in itertools.pairwise(edges):
            color = (PAD, PALE, TARGET)[int(strip[start])]
            where = (x + start * token, top - (y + 1) * row), (end - start) * token, row - 2
            axes.add_patch(Rectangle(*where, facecolor=color, edgecolor=OTHER, linewidth=0.4))
    return top - height * row


def draw_window(micro_batches: Sequence[Batch]) -> Figure:
    """The micro-batches of a window, what each adds to the gradient, and the optimizer step."""
    total = sum(batch.target_tokens for batch in micro_batches)
    heights = [9.0 * len(batch.ids) + 26 for batch in micro_batches]
    height = sum(heights) + 62
    widest = max(batch.ids.shape[1] for batch in micro_batches)
    token = 230 / widest
    figure, axes = canvas(720, height)
    axes.text(14, height - 16, f"a window: {sum(len(b.ids) for b in micro_batches)} sequences", weight="bold", **LEFT)
    axes.text(290, height - 16, "forward and backward of each", weight="bold", **LEFT)
    axes.text(530, height - 16, "one optimizer step", weight="bold", **LEFT)
    top = height - 34
    for number, (batch, size) in enumerate(zip(micro_batches, heights, strict=True), start=1):
        rows, width = batch.ids.shape
        n = batch.target_tokens
        counts = f"micro-batch {number}: {rows} x {width}, {n} targets"
        axes.text(14, top - 6, counts, color=GRAY, size=8, **LEFT)
        bottom = draw_rows(axes, batch, 14, top - 14, token)
        middle = (top - 14 + bottom) / 2
        box(axes, 290, middle - 13, 196, 26, f"g  +=  ∇ Σ over {n} targets of −log p  /  {total}", 8)
        arrow(axes, (18 + width * token, middle), (288, middle))
        arrow(axes, (488, middle), (528, (height - 30) / 2 + 8))
        top -= size
    middle = (height - 30) / 2 + 8
    box(axes, 530, middle - 30, 176, 60, "clip g, then AdamW:\nm, v, and w change once", 9)
    axes.text(14, 20, "divided by the targets of the whole window: every token weighs", color=DARK, size=8, **LEFT)
    axes.text(14, 9, "the same, however the window is cut into micro-batches", color=DARK, size=8, **LEFT)
    x = 330
    for color, said in ((PALE, "prompt"), (TARGET, "targets"), (PAD, "padding")):
        axes.add_patch(Rectangle((x, 9), 12, 10, facecolor=color, edgecolor=OTHER, linewidth=0.4))
        axes.text(x + 17, 14, said, size=8, **LEFT)
        x += 70
    return figure


def window() -> Figure:
    """Twelve conversations of the demo, in three micro-batches of four."""
    config = load_file(ROOT / "configs" / "tiny.py")
    chat = ChatTokenizer.from_config(Path(config.model.name), config)
    samples = TokenDataset.of(sorted(demo_samples(chat, 12), key=lambda sample: len(sample.ids)))
    places = [np.array([at]) for at in range(len(samples))]
    return draw_window([collate(samples, places[at : at + 4], chat.pad_id) for at in range(0, 12, 4)])


# --- What a packed sequence sees


def draw_mask(
    axes: Any, seen: torch.Tensor, ends: Sequence[int], title: str, leaks: torch.Tensor | None = None
) -> None:
    """Which keys (columns) a query (row) sees, (q, k) bool; `ends` of documents; `leaks` in another color."""
    colors = np.ones((*seen.shape, 3))
    colors[seen.numpy()] = mpl.colors.to_rgb(ADAPTER)
    if leaks is not None:
        colors[leaks.numpy()] = mpl.colors.to_rgb(LEAK)
    axes.imshow(colors, interpolation="nearest")
    for edge in [0, *ends]:
        axes.axhline(edge - 0.5, color=GRAY, linewidth=0.7)
        axes.axvline(edge - 0.5, color=GRAY, linewidth=0.7)
    axes.set_xticks([]), axes.set_yticks([])
    axes.set_title(title, size=9)
    axes.set_xlabel("key", labelpad=12)
    axes.set_ylabel("query")


def packed_row(lengths: Sequence[int], width: int) -> Batch:
    """One row of documents with these lengths, padded to `width` tokens."""
    samples = [Sample(np.ones(n, np.int32), np.arange(n) > 0, at) for at, n in enumerate(lengths)]
    return collate(TokenDataset.of(samples), [np.arange(len(samples))], 0, width)


def packed() -> Figure:
    """Three conversations in a row: the mask with documents, and what a causal mask alone would let through."""
    lengths, width = (5, 7, 4), 18
    batch = packed_row(lengths, width)
    ends = np.cumsum(lengths).tolist()
    inside = causal_mask(1, width, torch.device("cpu"), None, batch.documents)[0, 0]
    causal = causal_mask(1, width, torch.device("cpu"))[0, 0]
    figure = plt.figure(figsize=(7.4, 4.2))
    left, right = (figure.add_axes((x, 0.17, 0.40, 0.40 * 7.4 / 4.2)) for x in (0.06, 0.56))
    draw_mask(left, causal, ends, "causal mask alone: conversations leak", causal & ~inside)
    draw_mask(right, inside, ends, "data.packing=true: each sees only itself")
    assert batch.positions is not None
    positions = " ".join(map(str, batch.positions[0].tolist()))
    figure.text(0.56, 0.03, f"positions  {positions}", family="DejaVu Sans Mono", size=7.5)
    for axes in (left, right):
        for number, (end, n) in enumerate(zip([*ends, width], [*lengths, width - sum(lengths)], strict=True), start=1):
            name = f"{number}" if number <= len(lengths) else "pad"
            axes.text(end - n / 2 - 0.5, width - 0.2, name, size=7, ha="center", va="top", color=GRAY)
    return figure


# --- Memory


PARTS = {  # of the plan: what they are called in the picture, and their color
    "process": ("kernels", OTHER),
    "linears": ("weights of the linears", WEIGHTS),
    "head, embedding": ("head, embedding", "#7b8794"),
    "adapters": ("adapters", ADAPTER),
    "gradients": ("their gradients", "#56b4e9"),
    "optimizer": ("AdamW's moments", "#009e73"),
    "activations": ("activations", TARGET),
    "backward": ("backward of a block", LEAK),
}


def plan(**changes: Any) -> tuple[Plan, int]:
    """The plan of configs/gpu_12gb.py with changes, on that GPU, and how many blocks it recomputes."""
    from shapes import SHAPES

    config = load_file(ROOT / "configs" / "gpu_12gb.py").override(changes)
    machine = Machine(torch.device("cuda"), torch.bfloat16, (config.system.memory_gb or 0) * 1e9, present=False)
    planner = Planner.of(config, machine, decoder_config(SHAPES[config.model.name]))
    found = planner.choose_activations(config.micro_batch_rows(), config.model.max_seq_length)
    return found, sum(kept != "all" for kept in found.keep)


def draw_plans(plans: dict[str, Plan], gpu: float) -> Figure:
    """A bar for each plan, cut into parts in GB; a line at 90 % of the GPU's memory."""
    figure = plt.figure(figsize=(7.4, 0.5 * len(plans) + 1.3))
    axes = figure.add_axes((0.25, 0.29, 0.71, 0.62))
    for row, found in enumerate(plans.values()):
        left = 0.0
        for name, (_, color) in PARTS.items():
            size = found.parts[name] / 1e9
            axes.barh(row, size, left=left, color=color, height=0.62, edgecolor="white", linewidth=0.5)
            if size > 0.9:
                axes.text(left + size / 2, row, f"{size:.1f}", size=8, **MIDDLE)
            left += size
        axes.text(left + 0.15, row, f"{found.peak / 1e9:.1f} GB", va="center", weight="bold")
    axes.axvline(0.9 * gpu, color=DARK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(0.9 * gpu, -0.75, f"90 % of {gpu:.0f} GB", size=8, ha="center")
    axes.set_yticks(range(len(plans)), plans)
    axes.set_ylim(len(plans) - 0.5, -0.55)
    axes.set_xlim(0, 1.12 * max(found.peak for found in plans.values()) / 1e9)
    axes.set_xlabel("GB", labelpad=1)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for _, color in PARTS.values()]
    names = [name for name, _ in PARTS.values()]
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False, fontsize=8, handlelength=1.2)
    return figure


def memory() -> Figure:
    """Mistral-7B, one sequence of 2,048 tokens: 4 bits with and without recomputed blocks, and 16 bits."""
    kept, _ = plan(**{"training.checkpointing": "none"})
    some, recomputed = plan()
    full, blocks = plan(**{"training.checkpointing": "full"})
    lora, _ = plan(**{"training.checkpointing": "none", "quantization.bits": 16})
    plans = {
        "LoRA, 16 bits": lora,
        "QLoRA, 4 bits": kept,
        f"QLoRA, {recomputed} of {blocks}\nblocks recomputed": some,
        "QLoRA, all\nblocks recomputed": full,
    }
    return draw_plans(plans, 12)


# --- What they share

MIDDLE: dict[str, Any] = {"ha": "center", "va": "center"}
LEFT: dict[str, Any] = {"ha": "left", "va": "center"}


def canvas(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of width x height points, and axes over all of it with points as units."""
    figure = plt.figure(figsize=(width / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width), axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes: Any, x: float, y: float, width: float, height: float, text: str, size: float) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=4", facecolor="#f6f8fa")
    shape.set(edgecolor=GRAY, linewidth=0.8)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, size=size, **MIDDLE)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=GRAY, linewidth=0.9))


def plain(text: str) -> str:
    """matplotlib reads `$...$` as a formula."""
    return text.replace("$", r"\$")


PICTURES = {"conversation": conversation, "window": window, "packed": packed, "memory": memory}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documents.")
    parser.add_argument("directory", nargs="?", type=Path, default=HERE)
    directory = parser.parse_args(argv).directory
    mpl.use("Agg")
    with mpl.rc_context(STYLE):
        for name, make in PICTURES.items():
            path = directory / f"{name}.svg"
            make().savefig(path, metadata={"Date": None, "Creator": None})
            print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
