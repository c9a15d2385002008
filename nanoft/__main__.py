"""`python -m nanoft chat|doctor|compare|plot`: see nanoft/runtime/commands.py."""

import sys

from nanoft.runtime.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
