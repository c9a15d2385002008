"""The training and validation samples of a run, built from files and cached.

Tokenizing a million records takes minutes, so it is done once (`builder.py`). The result is stored under a hash of all
that it depends on: the contents of the files, the tokenizer, the template and its date, the settings, and the code that
makes the samples. A cache entry is built in a temporary directory, gets a manifest with a hash of each file, and is
renamed into place; an entry that does not match its manifest is rebuilt. Without a writable cache the data is built for
this process only. The token ids are memory-mapped, and unchanged files are not hashed again, so opening one is fast.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers

from nanoft import UserError, batches
from nanoft.batches import Array, TokenDataset
from nanoft.checkpoint import MANIFEST
from nanoft.config import DataConfig
from nanoft.config.functions import source_file
from nanoft.data.builder import PERCENTILES, REPORT, TOKENS, DatasetBuilder
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import Conversation, Learns, format_function, read_file
from nanoft.data.sources import Log, find_files, read_raw
from nanoft.io import untrusted
from nanoft.io.atomic import cache_home, hash_files
from nanoft.io.tables import markdown_table

NOT_IN_KEY = ("packing", "group_by_length", "pad_to_multiple_of")  # they affect batches, not samples
MAX_ENTRIES = 16  # the least recently used ones are deleted
LENGTH_BIAS = 0.1  # warn if the share of longer chosen answers exceeds one half by this much
STALE_AFTER = 86400  # seconds after which an unfinished build is deleted


@dataclass(frozen=True)
class PreparedDataset:
    """The tokenized samples of a run, and where each came from."""

    training: TokenDataset
    validation: TokenDataset
    report: dict[str, Any]
    directory: Path  # in the cache
    files: list[Path]
    record_file: Array  # (records,) index into `files`
    record_line: Array  # (records,)
    truncated: Array  # which samples were truncated
    used_ids: Array  # token ids that occur, ascending
    data: DataConfig  # how the files were read
    learns: Learns = "turns"
    from_cache: bool = False  # rather than built now

    def conversations(self, samples: TokenDataset) -> Iterator[Conversation]:
        """The conversations that samples came from, in the order of the files, read again as they are needed."""
        return (conversation for _, conversation in self._read(np.unique(samples.records).tolist()))

    def field_values(self, samples: TokenDataset, name: str) -> list[str]:
        """The value of a field in the record of each sample; `(none)` where it is missing."""
        found, fields = dict[int, str](), dict[str, None]()
        for file, records in self._lines(samples.records.tolist()):
            for line, record in read_raw(file, self.data.delimiter):
                if line in records and isinstance(record, dict):
                    fields |= dict.fromkeys(record)
                    if record.get(name) is not None:
                        found[records[line]] = str(record[name])
        if not found:
            raise UserError(f"evaluation.by_field: {name}: no record has this field: choose from {', '.join(fields)}")
        return [found.get(record, "(none)") for record in samples.records.tolist()]

    def untruncated(self, samples: TokenDataset) -> TokenDataset:
        """The samples that were not truncated: training did not see the whole prompts of the others."""
        return samples[~np.isin(samples.chosen, self.truncated)]

    def location(self, record: int) -> str:
        return f"{self.files[self.record_file[record]]}:{self.record_line[record]}"

    def _lines(self, records: list[int]) -> Iterator[tuple[Path, dict[int, int]]]:
        """Each file with its part of the records, as line -> record."""
        numbers = np.array(records, np.int64)
        for number, file in enumerate(self.files):
            own = numbers[self.record_file[numbers] == number]
            if len(own):
                yield file, dict(zip(self.record_line[own].tolist(), own.tolist(), strict=True))

    def _read(self, records: list[int]) -> Iterator[tuple[int, Conversation]]:
        for file, lines in self._lines(records):
            for item in read_file(file, self.data, only=set(lines), learns=self.learns):
                if isinstance(item, Conversation):
                    yield lines[item.line], item


def build_datasets(
    data: DataConfig, tokenizer: ChatTokenizer, max_length: int, seed: int, log: Log, learns: Learns = "turns"
) -> PreparedDataset:  # fmt: skip
    """Read, tokenize and split the files of a config, or load the result from the cache."""
    parts = _parts(data, log)
    files = [file for part in parts for file in part]

    def build(directory: Path) -> None:
        DatasetBuilder(directory, data, tokenizer, max_length, seed, learns).build(parts)

    settings = {name: value for name, value in dataclasses.asdict(data).items() if name not in NOT_IN_KEY}
    # An edit of the code that makes the samples must invalidate the cache.
    code = [*sorted(Path(__file__).parent.glob("*.py")), Path(batches.__file__), Path(untrusted.__file__)]
    versions = [tokenizers.__version__, jinja2.__version__, hash_files(code)]
    content = [list(map(str, files)), data_hash(data, files)]
    depends_on = [versions, settings, max_length, seed, content, tokenizer.fingerprint(), learns]
    entry, from_cache = load_or_build(json.dumps(depends_on, sort_keys=True, default=str), build, log)
    arrays = {path.stem: np.load(path) for path in entry.glob("*.npy")}
    shared = np.memmap(entry / TOKENS, dtype=np.int32, mode="r"), arrays["starts"], arrays["records"]
    kind = arrays["labels"], 2 if learns == "pairs" else 1
    training, validation = (TokenDataset(*shared, arrays[name], *kind) for name in ("training", "validation"))
    report = json.loads((entry / REPORT).read_text(encoding="utf-8"))
    origin: dict[str, Any] = {"data": data, "learns": learns, "from_cache": from_cache}
    origin |= {name: arrays[name] for name in ("record_file", "record_line", "truncated", "used_ids")}
    return PreparedDataset(training, validation, report, entry, files, **origin)


def data_provenance(data: DataConfig) -> dict[str, Any]:
    """What a run records about its data: the hash of all files, and the number of files in each part."""
    parts = _parts(data)
    files = [file for part in parts for file in part]
    return {"data_sha256": data_hash(data, files), "data_files": [len(part) for part in parts]}


def data_hash(data: DataConfig, files: list[Path] | None = None) -> str:
    """One hash of the contents of all data files (`files`, if already found) and of a format function's source."""
    hashed, function = files or [file for part in _parts(data) for file in part], format_function(data.format)
    if function is not None and (source := source_file(function)) is not None:
        hashed = [*hashed, source]
    return hash_files(hashed)


