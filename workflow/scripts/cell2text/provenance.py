"""Hashes and versions that identify the code and the files behind a result."""

import ast
import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def library_version(script: str, package: Path = PACKAGE) -> str:
    """Return a short hash of all package modules that a script imports, directly or indirectly.

    Snakemake detects changes of the script but not of its imports, so each rule has this hash as a parameter. The
    hash is that of the syntax trees, so comments and formatting do not matter.

    Parameters
    ----------
    script
        Name of a script in the folder that contains the package.
    package
        Folder of the package.
    """
    found: dict[str, str] = {}
    waiting = list(_imported_modules(ast.parse((package.parent / script).read_text()), package.name))
    while waiting:
        module = waiting.pop()
        path = _module_file(module, package)
        if module in found or path is None:
            continue
        tree = ast.parse(path.read_text())
        found[module] = ast.dump(tree)
        if path.name == "__init__.py":
            # templates and style sheets in the package
            others = sorted(other for other in path.parent.iterdir() if other.is_file() and other.suffix != ".py")
            found |= {f"{module}/{other.name}": hash_file(other) for other in others}
        waiting.extend(_imported_modules(tree, package.name))
    return hash_text(json.dumps(sorted(found.items())))[:12]


def _imported_modules(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the dotted names under ``package`` that a module imports; imported names may be modules, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            yield node.module or package
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == package)


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
