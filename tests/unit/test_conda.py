"""conda reads the environment files, each has what the code of its rules imports, and each rule runs in its own."""

import ast
import re
import shutil
import stat
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
import yaml
from packaging.requirements import Requirement
from rattler import Channel, MatchSpec, Version, VersionSpec

from cell2text.provenance import find_modules
from project_files import ROOT, bodies_of_rules

SCRIPTS = ROOT / "workflow/scripts"
ENVIRONMENTS = sorted((ROOT / "envs").glob("*.yaml"))


def normal_name(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_of(path):
    """Return the parsed pip requirements of an environment file."""
    dependencies = yaml.safe_load(path.read_text())["dependencies"]
    return [Requirement(pin) for entry in dependencies if isinstance(entry, dict) for pin in entry["pip"]]


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_conda_reads_an_environment_file(path):
    content = yaml.safe_load(path.read_text())
    assert list(content) == ["channels", "dependencies"]
    assert [Channel(name).name for name in content["channels"]] == ["conda-forge", "nodefaults"]
    *specs, pip = content["dependencies"]
    specs = {spec.name.normalized: spec for spec in (MatchSpec(text, strict=True) for text in specs)}
    assert list(specs) == ["python", "pip"]  # conda warns if pip is used but not listed
    python = VersionSpec(str(specs["python"].version))
    assert python.matches(Version("3.11.9")) and not python.matches(Version("3.12.0"))
    assert list(pip) == ["pip"]
    locked = set((ROOT / "requirements.txt").read_text().splitlines())
    assert {str(pin) for pin in pins_of(path)} <= locked


def environments_of_rules():
    """Return the name of the environment of each rule."""
    return {
        name: re.search(r'^    conda:\n        "\.\./\.\./envs/(\w+)\.yaml"', body, re.MULTILINE)[1]
        for name, body in bodies_of_rules().items()
    }


def installed_with(names):
    """Return packages and all that they require here, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = normal_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needed = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:
            continue
        waiting += [one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@cache
def imported(path):
    """Return the packages that a module imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"cell2text"}


# Imported within functions only: contracts do so for files of vectors, which no rule of these environments reads or
# writes, and the configuration names the sources of gene texts in a module that also downloads models.
NOT_CALLED = {("cells", "safetensors"), ("census", "safetensors"), ("census", "huggingface_hub")}


def test_an_environment_has_all_that_the_code_of_its_rules_imports():
    """Snakemake hides a missing package: it adds its own packages to each script's path."""
    rules = environments_of_rules()
    assert set(rules) == {path.stem for path in SCRIPTS.glob("*.py")}
    packages = packages_distributions()
    available = {path.stem: installed_with(pin.name for pin in pins_of(path)) for path in ENVIRONMENTS}
    missing = {
        (environment, name)
        for rule, environment in rules.items()
        for path in [SCRIPTS / f"{rule}.py", *find_modules(f"{rule}.py", "coexpression").values()]
        for name in imported(path)
        if available[environment].isdisjoint(map(normal_name, packages.get(name, [name])))
    }
    assert missing == NOT_CALLED


@pytest.fixture
def conda(tmp_path, monkeypatch):
    """A folder with the stand-in for conda, first on PATH, and the base environment that it reports."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    stand_in = tmp_path / "conda"
    stand_in.write_text(f"#!{sys.executable}\n{(ROOT / 'tests/conda_stand_in.py').read_text()}")
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "base/bin").mkdir(parents=True)
    (tmp_path / "base/bin/activate").write_text('export CONDA_PREFIX="$1" PATH="$1/bin:$PATH"\n')
    return tmp_path / "base"


def test_each_rule_runs_in_its_environment_with_sdm_conda(conda, tiny_model, tmp_path):
    folder = tmp_path / "work"
    shutil.copytree(ROOT / "config", folder / "config")
    shutil.copytree(ROOT / "resources", folder / "resources", ignore=shutil.ignore_patterns("models"))
    shutil.copytree(tiny_model, folder / "tiny-model")
    shutil.copy(ROOT / "tests/config/tiny.yaml", folder)
    targets = ["resources/models/tiny", "results/tiny/raw/pbmc68k.h5ad"]
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder, *targets]
    command += ["--cores", "1", "--configfile", folder / "tiny.yaml", "--sdm", "conda"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (folder / targets[1]).is_file() and (folder / targets[0] / "model.safetensors").is_file()

    prefixes = [path for path in (folder / ".snakemake/conda").iterdir() if path.is_dir()]
    by_content = {path.read_text(): path.stem for path in ENVIRONMENTS}
    made = {str(prefix): by_content[(prefix / "environment.yaml").read_text()] for prefix in prefixes}
    assert sorted(made.values()) == ["cells", "llm"]
    calls = [line.split(" ", 1) for line in (conda / "calls").read_text().splitlines()]
    ran = {
        script: made[prefix]
        for prefix, call in calls
        for script in re.findall(r"\.snakemake/scripts/\w+\.(\w+)\.py", call)
    }
    assert ran == {rule: environments_of_rules()[rule] for rule in ("fetch_dataset", "fetch_language_model")}
