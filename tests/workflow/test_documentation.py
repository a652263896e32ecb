"""The documentation: commands that work, a site without loose ends, tables and messages as in the code."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from cell2text import contracts
from cell2text.annotation.pack_model import FORMAT, REFINEMENT, RETRIEVER
from cell2text.contracts import TableContract, TensorContract
from cell2text.files import seal, write_json
from project_files import ROOT, load

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "config/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
CLUSTER_PAGE, FLAGS = ROOT / "docs/cluster.md", re.MULTILINE | re.DOTALL
DEMO = "reads results of the demo"
ANNOTATE = "describes cells, as test_workflow.py does with a tiny model"
BENCHMARK = "a measurement of minutes to hours"
CLUSTER = "asks a SLURM that runs jobs"
CONTAINER = "builds or runs an image, for which neither the program nor the network may be there"
# Commands that are not tried here, and why
NOT_TRIED = {
    "head -n 3 results/pbmc68k/annotated/clusters.tsv": DEMO,
    "head -n 1 results/pbmc68k/generations/test/0.jsonl": DEMO,
    "cell2text annotate my.h5ad --model results/pbmc68k/model --out annotated/my": ANNOTATE,
    "cell2text annotate my.h5ad --model results/pbmc68k/model --out annotated/my --species mouse": ANNOTATE,
    "cell2text annotate my.h5ad --model results/pbmc68k/model --out annotated/my "
    '--search "T cells in lung; NK cell"': ANNOTATE,
    "cell2text annotate my.h5ad --model results/pbmc68k/model --out annotated/my --examples labelled.h5ad": ANNOTATE,
    "cell2text annotate my.h5ad --model results/pbmc68k/model --out annotated/my --graph": ANNOTATE,
    'python -c "import cell2text, scanpy; '
    "print(cell2text.annotate(scanpy.read_h5ad('my.h5ad'), 'results/pbmc68k/model').obs)\"": ANNOTATE,
    'squeue --me --format "%.10i %.9P %.60k %.10T %.10M %.20R"': CLUSTER,
    "sacct --name <run id> --format JobID,Comment%60,Partition,State,Elapsed,MaxRSS": CLUSTER,
    "scancel --name <run id>": CLUSTER,
    "docker build --file envs/Dockerfile --tag cell2text .": CONTAINER,
    'docker run --rm --volume "$PWD:/work" --user "$(id -u):$(id -g)" cell2text --cores all': CONTAINER,
    "apptainer build cell2text.sif envs/cell2text.def": CONTAINER,
    'apptainer run --bind "$PWD:/work" --pwd /work cell2text.sif --cores all': CONTAINER,
    "cell2text annotate atlas.h5ad --model model --out annotated/atlas": BENCHMARK,
    "python tests/benchmarks/simulate_cells.py atlas.h5ad --cells 100000 --like pbmc3k.h5ad": BENCHMARK,
    "python tests/benchmarks/describe_cells.py results/pbmc68k --cells 500": BENCHMARK,
    "python tests/benchmarks/added_types.py results/studies-{42,43,44}": BENCHMARK,
    "python tests/benchmarks/few_shot.py results/studies-{42,43,44} --plot docs/few_labels.svg": BENCHMARK,
    "python tests/benchmarks/memory_at_scale.py --cells 20000 200000 --folder somewhere": BENCHMARK,
    "python tests/benchmarks/gene_text.py results/studies-{42,43,44} "
    "--gene-sets ../shared/data/gene_sets/ReactomePathways.gmt --plot docs/gene_text.svg": BENCHMARK,
    "python tests/benchmarks/mouse.py ../shared/data/studies --plot docs/mouse.svg": BENCHMARK,
    "python tests/benchmarks/new_study.py --work somewhere --test-cells 250 --plot docs/new_study.svg": BENCHMARK,
    "python tests/benchmarks/search.py results/studies-{42,43,44} --work somewhere --plot docs/search.svg": BENCHMARK,
    "python tests/benchmarks/refine_new_study.py --work somewhere": BENCHMARK,
    "python tests/benchmarks/refine_on_graph.py results/studies-* --bilevel --plot docs/neighbours.svg": BENCHMARK,
}


def commands():
    """Return the commands in the sh blocks of all pages, each once, in order, without comments and `.venv/bin/`."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), FLAGS):
            for line in re.sub(r" *\\\n *", " ", block).splitlines():
                command = re.sub(r"\s+#.*", "", line).strip().removeprefix(".venv/bin/")
                if command and not command.startswith("#"):
                    found[command] = page.name
    return found


