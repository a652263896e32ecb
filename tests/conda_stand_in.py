"""A stand-in for conda: answers what Snakemake asks, and makes environments that use the Python of the tests."""

import json
import shutil
import sys
from pathlib import Path

BASE = Path(__file__).parent / "base"  # the test copies this file next to its own base
PYTHON = """#!/bin/sh
echo "{prefix} $*" >> '{log}'
exec '{python}' "$@"
"""


def create(file: Path, prefix: Path) -> None:
    """Make an environment whose Python notes each call before it hands it on."""
    (prefix / "bin").mkdir(parents=True)
    shutil.copy(file, prefix / "environment.yaml")
    python = prefix / "bin/python"
    python.write_text(PYTHON.format(prefix=prefix, log=BASE / "calls", python=sys.executable))
    python.chmod(0o755)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["info", "--json"]:
            print(json.dumps({"conda_prefix": str(BASE), "platform": "linux-64"}))
        case ["--version"]:
            print("conda 25.1.0")
        case ["config", "--get", "channel_priority", "--json"]:
            print(json.dumps({"get": {"channel_priority": "strict"}}))
        case ["env", "create", "--quiet", "--no-default-packages", "--file", file, "--prefix", prefix]:
            create(Path(file), Path(prefix))
        case ["clean", *_]:
            pass
        case _:
            sys.exit(f"conda was asked: {arguments}")


if __name__ == "__main__":
    main(sys.argv[1:])
