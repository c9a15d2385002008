"""The former name of `python -m nanoft doctor`."""

from nanoft.runtime.command import renamed

if __name__ == "__main__":
    renamed("nanoft.runtime", "doctor")
