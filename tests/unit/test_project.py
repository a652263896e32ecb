"""The project agrees with itself: pins, schema, documentation, and two halves that stay apart."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tomllib
from modulefinder import ModuleFinder

import pytest
import yaml

from cell2text import settings
from cell2text.config import check_config
from cell2text.provenance import find_modules, library_version
from project_files import ROOT, bodies_of_rules, load

SCRIPTS = ROOT / "workflow/scripts"
SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
CELLS_PACKAGES = ["anndata", "scanpy", "cellxgene_ontology_guide"]
LANGUAGE_PACKAGES = ["torch", "transformers", "peft"]


def requirements_module():
    return load("envs/requirements.py")


def test_requirements_hold_the_pins_of_the_environments():
    text = (ROOT / "requirements.txt").read_text()
    named = text.split("# named in envs/\n")[1].split("\n\n")[0].splitlines()
    assert named == [f"{name}=={version}" for name, version in requirements_module().named_pins().items()]
    assert "torch==2.13.0" in named
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", pin) for pin in pins)
    names = [pin.split("==")[0] for pin in pins]
    assert len(names) == len(set(names))


def test_installed_packages_are_the_required_ones():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = dict(line.split("==") for line in lines if "==" in line)
    installed = requirements_module().installed()
    differing = {name: installed.get(name) for name in required if installed.get(name) != required[name]}
    assert differing == {}


@pytest.mark.parametrize("extra", ["cells", "language", "report"])
def test_an_extra_of_the_package_names_what_its_environment_pins(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"][extra]
    file = {"language": "llm"}.get(extra, extra)
    dependencies = yaml.safe_load((ROOT / f"envs/{file}.yaml").read_text())["dependencies"]
    pinned = {pin.partition("==")[0] for pin in next(entry["pip"] for entry in dependencies if isinstance(entry, dict))}
    assert pinned <= {re.match(r"[a-z0-9-]+", name)[0] for name in wanted}
    assert (
        f"cell2text[{','.join(sorted(project['optional-dependencies'])[1:])}]"
        in project["optional-dependencies"]["all"]
    )


def test_rules_name_environments_and_scripts_that_exist():
    for rules in (ROOT / "workflow/rules").glob("*.smk"):
        for path in re.findall(r'"(\.\./[^"]+\.(?:yaml|py|rst))"', rules.read_text()):
            assert (rules.parent / path).resolve().is_file(), f"{rules.name}: {path}"


def test_every_rule_has_a_script_of_its_name():
    rules = bodies_of_rules()
    assert len(rules) > 15
    for name, body in rules.items():
        assert f'"../scripts/{name}.py"' in body
        assert f'library_version("{name}.py")' in body
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(rules)


def test_gpu_rules_declare_a_gpu_and_no_other_rule_does():
    declaring = {name for name, body in bodies_of_rules().items() if re.search(r"^        gpu=", body, re.MULTILINE)}
    assert declaring == {
        "embed_genes", "finetune", "fit_encoder", "score_candidates", "score_left_out_studies", "baseline_shuffled",
        "baseline_aligned", "baseline_bilevel", "baseline_greedy", "embed_query", "score_query",
    }  # fmt: skip


def test_the_memory_of_every_rule_is_measured_or_there_is_a_reason_why_not():
    measured, rules = load("tests/benchmarks/memory_at_scale.py"), bodies_of_rules()
    assert sorted([*measured.RULES, *measured.NOT_MEASURED]) == sorted(rules)
    on_the_fly = {name for name, body in rules.items() if "on_the_fly=on_the_fly" in body} | {"embed_genes"}
    assert set(measured.ON_THE_FLY) == on_the_fly - set(measured.NOT_MEASURED)


def keys(schema, prefix=""):
    for key, entry in schema.get("properties", {}).items():
        yield from keys(entry, f"{prefix}{key}.") if "properties" in entry else [f"{prefix}{key}"]


def test_every_key_is_explained():
    explained = (ROOT / "config/README.md").read_text()
    schema = yaml.safe_load(SCHEMA.read_text())
    rows = [line.split("|")[1] for line in explained.splitlines() if line.startswith("| `")]
    named = set()
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        stem = first.rsplit(".", 1)[0]
        named |= {first} | {f"{stem}{other}" if other.startswith(".") else other for other in others}
    assert set(keys(schema)) <= named
    sheet = yaml.safe_load((ROOT / "workflow/schemas/datasets.schema.yaml").read_text())
    assert set(sheet["properties"]) <= named
    assert named <= set(keys(schema)) | set(sheet["properties"])


@pytest.mark.parametrize("section", ["qc", "sample", "census", "encoder", "projector", "finetune"])
def test_settings_have_the_keys_of_the_schema(section):
    name = {"qc": "QcSettings"}.get(section, f"{section.capitalize()}Settings")
    fields = {field.name for field in dataclasses.fields(getattr(settings, name))}
    assert fields == set(yaml.safe_load(SCHEMA.read_text())["properties"][section]["properties"])


@pytest.mark.parametrize(
    "path",
    [
        "config/config.yaml",
        "config/cellxgene.yaml",
        "config/blood.yaml",
        "tests/config/tiny.yaml",
        "tests/config/studies.yaml",
    ],
)
def test_shipped_configs_obey_the_schema(path):
    config = yaml.safe_load((ROOT / path).read_text())
    assert check_config(config, SCHEMA, path)["run"] == config["run"]


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is of the other half")

sys.meta_path.insert(0, Block())
"""


