"""configs/h100.py for 20 steps on 500 records: does everything work, before it runs for hours?

For whoever has new data or a new machine. Every part of a run happens: preflight, steps, evaluation, checkpoint,
report. Planned, not measured: 41.6 GB, and 19.8 GB with every block computed again, as in the long run. Time: 32.2
GFLOP a token; tokens a second: not measured. Change first: nothing; when it is through, run configs/h100.py.
"""

from pathlib import Path

from nanoft.config import load_file

config = load_file(Path(__file__).parent.parent / "h100.py").override(
    {
        "data.max_samples": 500,
        "training.max_steps": 20,
        "training.log_steps": 1,
        "training.eval_steps": 10,
        "training.save_steps": 10,
        "evaluation.max_samples": 50,
        "evaluation.prompts": 10,
    }
)
