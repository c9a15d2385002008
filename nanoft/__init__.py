"""nanoft: fine-tune causal language models in a handful of files that one person can read in an afternoon."""

import sys

__version__ = "0.1.0"
# Former commands, `python -m OLD`. While -m looks for a module, and imports its package, argv[0] is "-m".
FORMER = {"nanoft.generate": "chat", "nanoft.runtime": "doctor", "nanoft.metrics": "compare", "nanoft.curves": "plot"}
if sys.argv[:1] == ["-m"] and (old := sys.orig_argv[-len(sys.argv)].removeprefix("-m")) in FORMER:
    print(f"error: python -m {old} was renamed: use python -m nanoft {FORMER[old]}", file=sys.stderr)
    sys.exit(2)


class UserError(Exception):
    """A mistake that the user can fix: commands print it in one line (what, where, the fix) and exit with code 2."""


class TrainingFailed(Exception):
    """Training failed and cannot continue: commands print the cause and the fix in one line and exit with code 3."""
