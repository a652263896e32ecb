"""The folder of a tiny run, as several tests of the workflow use it."""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]


def new_folder(folder, tiny_model):
    """Copy what the tiny run needs into a new folder, and return it."""
    shutil.copytree(ROOT / "config", folder / "config")
    shutil.copytree(ROOT / "resources", folder / "resources", ignore=shutil.ignore_patterns("models"))
    shutil.copy(ROOT / "tests/config/tiny.yaml", folder / "tiny.yaml")
    shutil.copytree(tiny_model, folder / "tiny-model")
    return folder
