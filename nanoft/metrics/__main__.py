"""The former name of `python -m nanoft compare`."""

from nanoft.runtime.command import renamed

if __name__ == "__main__":
    renamed("nanoft.metrics", "compare")
