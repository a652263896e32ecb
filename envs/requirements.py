"""Write requirements.txt: the pins of envs/*.yaml, then their dependencies as installed.

`make requirements` runs it in the virtual environment whose versions are to be locked.
"""

import re
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import yaml

ENVS = Path(__file__).parent
REQUIREMENTS = ENVS.parent / "requirements.txt"
# Installers are not locked, nor are the CUDA libraries, which come only with torch's wheel for GPUs.
NOT_LOCKED = re.compile(r"(pip|setuptools|wheel|uv|triton|(cuda|nvidia)-.*)")


def normal_name(name: str) -> str:
    """Return a package name as normalised by PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named_pins() -> dict[str, str]:
    """Return the version of each package that an environment file pins.

    Raises
    ------
    SystemExit
        If two files pin different versions of a package, or a pin is not exact.
    """
    pins: dict[str, tuple[str, str]] = {}
    for path in sorted(ENVS.glob("*.yaml")):
        dependencies = yaml.safe_load(path.read_text())["dependencies"]
        for pin in next(entry["pip"] for entry in dependencies if isinstance(entry, dict)):
            name, exact, version = pin.partition("==")
            if not exact:
                sys.exit(f"envs/{path.name}: {pin} is not exact; write it as name==version")
            earlier, file = pins.setdefault(normal_name(name), (version, path.name))
            if earlier != version:
                sys.exit(f"envs/{path.name}: {pin}: envs/{file} pins {earlier}; pin the same version in both")
    return {name: version for name, (version, _) in sorted(pins.items())}


def installed() -> dict[str, str]:
    """Return the version of each installed package, without local suffixes such as ``+cpu``."""
    names = {normal_name(d.metadata["Name"]) for d in distributions()}
    return {name: version(name).split("+")[0] for name in sorted(names)}


def render() -> str:
    """Return the text of requirements.txt."""
    named = named_pins()
    dependencies = {k: v for k, v in installed().items() if k not in named and not NOT_LOCKED.fullmatch(k)}
    lines = ["# Written by `make requirements` from envs/*.yaml. Edit those instead.", "", "# named in envs/"]
    lines += [f"{name}=={version}" for name, version in named.items()]
    lines += ["", "# what those need, as installed when this file was written"]
    lines += [f"{name}=={version}" for name, version in dependencies.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    REQUIREMENTS.write_text(render())
