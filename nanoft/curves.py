"""The former name of `python -m nanoft plot`."""

from nanoft.runtime.command import renamed

if __name__ == "__main__":
    renamed("nanoft.curves", "plot")