def _parts(data: DataConfig, log: Log = lambda line: None) -> list[list[Path]]:
    """The files of each part of train_file, and then those of validation_file."""
    parts = find_files(data.train_file, "data.train_file", log)
    if data.weights and len(data.weights) != len(parts):
        raise UserError(f"data.weights: {len(data.weights)} weights for {len(parts)} files: give one per file")
    if data.validation_file is None:
        return parts
    held_out = find_files(data.validation_file, "data.validation_file", log)
    return [*parts, [file for part in held_out for file in part]]


def load_or_build(key: str, build: Callable[[Path], None], log: Log) -> tuple[Path, bool]:
    """The cache entry of a key, and whether it existed; if not, `build(directory)` creates it."""
    home = cache_home()
    entry = home / hashlib.sha256(key.encode()).hexdigest()[:32]
    try:
        found = _is_intact(entry)
        if not found:
            if os.path.lexists(entry):
                log(f"warning: {entry}: the cached data is damaged: rebuilding it")
            try:
                home.mkdir(parents=True, exist_ok=True)
                temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=home))
            except OSError as error:
                log(f"warning: {home}: the cache is not writable ({error.strerror}): the data is not cached")
                entry = Path(tempfile.mkdtemp(prefix="nanoft-")) / entry.name  # by which ranks compare their data
                atexit.register(shutil.rmtree, entry.parent, ignore_errors=True)
                entry.mkdir()
                build(entry)
                return entry, False
            try:
                build(temporary)
                (temporary / MANIFEST).write_text(hash_entry(temporary), encoding="utf-8")
                if not _is_intact(entry):  # otherwise another process has built it meanwhile
                    shutil.rmtree(entry, ignore_errors=True)
                    os.rename(temporary, entry)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _prune(home, entry)
        with contextlib.suppress(OSError):  # the cache may belong to another user
            os.utime(entry)  # mark as used
    except OSError as error:
        raise UserError(f"{home}: the cache cannot be written ({error.strerror}): set XDG_CACHE_HOME") from None
    return entry, found


def hash_entry(entry: Path) -> str:
    """One hash over the names and contents of the files of a cache entry, besides its manifest."""
    files = sorted(path for path in entry.iterdir() if path.name != MANIFEST)
    return " ".join([hash_files(files), *(file.name for file in files)])


