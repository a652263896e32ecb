"""Files of the project, as several tests read them."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load(path):
    """Return a Python file of the project that belongs to no package as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bodies_of_rules():
    """Return the text of each rule, by name."""
    return {
        name: body
        for path in sorted((ROOT / "workflow/rules").glob("*.smk"))
        for name, body in re.findall(r"^rule (\w+):\n((?:\n|    .*\n)+)", path.read_text(), re.MULTILINE)
    }
