"""Speed and memory of making training samples from data: nanoft, datasets, and the tokenizers library that both use.

    python bench/data.py                              100,000 records, three rounds: 8 minutes on 2 cores
    python bench/data.py --records 1000000 --rounds 1 --near    everything: 40 minutes, 3 GB of disk
    python bench/data.py --packing a.json b.jsonl --tokenizer DIR    only the share of padding, on your own data

Every contender runs in a process of its own, one after another in each round, on the same file:

    nanoft       read, validate, deduplicate, render, encode, mask the targets, write the cache (near search off)
    opened       the same again: the cache is found, verified and mapped
    datasets     datasets.load_dataset("json") and .map with transformers' apply_chat_template: ids, no mask, no checks
    library      encode_batch of tokenizers on texts that are rendered already: the limit for any user of that library

Speeds are megabytes of the JSONL file per second. The results are written to bench/data.json and bench/data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoft.batches import Batches
from nanoft.config import DataConfig
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.dataset import build_datasets
from nanoft.data.inspection import utilization

HERE = Path(__file__).parent
LENGTH = 2048
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3's pattern for cutting text into words.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# ---- The data


def make_records(path: Path, count: int) -> None:
    """Chats of one or two exchanges, about 1.1 kB each, of invented words with natural frequencies (Zipf's law)."""
    chance = random.Random(0)
    consonants, vowels = "b c d f g h l m n p r s t v st tr pl".split(), "a e i o u ai ea ou".split()  # noqa: SIM905
    syllables = [a + b for a in consonants for b in vowels]
    words = sorted({"".join(chance.choices(syllables, k=chance.choice((1, 2, 2, 3, 3, 4)))) for _ in range(60_000)})
    chance.shuffle(words)
    totals, total = [], 0.0
    for rank in range(1, len(words) + 1):
        total += 1 / (rank + 2.7)
        totals.append(total)

    def text(low: int, high: int) -> str:
        drawn = chance.choices(words, cum_weights=totals, k=chance.randint(low, high))
        marks = [". " if n % 11 == 10 else ", " if n % 17 == 16 else " " for n in range(len(drawn))]
        return "".join(word + mark for word, mark in zip(drawn, marks, strict=True)).strip().capitalize() + "."

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            messages = []
            for _ in range(chance.choice((1, 1, 2))):
                messages.append({"role": "user", "content": text(15, 50)})
                messages.append({"role": "assistant", "content": text(40, 120)})
            file.write(json.dumps({"messages": messages}) + "\n")


def make_tokenizer(directory: Path, data: Path) -> None:
    """A byte-level BPE of 32,000 tokens, like those of Llama 3 and Qwen, trained on the start of the data."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(f"{WORDS}|{REST}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    with open(data, encoding="utf-8") as file:
        lines = [line for line, _ in zip(file, range(20_000), strict=False)]
    tokenizer.train_from_iterator((m["content"] for line in lines for m in json.loads(line)["messages"]), trainer)
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


# ---- The contenders: each prints one line of JSON


def run_nanoft(work: Path, near_duplicates: float | None = None, leaks: str = "ignore") -> dict[str, Any]:
    started = time.perf_counter()
    chat = ChatTokenizer(work / "model")
    near: dict[str, Any] = {"near_duplicates": near_duplicates, "near_leaks": leaks}
    data = DataConfig(train_file=str(work / "data.jsonl"), **near)
    corpus = build_datasets(data, chat, LENGTH, 0, print)
    return {"seconds": time.perf_counter() - started, "tokens": corpus.report["training"]["tokens"]}


def run_datasets(work: Path, processes: int) -> dict[str, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    files = str(work / "data.jsonl")
    with tempfile.TemporaryDirectory(dir=work) as cache:
        records = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)
        encoded = records.map(
            lambda record: {"ids": tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"]},
            remove_columns=records.column_names,
            num_proc=processes if processes > 1 else None,
        )
        return {"seconds": time.perf_counter() - started, "records": len(encoded)}


def run_library(work: Path, places: bool) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work / "model" / "tokenizer.json"))
    encode = tokenizer.encode_batch if places else tokenizer.encode_batch_fast
    seconds, read, batch = 0.0, 0, []
    with open(work / "data.jsonl", encoding="utf-8") as file:
        for line, _ in zip(file, range(100_000), strict=False):
            read += len(line.encode())
            said = json.loads(line)["messages"]
            batch.append("".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in said))
            if len(batch) == 128:
                started = time.perf_counter()
                encode(batch, add_special_tokens=False)
                seconds += time.perf_counter() - started
                batch = []
    return {"seconds": seconds, "bytes": read}


def run_batches(work: Path, packing: bool) -> dict[str, Any]:
    """Batches for a model that takes no time."""
    import torch

    torch.set_num_threads(1)
    chat = ChatTokenizer(work / "model")
    corpus = build_datasets(DataConfig(train_file=str(work / "data.jsonl")), chat, LENGTH, 0, print)
    run = Batches(corpus.training, 4, 4, 0, chat.pad_id, pack_length=LENGTH if packing else None)
    started, tokens, windows = time.perf_counter(), 0, 0
    while time.perf_counter() - started < 10 and windows < 3 * run.windows_in_epoch():
        tokens += sum(batch.tokens for batch in run.window(windows % run.windows_in_epoch()))
        windows += 1
    return {"seconds": time.perf_counter() - started, "tokens": tokens, "utilization": utilization(run)}


CONTENDERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "nanoft": run_nanoft,
    "opened": run_nanoft,
    "datasets, 1 process": lambda work: run_datasets(work, 1),
    "datasets, a process for each core": lambda work: run_datasets(work, os.cpu_count() or 1),
    "library, with places": lambda work: run_library(work, True),
    "library, ids only": lambda work: run_library(work, False),
    "nanoft, near leaks": lambda work: run_nanoft(work, None, "warn"),
    "nanoft, near leaks and duplicates": lambda work: run_nanoft(work, 0.8, "warn"),
    "batches": lambda work: run_batches(work, False),
    "packed batches": lambda work: run_batches(work, True),
}
IN_EACH_ROUND = list(CONTENDERS)[:6]
NEAR = ("nanoft, near leaks", "nanoft, near leaks and duplicates")


def measure(name: str, work: Path) -> dict[str, Any]:
    """One contender in a process of its own: seconds, and the peak memory of it or of one of its children."""
    cache = work / "cache"
    if name.startswith("nanoft"):
        shutil.rmtree(cache, ignore_errors=True)
    command = [sys.executable, __file__, "--contender", name, "--work", str(work)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_HOME": str(work / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-1000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    size = result.get("bytes", os.path.getsize(work / "data.jsonl"))
    return {**result, "mb_per_second": size / 1e6 / result["seconds"]}


def contend(name: str, work: Path) -> None:
    result = CONTENDERS[name](work)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({**result, "peak_rss_mb": max(peaks) / (1 if sys.platform != "darwin" else 1024) / 1024}))


# ---- Packing


def packing(files: list[Path], tokenizer: Path, length: int) -> list[str]:
    """Share of tokens that are not padding, packed and not, on real data: a table line for each file."""
    lines = []
    chat = ChatTokenizer(tokenizer)
    ways: list[dict[str, Any]] = [{}, {"group_by_length": True}, {"pack_length": length}]
    for file in files:
        corpus = build_datasets(DataConfig(train_file=str(file), validation_split=0.0), chat, length, 0, print)
        full = [f"{utilization(Batches(corpus.training, 4, 4, 0, chat.pad_id, **way)):.1%}" for way in ways]
        side = corpus.report["training"]
        cells = [file.name, f"{length:,}", f"{side['samples']:,}", f"{side['tokens']:,}", *full]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def print_packing(files: list[Path], tokenizer: Path) -> None:
    print("| data | length | samples | tokens | padded | grouped by length | packed |")
    print("|---" * 7 + "|")
    for length in (1024, 2048):
        print("\n".join(packing(files, tokenizer, length)))


# ---- The report


def summarize(rounds: list[dict[str, dict[str, Any]]], more: dict[str, Any], settings: dict[str, Any]) -> str:
    """A Markdown table: medians over the rounds, and the range of the ratios of the rounds."""
    size = f"{settings['records']:,} records, {settings['megabytes']:,.0f} MB of JSONL"
    lines = [
        f"# Data: {size}, rounds: {settings['rounds']}",
        "",
        f"{settings['machine']}; {settings['versions']}. Written by `bench/data.py`, which says what is compared.",
        "",
        "| | MB/s | seconds | peak memory, MB | speed of nanoft / this |",
        "|---|---|---|---|---|",
    ]
    for name in rounds[0]:
        results = [each[name] for each in rounds]
        ratios = [each["nanoft"]["mb_per_second"] / each[name]["mb_per_second"] for each in rounds]
        speed, seconds, peak = (
            f"{statistics.median(r[key] for r in results):,.{digits}f}"
            for key, digits in (("mb_per_second", 2), ("seconds", 1), ("peak_rss_mb", 0))
        )
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {speed} | {seconds} | {peak} | {ratio} |")
    lines.append("")
    for name, result in more.items():
        said = f"{result['mb_per_second']:.2f} MB/s, {result['seconds']:,.0f} s, peak {result['peak_rss_mb']:,.0f} MB"
        if "batches" in name:
            speed = f"{result['tokens'] / result['seconds'] / 1e6:.1f} M tokens/s"
            said = f"{speed} for a model that takes no time, {1 - result['utilization']:.1%} padding"
        lines.append(f"- {name}: {said}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--near", action="store_true", help="measure the near searches too")
    parser.add_argument("--out", type=Path, default=HERE / "data", help="without a suffix")
    parser.add_argument("--packing", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, default=HERE.parent / "configs" / "tiny" / "base")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args.contender, args.work)
    elif args.packing:
        print_packing(args.packing, args.tokenizer)
    else:
        run(args.records, args.rounds, args.near, args.out)


def run(records: int, count: int, near: bool, out: Path) -> None:
    import tokenizers

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_records(work / "data.jsonl", records)
        make_tokenizer(work / "model", work / "data.jsonl")
        rounds = []
        for number in range(count):
            rounds.append({name: measure(name, work) for name in IN_EACH_ROUND})
            print(f"round {number + 1}:", {k: round(r["mb_per_second"], 2) for k, r in rounds[-1].items()}, flush=True)
        more = {name: measure(name, work) for name in ("batches", "packed batches", *(NEAR if near else ()))}
        settings = {
            "records": records,
            "rounds": count,
            "megabytes": os.path.getsize(work / "data.jsonl") / 1e6,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": f"Python {platform.python_version()}, tokenizers {tokenizers.__version__}",
        }
    text = summarize(rounds, more, settings)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps({**settings, "each": rounds, "more": more}, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