def halves():
    """Return the modules of each half; those that need no package of either are in both."""
    language = {
        "device",
        "processes",
        "training",
        "annotation.evidence",
        "embedding.fit_encoder",
        "embedding.embed_genes",
        "embedding.refit",
        "embedding.vectors",
    }
    language |= {f"evaluation.baselines.{name}" for name in ("aligned", "bilevel", "contrast", "greedy", "shuffled")}
    language |= {"evaluation.few_shot", "models.check_language_model", "models.fetch_language_model"}
    language |= {f"annotation.{name}" for name in ("embed_query", "score_query", "describe_query", "explain_query")}
    language |= {f"retrieval.{name}" for name in ("retriever", "fit_retriever", "score_retrieval", "search_cells")}
    folders = ("model.", "finetuning.", "generation.", "embedding.encoders")
    both = {"models.fetch_encoder", "models.sources", "models.gene_dictionaries"}
    both |= {f"annotation.{name}" for name in ("pack_model", "fetch_model", "language_models")}
    found = {"language": [], "cells": []}
    for path in (SCRIPTS / "cell2text").rglob("*.py"):
        name = ".".join(path.relative_to(SCRIPTS / "cell2text").with_suffix("").parts).removesuffix(".__init__")
        if name in ("annotation.annotate", "__main__"):  # these join the halves
            continue
        half = "language" if name in language | both or name.startswith(folders) else "cells"
        for one in found if name.startswith("confidence") else [half]:
            found[one].append(f"cell2text.{name}")
    return found


def imports_without(modules, blocked):
    code = BLOCK.format(blocked=blocked) + "".join(f"import {module}\n" for module in modules)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPTS)
    assert result.returncode == 0, result.stderr


def test_language_half_needs_no_single_cell_package():
    imports_without(halves()["language"], CELLS_PACKAGES)


def test_cells_half_needs_no_torch():
    imports_without(halves()["cells"], LANGUAGE_PACKAGES)


def versions_of(scripts, folder=SCRIPTS):
    return {script: library_version(script, "coexpression", folder / "cell2text") for script in scripts}


def modules_of(script):
    """Return the package modules that a script imports, also within functions, as Python's own finder sees them."""
    finder = ModuleFinder(path=[str(SCRIPTS)])
    finder.run_script(str(SCRIPTS / script))
    return {name for name in finder.modules if name.startswith("cell2text")}


