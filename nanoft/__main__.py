"""Commands that are not one of the three scripts: `python -m nanoft chat|doctor|compare|plot`."""

from __future__ import annotations

import sys

from nanoft import UserError
from nanoft.runtime.command import command


@command
def main(argv: list[str]) -> int:
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name == "chat":
        from nanoft.generation import generate

        return generate.main(rest)
    if name == "doctor":
        from nanoft.training import doctor

        return doctor.main(rest)
    if name == "compare":
        from nanoft.tracking import compare

        return compare.main(rest)
    if name == "plot":
        from nanoft.tracking import plots

        return plots.main(rest)
    raise UserError(f"python -m nanoft: {name or 'no command'}: the commands are chat, doctor, compare, plot")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