def kind(command):
    """Return how a command is tried, and None if it is not."""
    return {"snakemake": "plan", "make": "make", "printf": "run"}.get(command.split()[0])


# Snakemake is imported once, which takes longer than a plan.
PLAN = """
import json, os, sys

from snakemake.cli import main
import cell2text.annotation.find_queries, cell2text.annotation.language_models, cell2text.annotation.pack_model
import cell2text.config, cell2text.models.fetch_encoder, cell2text.models.fetch_language_model, cell2text.provenance

for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
        file = os.open(f"plan{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        main(arguments)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project with packed models and files of cells in name only, which is all that planning needs.

    The site's own profile is the one that docs/cluster.md shows.
    """
    for name in ("config", "profiles", "workflow"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "resources", tmp_path / "resources", ignore=shutil.ignore_patterns("models"))
    for name in ("Snakefile", "Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    language_model = {"name": "lm", "source": "hf://organisation/lm@main", "sha256": {"config.json": "0"}}
    facts = {"format": FORMAT, "language_model": language_model, "projector": {}, "finetune": {}}
    facts["labels"] = {"cell_type": ["CL:0000236"]}
    for run in ("pbmc68k", "blood"):
        model = tmp_path / "results" / run / "model"
        model.mkdir(parents=True)
        write_json(facts, model / "cell2text.json")
        for name in (RETRIEVER, REFINEMENT):
            (model / name).touch()
        seal(model, "cell2text.json")
    (tmp_path / "data").mkdir()
    for name in ("my.h5ad", "my-blood.h5ad", "data/my-study.h5ad", "labelled.h5ad"):
        (tmp_path / name).touch()
    profile = tmp_path / "home/snakemake/site/profile.yaml"
    profile.parent.mkdir(parents=True)
    shown = re.search(r"^```yaml\n(# ~/.config/snakemake/site/profile.yaml\n.*?)^```", CLUSTER_PAGE.read_text(), FLAGS)
    profile.write_text(shown[1])
    return tmp_path


def arguments_of(command):
    """Return the arguments of Snakemake for a plan; without conda where that is not installed."""
    if not shutil.which("conda"):
        command = command.replace(" --sdm conda", "")
    return [*shlex.split(command)[1:], *([] if "--unlock" in command else ["--dry-run"])]


def test_commands_are_tried_or_listed_with_a_reason():
    left = {command for command in commands() if not kind(command)}
    assert left == set(NOT_TRIED)


def test_commands_can_be_planned(checkout):
    tried = {command: kind(command) for command in commands()}
    for command in [command for command, how in tried.items() if how == "run"]:
        subprocess.run(command, shell=True, cwd=checkout, check=True)
    for command in [command for command, how in tried.items() if how == "make"]:
        result = subprocess.run([*command.split(), "--dry-run"], capture_output=True, text=True, cwd=checkout)
        assert result.returncode == 0, f"{command}: {result.stderr}"
    plans = [command for command, how in tried.items() if how == "plan"]
    assert len(plans) > 5
    environment = os.environ | {
        "PYTHONPATH": str(checkout / "workflow/scripts"),
        "XDG_CONFIG_HOME": str(checkout / "home"),
    }
    given = json.dumps([arguments_of(command) for command in plans])
    result = subprocess.run(
        [sys.executable, "-c", PLAN], input=given, capture_output=True, text=True, cwd=checkout, env=environment
    )
    assert result.returncode == 0, result.stderr
    for number, (command, code) in enumerate(zip(plans, result.stdout.split(), strict=True)):
        output = (checkout / f"plan{number}.txt").read_text()
        assert code == "0", f"{command} ({commands()[command]}): {output}"
        assert "Job stats" in output or "Unlocked" in output, f"{command}: {output}"


def test_commands_that_are_not_tried_name_scripts_and_options_that_exist():
    for command in NOT_TRIED:
        script = re.search(r"tests/benchmarks/\w+\.py", command)
        if command.startswith("cell2text "):
            path = ROOT / "workflow/scripts/cell2text/annotation/annotate.py"
        elif script:
            path = ROOT / script[0]
        else:
            continue
        text = path.read_text()
        assert [name for name in re.findall(r" (--[a-z-]+)", command) if f'"{name}"' not in text] == [], command


class Loads(HTMLParser):
    """Addresses from which a page loads something, other than links to follow."""

    def __init__(self, page):
        super().__init__()
        self.addresses = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in {"src", "srcset", "data", "poster"} or (tag == "link" and name == "href"):
                self.addresses.append(value)
            if name == "class" and "mermaid" in value.split():  # the theme would load its script
                self.addresses.append("//mermaid")


def build(root, folder):
    # without --quiet, which would hide warnings from --strict, too
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    result = build(ROOT, folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "config").mkdir()
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "config/README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / "config/README.md").open("a") as file:
        file.write("[one](../docs/faq.md#no-such-question) [another](../docs/none.md)\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    assert "no-such-question" in result.stderr and "none.md" in result.stderr


def test_the_site_loads_nothing_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = Loads(page.read_text()).addresses
        assert len(loaded) > 3
        assert [address for address in loaded if re.match(r"([a-z]+:)?//", address)] == [], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?([a-z]+:)?//", sheet.read_text()), sheet
    assert Loads('<img src="https://a.b/c.png">').addresses == ["https://a.b/c.png"]


def test_files_of_the_project_are_pages_and_links_lead_to_them(site):
    assert "finetune.opening_epochs" in (site / "config.html").read_text()
    assert 'href="confidence.html"' in (site / "config.html").read_text()
    assert 'href="config.html#how-genes-are-named"' in (site / "faq.html").read_text()
    assert 'href="../config.html#how-cells-are-split"' in (site / "stages/corpus.html").read_text()
    assert "Rules of the house" in (site / "contributing.html").read_text()


def test_tables_of_columns_are_those_of_the_contracts(monkeypatch):
    columns = load("docs/columns.py")
    texts = {path.name: path.read_text() for path in columns.PAGES}
    for name, text in texts.items():
        assert columns.render(text) == text, f"docs/stages/{name}: run `make docs`"
        assert not re.search(r"^\|.*\|\s*\|$", text, re.MULTILINE), f"docs/stages/{name}: a column has no meaning"
    shown = {name for text in texts.values() for name in re.findall(r"<!-- columns of (\w+) -->", text)}
    kinds = (TableContract, TensorContract)
    declared = {name for name, one in vars(contracts).items() if isinstance(one, kinds)} | {
        "METRICS",
        "FEW_SHOT",
        "RETRIEVAL",
    }
    assert shown == declared - {"SAMPLED_CELLS"}  # CELLS without the split

    monkeypatch.setitem(contracts.QC.columns, "new", pa.list_(pa.int32()))
    changed = columns.render(texts["cells.md"])
    assert changed.replace("| `new` | list of int32 |  |\n", "") == texts["cells.md"] != changed


def test_error_messages_in_the_questions_are_those_of_the_code():
    code = "".join(path.read_text() for path in (ROOT / "workflow/scripts/cell2text").rglob("*.py"))
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs/faq.md").read_text(), re.MULTILINE)
    assert len(messages) > 10
    assert [message for message in messages if message not in code] == []
