"""The former name of `python -m nanoft chat`."""

from nanoft.runtime.command import renamed

if __name__ == "__main__":
    renamed("nanoft.generate", "chat")
