"""Hashes and versions that identify the code and the files behind a result."""

import ast
import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)  # may have a docstring


def library_version(script: str, encoder: str | None = None, package: Path = PACKAGE) -> str:
    """Return a short hash of a script and of all package modules that it imports, directly or indirectly.

    Snakemake does not see changes of imported modules, and takes any newer script for a changed one, even in a new
    clone. So each rule has this hash as a parameter, and the profiles switch the comparison of scripts off. The hash is
    that of the syntax trees without docstrings, so neither comments, docstrings nor formatting matter.

    Parameters
    ----------
    script
        Name of a script in the folder that contains the package.
    encoder
        The configured kind of encoder. Its module is imported by name, which the syntax tree does not show.
    package
        Folder of the package.
    """
    found = {}
    for module, path in {script: package.parent / script, **find_modules(script, encoder, package)}.items():
        found[module] = _read_code(path, path.stat().st_mtime_ns)[0]
        if path.name == "__init__.py":
            # templates and style sheets in the package
            others = sorted(other for other in path.parent.iterdir() if other.is_file() and other.suffix != ".py")
            found |= {f"{module}/{other.name}": hash_file(other) for other in others}
    return hash_text(json.dumps(sorted(found.items())))[:12]


def find_modules(script: str, encoder: str | None = None, package: Path = PACKAGE) -> dict[str, Path]:
    """Return name and file of all package modules that a script imports; see :func:`library_version`."""
    found: dict[str, Path] = {}
    waiting = _imported_modules(package.parent / script, package.name)
    while waiting:
        module = waiting.pop()
        path = _module_file(module, package)
        if module in found or path is None:
            continue
        found[module] = path
        waiting.extend(_imported_modules(path, package.name))
        if "." in module:  # Python runs the packages around a module first
            waiting.append(module.rpartition(".")[0])
        if encoder and module == f"{package.name}.embedding.encoders":
            waiting.append(f"{module}.{encoder}")
    return found


@cache
def _read_code(path: Path, time: int) -> tuple[str, list[str]]:
    """Return a hash of a file's code, and the dotted names that it imports; imported names may be modules.

    ``time`` is that of the last change, so that the many scripts that share a module read it once.
    """
    names: list[str] = []
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hash_text(ast.dump(tree)), names


def _imported_modules(path: Path, package: str) -> list[str]:
    return [name for name in _read_code(path, path.stat().st_mtime_ns)[1] if name.split(".")[0] == package]


@cache
def _module_file(module: str, package: Path) -> Path | None:
    base = package.parent / module.replace(".", "/")
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_config(config: dict[str, Any]) -> str:
    """Return the SHA-256 of a configuration, independent of the order of its keys."""
    return hash_text(json.dumps(config, sort_keys=True))


def versions(*packages: str) -> dict[str, str]:
    """Return the version of each installed package, skipping packages that are not installed."""
    found = {}
    for package in sorted(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
