"""The demo of KTO: configs/tiny_dpo.py from single answers, each marked as good or bad, instead of pairs.

For whoever has thumbs up and thumbs down, which need no second answer to the same prompt. The data is the same: each
pair gives a good answer and a bad one. Try next: `preference.desirable_weight=1.33`, or your own records with `prompt`,
`completion` and `label`: docs/preference.md.
"""

from nanoft.config import load_file

config = load_file("tiny_dpo.py", beside=__file__).override(training={"objective": "kto", "micro_batch_size": 16})
