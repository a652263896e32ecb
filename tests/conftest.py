"""Fixtures that several tests share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Directory of a tiny real language model."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def in_float32():
    """Language models compute in float32, whatever this machine multiplies fastest; also those that a module shares."""
    import torch

    from cell2text.model import language_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "pick_precision", lambda device: torch.float32)
        yield