def _is_intact(entry: Path) -> bool:
    try:
        return (entry / MANIFEST).read_text(encoding="utf-8") == hash_entry(entry)
    except (OSError, ValueError, UserError):
        return False


def _prune(home: Path, newest: Path) -> None:
    """Delete the least recently used entries, and the leftovers of builds that were killed."""
    used: dict[Path, float] = {}  # directory -> when it was last used
    for path in home.iterdir():
        with contextlib.suppress(OSError):  # another process may delete or rename it meanwhile
            used |= {path: path.stat().st_mtime} if path.is_dir() else {}
    builds = {path for path in used if path.name.startswith(".tmp-")}
    entries = sorted(used.keys() - builds, key=used.__getitem__, reverse=True)
    stale = [path for path in builds if time.time() - used[path] > STALE_AFTER]
    for path in [*entries[MAX_ENTRIES:], *stale]:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)


def describe_data(report: dict[str, Any]) -> list[str]:
    """The report as lines for the terminal: files, warnings and a table of both sides of the split."""
    lines = [f"data      read {f['records']:,} records ({f['shape']}) from {f['file']}" for f in report["files"]]
    lines += [f"warning: {reason}: rejected" for reason in report["first_malformed"]]
    lines += [f"warning: {note}: {count:,} records, first {first}" for note, count, first in report["notes"]]
    if report["chunked_texts"]:
        what = f"texts longer than model.max_seq_length={report['max_seq_length']} became {report['chunks']:,} samples"
        lines.append(f"data      {report['chunked_texts']:,} {what} (data.chunk)")
    if report["held_out"]:
        lines.append(f"{'data      ' if report['validation']['records'] else 'warning: '}{report['held_out']}")
    if report["shared_prompts"]:
        why = " (data.leaks=warn)" if report["leaks"] == "warn" else ", since that prompt is frequent"
        what = f"training records share the prompt of a validation record: kept{why}"
        lines.append(f"warning: {report['shared_prompts']:,} {what}")
    if report["near_leaks"]:
        what = "training prompts are near duplicates of validation prompts: set data.near_leaks=remove to remove them"
        lines.append(f"warning: {report['near_leaks']:,} {what}")
    pairs, bias = report["training"].get("answers", {}).get("pairs", 0), report["training"].get("chosen_longer", 0)
    if pairs and bias - 0.5 > max(LENGTH_BIAS, pairs**-0.5):  # which is two standard errors
        what = f"the chosen answer is longer in {bias:.0%} of the pairs, so training will also prefer length"
        lines.append(f"warning: {what}: preference.loss=ipo and training.objective=simpo average over tokens")
    rows = [["records read", f"{report['read']:,}", ""]]
    rows += [[f"removed: {kind}", f"{count:,}", ""] for kind, count in report["removed"].items()]
    sides = [report["training"], report["validation"]]
    counted = ("records", "samples", "tokens", "target_tokens")
    rows += [[name.replace("_", " "), *(f"{side[name]:,}" for side in sides)] for name in counted]
    rows += [[name, *(f"{side['answers'][name]:,}" for side in sides)] for name in sides[0].get("answers", ())]
    if report.get("near_equal"):
        rows.append(["nearly equal pairs", f"{report['near_equal']:,}", ""])
    for p in PERCENTILES:
        lengths = [f"{side['length'][f'p{p}']:,}" if side["length"] else "-" for side in sides]
        rows.append(["longest" if p == 100 else f"length, {p} %", *lengths])
    for value in dict.fromkeys(value for side in sides for value in side.get("strata", {})):
        shares = [f"{side['strata'].get(value, 0) / max(side['records'], 1):.1%}" for side in sides]
        rows.append([f"share of {value}", *shares])
    if "steps" in report:  # in a training run
        rows.append(["steps per epoch", f"{report['steps_per_epoch']:,}", ""])
        rows.append(["steps, epochs", f"{report['steps']:,}, {report['epochs']:.3g}", ""])
    if report["truncated"]:
        inside = f", {report['answers_cut']:,} inside an answer" if report["answers_cut"] else ""
        rows.append([f"truncated ({report['truncation']})", f"{report['truncated']:,}{inside}", ""])
    lost = {"samples_lost": "samples skipped", "target_tokens_lost": "target tokens lost to length"}
    rows += [[label, f"{report[name]:,}", ""] for name, label in lost.items() if report[name]]
    return [*lines, markdown_table(["", "training", "validation"], rows)]
