"""configs/h100.py with adapters of rank 64: is there more to learn than rank 16 can hold?

For whoever read in a report that every direction of the adapters was used. rsLoRA scales the update by alpha /
sqrt(64) = 2, as alpha / 16 = 2 does there, so that nothing but the rank differs. Planned, not measured: 43.8 GB, and
21.8 GB with every block computed again. Time: 33 GFLOP a token; tokens a second: not measured. Change first:
`lora.rank=128` with `lora.alpha=22.6`, and compare the validation losses.
"""

from pathlib import Path

from nanoft.config import load_file

config = load_file(Path(__file__).parent.parent / "h100.py").override(
    {
        "lora.rank": 64,
        "lora.alpha": 16.0,
        "lora.rslora": True,
    }
)
