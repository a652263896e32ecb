"""Write requirements.txt: the pins of envs/*.yaml, then what those packages pull in.

Run by `make requirements` inside the virtual environment whose versions are to be locked.
"""

import re
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import yaml

ENVS = Path(__file__).parent
REQUIREMENTS = ENVS.parent / "requirements.txt"
# torch is named once, in envs/llm.yaml; the installer itself is no requirement.
NOT_LOCKED = {"pip", "setuptools", "wheel"}


def normal_name(name: str) -> str:
    """Return a package name in the one spelling of PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named_pins() -> dict[str, str]:
    """Return package -> version over all environment files.

    Raises
    ------
    SystemExit
        If two files pin one package at different versions, or a pin is not exact.
    """
    pins: dict[str, tuple[str, str]] = {}
    for path in sorted(ENVS.glob("*.yaml")):
        dependencies = yaml.safe_load(path.read_text())["dependencies"]
        for pin in next(entry["pip"] for entry in dependencies if isinstance(entry, dict)):
            name, exact, version = pin.partition("==")
            if not exact:
                sys.exit(f"envs/{path.name}: {pin}: write it as name==version")
            earlier, file = pins.setdefault(normal_name(name), (version, path.name))
            if earlier != version:
                sys.exit(f"envs/{path.name}: {pin}: envs/{file} pins {earlier}; make them agree")
    return {name: version for name, (version, _) in sorted(pins.items())}


def installed() -> dict[str, str]:
    """Return package -> version in this environment, local suffixes such as +cpu cut off."""
    names = {normal_name(d.metadata["Name"]) for d in distributions()}
    return {name: version(name).split("+")[0] for name in sorted(names)}


def render() -> str:
    """Return the text of requirements.txt."""
    named = named_pins()
    pulled = {k: v for k, v in installed().items() if k not in named and k not in NOT_LOCKED}
    lines = ["# Written by `make requirements` from envs/*.yaml. Edit those instead.", "", "# named in envs/"]
    lines += [f"{name}=={version}" for name, version in named.items()]
    lines += ["", "# what those need, as installed when this file was written"]
    lines += [f"{name}=={version}" for name, version in pulled.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    REQUIREMENTS.write_text(render())
