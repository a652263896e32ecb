"""Reading of safetensors files, with damage and values that are not finite reported in one line."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cell2text.errors import InputError
from cell2text.files import reading


def read_weights(path: str | Path, fix: str, framework: str = "pt") -> dict[str, Any]:
    """Return the tensors of a safetensors file by name.

    Parameters
    ----------
    path
        The file.
    fix
        What the user should do if it is damaged.
    framework
        ``"pt"`` for torch tensors, ``"numpy"`` for arrays.

    Raises
    ------
    InputError
        If the file is missing, damaged, or has a value that is not finite.
    """
    return dict(_stream(path, fix, framework))


def check_weights(path: str | Path, fix: str) -> None:
    """Raise an ``InputError`` as :func:`read_weights` does, with one tensor in memory at a time."""
    for _ in _stream(path, fix, "pt"):
        pass


def check_finite(tensors: Mapping[str, Any], path: str | Path, fix: str) -> None:
    """Raise an ``InputError`` if a tensor (torch or numpy) has a value that is not finite."""
    for name, tensor in tensors.items():
        if "float8" in str(tensor.dtype):  # torch cannot test these for being finite
            tensor = tensor.float()
        finite = tensor.isfinite() if hasattr(tensor, "isfinite") else abs(tensor) < float("inf")
        if not finite.all():
            raise InputError(path, f"{name} has values that are not finite", fix)


def _stream(path: str | Path, fix: str, framework: str) -> Iterator[tuple[str, Any]]:
    from safetensors import safe_open

    with reading(path, fix), safe_open(path, framework=framework) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dictionary
            tensor = opened.get_tensor(name)
            check_finite({name: tensor}, path, fix)
            yield name, tensor
