"""configs/h100.py with adapters of rank 64: is there more to learn than rank 16 can hold?

For whoever read in a report that the adapters used their full rank. rsLoRA scales the update by 16 / sqrt(64) = 2, as
h100.py does by 32 / 16 = 2, so that only the rank differs. Planned, not measured: 70.4 GB, 26.4 GB with
checkpointing=full, 33 GFLOP per token. Change first: `lora.rank=128` with `lora.alpha=22.6`, and compare validation
losses.
"""

from nanoft.config import load_file

config = load_file("../h100.py", beside=__file__).override(lora={"rank": 64, "alpha": 16.0, "rslora": True})
