"""A run in its own process: python whole_run.py ARGUMENTS OF train.py

Prints the peak of the process up to the last step, and what the memory plan says, in bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from whole_step import peak_bytes

import train

if __name__ == "__main__":
    peaks, finalize = list[float](), train.finalize

    def noting(*arguments: Any) -> int:
        peaks.append(peak_bytes())
        return finalize(*arguments)

    train.finalize = noting
    assert train.main(sys.argv[1:]) == 0
    directory = next(word.partition("=")[2] for word in sys.argv if word.startswith("output.dir="))
    events = map(json.loads, (Path(directory) / "metrics.jsonl").read_text().splitlines())
    parts = next(event["predicted_gb"] for event in events if "predicted_gb" in event)
    planned = 1e9 * (sum(parts.values()) - min(parts["backward"], parts["loss"]))
    print(json.dumps({"measured": peaks[0], "planned": planned, "parts": parts}))