def document(tree):
    """Give every module, class and function another docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            old = ast.get_docstring(node, clean=False) is not None
            node.body[: int(old)] = [ast.Expr(ast.Constant("Another docstring."))]
    return ast.unparse(ast.fix_missing_locations(tree))


def test_changing_a_module_changes_the_version_of_the_rules_that_import_it_and_a_docstring_none(tmp_path):
    scripts = sorted(path.name for path in SCRIPTS.glob("*.py"))
    imported = {script: modules_of(script) for script in scripts}
    assert {script: set(find_modules(script)) for script in scripts} == imported
    by_name = "cell2text.embedding.encoders.coexpression"
    further = {by_name, *modules_of(f"{by_name.replace('.', '/')}.py")}
    for found in imported.values():
        found |= further if "cell2text.embedding.encoders" in found else set()
    copy = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = versions_of(scripts)
    texts = {path: path.read_text() for path in copy.rglob("*.py")}
    assert not [path for path, text in texts.items() if "__doc__" in text], "a docstring may matter"
    for path, text in texts.items():
        path.write_text(f"# a comment\n{document(ast.parse(text))}")
    assert versions_of(scripts, copy) == before
    for path, text in texts.items():
        path.write_text(f"{text}\nCHANGED = 1\n")
        module = ".".join(path.relative_to(copy).with_suffix("").parts).removesuffix(".__init__")
        users = {script for script in scripts if module in imported[script] or module == script.removesuffix(".py")}
        after = versions_of(scripts, copy)
        assert {script for script in scripts if after[script] != before[script]} == users, path
        path.write_text(text)


def test_what_is_imported_by_name():
    by_name = {path for path in SCRIPTS.rglob("*.py") if re.search(r"import_module|__import__", path.read_text())}
    package = SCRIPTS / "cell2text"  # whose own __init__ offers `annotate` to Python, which no rule uses
    assert by_name == {package / "__init__.py", package / "embedding/encoders/__init__.py"}


def test_a_style_sheet_changes_the_versions_of_the_pages_alone(tmp_path):
    copy = tmp_path / "scripts"
    shutil.copytree(SCRIPTS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    scripts = sorted(path.name for path in SCRIPTS.glob("*.py"))
    before = versions_of(scripts)
    with (copy / "cell2text/report/page.css").open("a") as file:
        file.write("p {color: red}\n")
    assert [script for script, version in versions_of(scripts, copy).items() if version != before[script]] == [
        "render_query.py",
        "render_report.py",
    ]


def test_only_the_configured_encoder_counts():
    modules = find_modules("embed_genes.py", "geneformer")
    assert "cell2text.embedding.encoders.geneformer" in modules
    assert "cell2text.embedding.encoders.coexpression" not in modules


def test_the_tests_of_all_accidents_exist():
    named = re.findall(r"`(test_\w+\.py)`|`(test_\w+)`", (ROOT / "docs/accidents.md").read_text())
    assert len(named) > 60
    for file, test in named:
        if file:
            text = "".join(path.read_text() for path in (ROOT / "tests").glob(f"*/{file}"))
            assert text, file
        else:
            assert f"\ndef {test}(" in text, test


def test_nothing_names_a_machine():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".smk", ".yaml", ".tsv", ".toml", ""} and path.is_file():
            assert not re.search(r"(?<![\w.])/(home|root|work|mnt)/\w", path.read_text()), name


def test_hosted_ci_runs_what_exists_with_pinned_actions_and_no_rights():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    assert not any("permissions" in job for job in jobs.values())
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == [".ci/run", "make slow", "make audit"]
    targets = re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.removeprefix("make ") for command in commands[1:]} <= set(targets)
    assert os.access(ROOT / ".ci/run", os.X_OK)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert (jobs["test"]["strategy"]["matrix"]["python"], wanted) == (["3.11", "3.12"], ">=3.11,<3.13")


def test_images_are_made_of_files_that_exist_and_the_installer_of_the_makefile():
    docker, apptainer = ((ROOT / "envs" / name).read_text() for name in ("Dockerfile", "cell2text.def"))
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE) for name in line.split()]
    assert sorted(copied) == sorted(re.findall(r"^ +(\S+) /opt/cell2text/$", apptainer, re.MULTILINE))
    assert "requirements.txt" in copied and all((ROOT / name).exists() for name in copied)
    assert re.findall(r"^USER (.+)$", docker, re.MULTILINE) == ["1000"]
    installer = re.search(r"^UV := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for text in (docker, apptainer):
        assert f"uv=={installer}\n" in text.replace(" \\\n", "\n") and "python:3.11-slim" in text
        assert "--snakefile" in text and "/opt/cell2text/Snakefile" in text
