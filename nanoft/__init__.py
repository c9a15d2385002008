"""nanoft: fine-tune causal language models in a handful of files that one person can read in an afternoon."""

__version__ = "0.1.0"


class UserError(Exception):
    """A mistake that the user can fix: commands print it in one line (what, where, the fix) and exit with code 2."""


class TrainingFailed(Exception):
    """Training failed and cannot continue: commands print the cause and the fix in one line and exit with code 3."""
