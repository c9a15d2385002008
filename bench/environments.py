"""Make the environments of the peers whose pins exclude one another.

    python bench/environments.py DIRECTORY             DIRECTORY/trl and DIRECTORY/unsloth, about 3 GB
    python bench/step.py --shape all --environments DIRECTORY

The versions are those that were measured (bench/step.md). nanoft itself is read from this checkout.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

SHARED = "torch==2.13.* bitsandbytes numpy psutil safetensors tokenizers tqdm peft==0.21.* accelerate".split()  # noqa: SIM905
# Lists of packages, each installed by a pip command of its own: unsloth pins versions that it does not need on a CPU.
FOR_UNSLOTH = (
    "transformers==5.17.0 trl<=1.15.0 datasets<5 triton torchao einops cut_cross_entropy msgspec tyro hf_transfer"
)
FOR_UNSLOTH += " sentencepiece protobuf pillow diffusers structlog json5 nest-asyncio rich typer pydantic"
PEERS: dict[str, list[list[str]]] = {
    "trl": [[*SHARED, "transformers==5.24.*", "trl==1.16.*", "datasets"]],
    "unsloth": [[*SHARED, *FOR_UNSLOTH.split()], ["--no-deps", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9"]],
}


def python_of(environment: Path) -> Path:
    return environment / "bin" / "python"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", choices=list(PEERS), help="one of them")
    args = parser.parse_args(argv)
    for peer, installs in PEERS.items():
        if args.only in (None, peer):
            venv.create(args.directory / peer, with_pip=True)
            for packages in installs:
                command = [str(python_of(args.directory / peer)), "-m", "pip", "install", "--quiet", *packages]
                subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
