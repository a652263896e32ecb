"""No module makes a call that SECURITY.md excludes, and the tests that it names exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Calls that run code from data, or hand text to a shell.
REFUSED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "torch.hub.load",
}  # fmt: skip
# Arguments that must be this constant wherever they are given.
FIXED = {"shell": False, "trust_remote_code": False, "allow_pickle": False, "weights_only": True, "autoescape": True}
NEEDED = {"torch.load": "weights_only", "jinja2.Environment": "autoescape"}


def find_dangers(code):
    """Return line and name of each refused call or argument; imported names count in full."""
    tree = ast.parse(code)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names |= {alias.asname: f"{start}{alias.name}" for alias in node.names if alias.asname}
            names |= {alias.name: f"{start}{alias.name}" for alias in node.names if start and not alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = names.get(first, first) + dot + rest
            given = {keyword.arg for keyword in node.keywords}
            if name in REFUSED or NEEDED.get(name) not in {None, *given}:
                yield node.lineno, name
        arguments = []
        if isinstance(node, ast.Call):
            arguments = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):  # arguments that are kept in a dictionary
            arguments = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if is_text(key)]
        for argument, value in arguments:
            if argument in FIXED and not (isinstance(value, ast.Constant) and value.value is FIXED[argument]):
                yield node.lineno, argument


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize(
    "code",
    [
        "eval(text)",
        "import os\nos.system(text)",
        "from os import system as run\nrun(text)",
        "import pickle as p\np.load(file)",
        "from pickle import Unpickler\nUnpickler(file).load()",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess\nsubprocess.run(text, shell=wanted)",
        "import torch\ntorch.load(file)",
        "import torch\ntorch.load(file, weights_only=False)",
        "import numpy as np\nnp.load(file, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(file)",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "OPTIONS = {'trust_remote_code': given}",
        "import jinja2\njinja2.Environment()",
    ],
)
def test_a_dangerous_call_is_found(code):
    assert len(list(find_dangers(code))) == 1


def test_no_module_makes_a_dangerous_call():
    modules = [*(ROOT / "workflow").rglob("*.py"), *(ROOT / "envs").glob("*.py")]
    assert len(modules) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}" for path in modules for line, name in find_dangers(path.read_text())
    ]
    assert found == []


def test_no_rule_runs_a_shell_command_or_code_of_its_own():
    rules = list((ROOT / "workflow/rules").glob("*.smk"))
    assert len(rules) > 8
    for path in [*rules, ROOT / "Snakefile"]:
        assert not re.search(r"^\s+(shell|run|notebook|wrapper|cwl):", path.read_text(), re.MULTILINE), path.name


def test_every_class_that_could_load_code_of_a_model_is_told_not_to():
    found = 0
    for path in (ROOT / "workflow").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and re.fullmatch(
                r"Auto\w+\.from_(pretrained|config)", ast.unparse(call.func)
            ):
                given = [keyword.arg for keyword in call.keywords]
                # None: a dictionary of options, whose values are checked above
                assert "trust_remote_code" in given or None in given, f"{path.name}:{call.lineno}"
                found += 1
    assert found > 5


def test_security_md_names_tests_that_exist():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 10 and named <= defined, named - defined
