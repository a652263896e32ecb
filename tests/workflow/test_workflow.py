"""The whole workflow on a few cells: complete runs, reruns, resuming after a kill, and error messages."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import scanpy

import cell2text
from cell2text.contracts import EMBEDDINGS
from cell2text.evaluation.methods import FEW_LABELS, ON_GRAPH
from cell2text.files import read_jsonl
from tiny_geneformer import V2, write_checkpoint
from tiny_run import ROOT, new_folder

SECRET = "hf_PlantedSecretOfTheTests"
AWKWARD = "Zellen für alle, l'été 細胞"  # a folder with spaces, a comma, an apostrophe and letters beyond ASCII
# Python imports a module of this name at its start. No process of a run may look up or connect to another machine.
OFFLINE = """
import sys
from pathlib import Path

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = address[0] if isinstance(address, tuple) else address
        if event == "socket.connect" and not isinstance(address, tuple):
            return  # a socket in the file system
        if host not in (None, "", "localhost", "127.0.0.1", "::1"):
            with Path(__file__).with_name("connections").open("a") as file:
                file.write(f"{sys.orig_argv} {event} {host}\\n")
            raise OSError("no connection in tests")

sys.addaudithook(refuse)
with Path(__file__).with_name("processes").open("a") as file:
    file.write(f"{sys.orig_argv}\\n")
"""


def snakemake(folder, *arguments, root=ROOT, **variables):
    command = [sys.executable, "-m", "snakemake", "--snakefile", root / "Snakefile", "--directory", folder]
    environment = os.environ | {"HF_TOKEN": SECRET} | variables
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=root, env=environment)
    return result.returncode, result.stdout + result.stderr


def contents(folder):
    """Return the bytes of each file below a folder, with its name, and with the texts in a compressed file or table."""
    found = {}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        content = str(path.relative_to(folder)).encode() + path.read_bytes()
        if path.suffix == ".gz":
            content += gzip.decompress(path.read_bytes())
        elif path.suffix == ".parquet":
            content += str(pyarrow.parquet.read_table(path).to_pydict()).encode()
        elif path.suffix == ".h5ad":
            cells = anndata.read_h5ad(path)
            content += f"{cells.obs.to_csv()} {cells.var.to_csv()} {dict(cells.uns)}".encode()
        found[path] = content
    return found


def files_with(text, found):
    return [path for path, content in found.items() if text.encode() in content]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_model):
    """A folder with the finished tiny run."""
    folder = new_folder(tmp_path_factory.mktemp("tiny") / AWKWARD, tiny_model)
    (folder.parent / "offline").mkdir()
    (folder.parent / "offline/sitecustomize.py").write_text(OFFLINE)
    variables = {"PYTHONPATH": str(folder.parent / "offline")}
    code, output = snakemake(folder, "--cores", "1", "--configfile", folder / "tiny.yaml", **variables)
    assert code == 0, output
    assert SECRET not in output
    return folder


@pytest.fixture
def fresh(tmp_path, tiny_model):
    return new_folder(tmp_path / "work", tiny_model)


def planned(folder, *arguments, config="tiny.yaml", root=ROOT):
    """Return the rules that a dry run lists, and its output."""
    code, output = snakemake(folder, "--dry-run", "--configfile", folder / config, *arguments, root=root)
    assert code == 0, output
    table = output.split("Job stats:")[1].split("total")[0] if "Job stats:" in output else ""
    return set(re.findall(r"^(\w+) +\d+$", table, re.MULTILINE)), output


def test_the_tiny_run_writes_all_results(finished):
    results = finished / "results/tiny"
    metrics = pd.read_csv(results / "evaluation/metrics.tsv", sep="\t")
    assert {"cell2text", "majority", "pca_logistic", "knn", "nearest_text", "aligned", "shuffled"} == set(
        metrics["method"]
    )
    shares = metrics.loc[metrics["metric"] != "reported_depth", "value"].dropna()
    assert shares.between(0, 1).all()
    rows = [json.loads(line) for path in sorted(results.glob("generations/test/*.jsonl")) for line in path.open()]
    cells = pd.read_parquet(results / "corpus/cells.parquet")
    assert sorted(row["cell_id"] for row in rows) == sorted(cells.loc[cells["split"] == "test", "cell_id"])
    assert {row["status"] for row in rows} == {"parsed"} and all(row["novel"] in (True, False) for row in rows)
    assert (results / "report.html").stat().st_size > 50_000
    assert not (results / "finetuned.checkpoints").exists()
    assert not [path for path in finished.rglob("*") if path.suffix in {".pkl", ".bin", ".pt"}]


def test_no_secret_of_the_environment_is_written(finished):
    """Files with the donor's name show that the search reads all kinds of files."""
    found = contents(finished)
    kinds = {path.suffix for path in files_with("donor-A", found)}
    assert {".parquet", ".h5ad", ".html", ".json", ".tsv"} <= kinds
    assert {"logs", ".snakemake"} <= {path.relative_to(finished).parts[0] for path in found}
    assert files_with(SECRET, found) == []


def test_no_job_of_a_run_with_local_sources_connects_to_another_machine(finished):
    offline = finished.parent / "offline"
    started = (offline / "processes").read_text()
    assert all(script in started for script in ("fetch_language_model.py", "finetune.py", "render_report.py"))
    assert not (offline / "connections").exists(), (offline / "connections").read_text()
    probe = "import socket; socket.create_connection(('example.org', 80))"
    variables = os.environ | {"PYTHONPATH": str(offline)}
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=variables)
    assert "no connection in tests" in run.stderr
    (offline / "connections").unlink()


def test_a_second_run_does_nothing_for_any_target(finished):
    rules, output = planned(finished, "--nolock", "all", "models", "corpus", "embeddings")
    assert rules == set()
    assert "Nothing to be done" in output


def test_the_recorded_settings_are_those_of_the_run(finished):
    assert planned(finished, config="results/tiny/config.json")[0] == set()


def test_a_new_clone_reruns_nothing_and_a_changed_module_what_uses_it(finished, tmp_path):
    for name in ("workflow", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, copy_function=shutil.copyfile)
    shutil.copyfile(ROOT / "Snakefile", tmp_path / "clone/Snakefile")
    for path in [*(tmp_path / "clone").rglob("*.py"), *(tmp_path / "clone").rglob("*.smk")]:
        path.write_text(path.read_text().replace('"""', '"""Documented. ', 1) + "\n# a comment\n")
    assert planned(finished, root=tmp_path / "clone")[0] == set()
    assert planned(finished, "--workflow-profile", "profiles/slurm", root=tmp_path / "clone")[0] == set()
    for name in ("scripts/compare.py", "scripts/cell2text/report/charts.py"):
        with (tmp_path / "clone/workflow" / name).open("a") as file:
            file.write("CHANGED = 1\n")
    assert planned(finished, root=tmp_path / "clone")[0] == {"all", "compare", "render_report", "pack_model"}


def test_deleted_generations_are_regenerated_without_fine_tuning(finished):
    generations = finished / "results/tiny/generations"
    kept = generations.with_name("kept")
    generations.rename(kept)
    try:
        rules, _ = planned(finished)
    finally:
        kept.rename(generations)
    assert rules == {"all", "generate_descriptions", "evaluate", "compare", "render_report", "pack_model"}


def test_changing_an_evaluation_key_reruns_only_the_evaluation(finished, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text((finished / "tiny.yaml").read_text().replace("bootstrap: 50", "bootstrap: 60"))
    rules, _ = planned(finished, config=changed)
    assert rules == {"all", "evaluate", "compare", "render_report", "pack_model"}


def test_another_confidence_neither_trains_nor_scores_again(finished, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text((finished / "tiny.yaml").read_text() + "generate:\n  confidence: 0.9\n")
    rules, _ = planned(finished, config=changed)
    judged = {"generate_descriptions", "baseline_shuffled", "evaluate", "compare", "render_report", "pack_model"}
    assert rules == {"all", "choose_thresholds"} | judged


def test_free_text_is_compared_only_on_request(finished, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text((finished / "tiny.yaml").read_text() + "  greedy: true\n")
    rules, _ = planned(finished, config=changed)
    assert rules == {"all", "baseline_greedy", "evaluate", "compare", "render_report", "pack_model"}


def test_predictions_are_refined_on_a_graph_only_on_request(finished, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text((finished / "tiny.yaml").read_text() + "graph:\n  refine: true\n")
    rules, output = planned(finished, config=changed)
    added = {"refine_on_graph", "baseline_bilevel", "fit_refinement"}
    assert rules == {"all", *added, "evaluate", "compare", "render_report", "pack_model"}
    assert re.search(r"^refine_on_graph +2$", output, re.MULTILINE)


def test_methods_for_few_labels_are_compared_only_on_request(finished, tmp_path):
    changed = tmp_path / "changed.yaml"
    changed.write_text((finished / "tiny.yaml").read_text() + "few_labels:\n  compare: true\n")
    rules, _ = planned(finished, config=changed)
    added = {"baseline_contrast", "few_shot"}
    assert rules == {"all", *added, "evaluate", "compare", "render_report", "pack_model"}


def test_a_retriever_is_trained_only_on_request(finished, tmp_path):
    assert not (finished / "results/tiny/retrieval").exists()
    changed = tmp_path / "changed.yaml"
    changed.write_text((finished / "tiny.yaml").read_text() + "retrieval:\n  train: true\n")
    rules, _ = planned(finished, config=changed)
    fitted = {"collect_names", "fit_retriever", "score_retrieval"}
    assert rules == {"all", "evaluate", "compare", "render_report", "pack_model"} | fitted


def test_a_local_model_is_an_input_and_its_folder_is_not_overwritten(fresh):
    def edit(name, old, new):
        path = fresh / name
        path.write_text(path.read_text().replace(old, new))

    def refused(*arguments):
        code, output = snakemake(fresh, "models", "--cores", "1", "--configfile", fresh / "tiny.yaml", *arguments)
        assert code != 0 and "Traceback" not in output
        return output

    assert snakemake(fresh, "models", "--cores", "1", "--configfile", fresh / "tiny.yaml")[0] == 0
    model = fresh / "resources/models/tiny"
    kept = (model / "source.json").read_bytes()
    assert planned(fresh, "--nolock", "models")[0] == set()
    # an older file in place of a newer one
    edit("tiny-model/config.json", '"max_position_embeddings": 512', '"max_position_embeddings": 256')
    os.utime(fresh / "tiny-model/config.json", (0, 0))
    assert planned(fresh, "--nolock", "models")[0] == {"fetch_language_model", "models"}
    edit("tiny-model/config.json", '"max_position_embeddings": 256', '"max_position_embeddings": 512')
    assert planned(fresh, "--nolock", "models")[0] == set()
    shutil.copytree(fresh / "tiny-model", fresh / "other-model")
    edit("tiny.yaml", "source: tiny-model", "source: other-model")
    assert "resources/models/tiny holds a model from another source, tiny-model. Set another" in refused()
    assert (model / "source.json").read_bytes() == kept
    edit("tiny.yaml", "source: other-model", "source: nowhere")
    assert "tiny.yaml: language_model.source: no such file or directory: nowhere. Correct the path" in refused()
    edit("tiny.yaml", "source: nowhere", "source: tiny-model")
    before = (fresh / "tiny.yaml").read_text()
    edit("tiny.yaml", "name: tiny", "name: tiny-model")
    edit("tiny.yaml", "kind: coexpression\n  dimensions: 8", "kind: geneformer\n  source: tiny-model")
    assert "language_model.name: the folder of the encoder is named tiny-model, too. Set another name" in refused()
    (fresh / "tiny.yaml").write_text(before)
    for folder in (model, *(fresh / "results/tiny" / name for name in ("model", "finetuned", "encoder"))):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("three years")
        assert f"{folder.relative_to(fresh)}: this folder was not written by the workflow" in refused("--forceall")
        assert (folder / "thesis.txt").read_text() == "three years"
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def with_geneformer(finished, tmp_path_factory):
    """A copy of the finished run, run again with a tiny Geneformer, gene vectors on the fly, and methods on request."""
    folder = tmp_path_factory.mktemp("geneformer") / "work"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.rmtree(folder / "results/tiny/genes.parquet", ignore_errors=True)
    symbols = pd.read_parquet(finished / "results/tiny/genes.parquet")["symbol"]
    write_checkpoint(folder / "repository/Geneformer-tiny", V2, symbols=tuple(symbols), positions=64)
    encoder = "kind: geneformer\n  source: repository/Geneformer-tiny\n  cache: false"
    settings(folder, "kind: coexpression\n  dimensions: 8", encoder)
    settings(folder, "kind: pooled", "kind: mlp")
    methods = "  greedy: true\ngraph:\n  refine: true\nfew_labels:\n  compare: true\n  shots: [2]\n  steps: 20"
    settings(folder, "bootstrap: 50", f"bootstrap: 50\n{methods}\nretrieval:\n  train: true")
    benchmarks = folder / "logs/tiny/benchmarks/embed_genes/pbmc68k"
    shutil.copy(benchmarks / "1.jsonl", benchmarks / "7.jsonl")  # as if left by a run with more shards
    code, output = snakemake(folder, "--cores", "1", "--configfile", folder / "tiny.yaml")
    assert code == 0, output
    return folder


@pytest.mark.slow
def test_a_run_with_geneformer_and_without_cached_vectors_and_with_methods_on_request(with_geneformer):
    folder = with_geneformer
    results = folder / "results/tiny"
    assert sorted(path.name for path in (folder / "resources/models").iterdir()) == ["Geneformer-tiny", "tiny"]
    assert (results / "encoder/model.safetensors").is_symlink()
    tensors, ids = EMBEDDINGS.read(results / "embeddings/pbmc68k/0.safetensors", [*EMBEDDINGS.tensors, "cls"])
    assert tensors["gene_vectors"].shape == (len(ids), 0, 16) and tensors["cls"].any(axis=1).all()
    genes = pd.read_parquet(results / "genes.parquet")
    assert genes["token"].min() == 4 and genes["gene_id"].isin(genes["symbol"]).all()
    rows = [json.loads(line) for path in sorted(results.glob("generations/test/*.jsonl")) for line in path.open()]
    cells = pd.read_parquet(results / "corpus/cells.parquet")
    assert sorted(row["cell_id"] for row in rows) == sorted(cells.loc[cells["split"] == "test", "cell_id"])
    retrieval = pd.read_csv(results / "evaluation/retrieval.tsv", sep="\t")
    assert set(retrieval["method"]) == {"retriever", "aligned", "tfidf", "shuffled"}
    assert retrieval["value"].between(0, 1).all() and (results / "model/retriever.safetensors").exists()
    jobs = re.search(r"<th[^>]*>embed_genes</th><td>(\d+)</td>", (results / "report.html").read_text())
    assert jobs[1] == "2"
    assert {"greedy", *ON_GRAPH, *FEW_LABELS} < set(pd.read_csv(results / "evaluation/metrics.tsv", sep="\t")["method"])
    assert planned(folder)[0] == set()
    changed = folder / "changed.yaml"
    changed.write_text((folder / "tiny.yaml").read_text() + "generate:\n  confidence: 0.9\n")
    assert "choose_thresholds" in (rules := planned(folder, config=changed)[0]) and "baseline_greedy" not in rules


@pytest.mark.slow
def test_a_killed_run_keeps_finished_shards_and_resumes_to_the_same_bytes(with_geneformer):
    folder = with_geneformer
    shards = folder / "results/tiny/embeddings/pbmc68k"
    uninterrupted = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert len(uninterrupted) == 2
    shutil.rmtree(shards)
    arguments = ["embeddings", "--cores", "1", "--configfile", folder / "tiny.yaml"]
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder, *arguments]
    run = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 120
    while not list(shards.glob("[0-9].safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = {path: path.stat().st_mtime_ns for path in shards.glob("[0-9].safetensors")}
    assert len(done) == 1
    assert snakemake(folder, "--configfile", folder / "tiny.yaml", "--unlock")[0] == 0
    code, output = snakemake(folder, *arguments, "--rerun-incomplete")
    assert code == 0, output
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == uninterrupted
    kept = [path for path, time_ in done.items() if path.stat().st_mtime_ns == time_]
    assert len(kept) >= len(done) - 1  # the job of one shard may have been killed after it wrote the file


@pytest.fixture
def to_annotate(finished, tmp_path):
    """Cells without labels, and a folder with copies of the packed model and of its language model.

    Returns the folder, the cells, and the arguments of Snakemake.
    """
    study = scanpy.datasets.pbmc68k_reduced()[::20]
    query = anndata.AnnData(study.raw.X.copy(), study.obs[[]], study.raw.var[[]])
    query.X.data = np.rint(np.expm1(query.X.data) * 2)
    query.X.eliminate_zeros()
    query.write_h5ad(tmp_path / "mine.h5ad")
    work = tmp_path / AWKWARD
    for name in ("config", "resources"):
        shutil.copytree(finished / name, work / name)
    shutil.copytree(finished / "results/tiny/model", work / "packed")
    (work / "mine.yaml").write_text("run: mine\nannotate: {shards: 2}\n")
    named = [f"query={tmp_path / 'mine.h5ad'}", f"model={work / 'packed'}"]
    return work, query, ("annotate", "--configfile", work / "mine.yaml", "--config", *named, "--cores", "1")


def test_a_model_annotates_new_cells_with_and_without_the_workflow(to_annotate, tmp_path):
    work, query, arguments = to_annotate
    code, output = snakemake(work, *arguments)
    assert code == 0, output
    found = anndata.read_h5ad(work / "annotated/mine/annotated.h5ad")
    assert list(found.obs_names) == list(query.obs_names) and (found.X != query.X).nnz == 0
    assert found.obs["cell2text_description"].str.startswith("This is a").all()
    assert not (work / "annotated/mine/counts.h5ad").exists() and not (work / "results").exists()
    assert files_with(SECRET, contents(work)) == []
    assert "Nothing to be done" in snakemake(work, *arguments)[1]

    command = [sys.executable, "-m", "cell2text", "annotate", tmp_path / "mine.h5ad", "--model", work / "packed"]
    command += ["--out", tmp_path / "out", "--models", work / "resources/models"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow/scripts")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    # equal but for rounding: the command reads in one batch what the workflow reads in two
    ours, theirs = (folder / "cells.tsv.gz" for folder in (work / "annotated/mine", tmp_path / "out"))
    pd.testing.assert_frame_equal(pd.read_csv(ours, sep="\t"), pd.read_csv(theirs, sep="\t"), rtol=0, atol=1e-3)
    texts = [[row["text"] for row in read_jsonl(path.with_name("descriptions.jsonl"))] for path in (ours, theirs)]
    assert texts[0] == texts[1]
    for page in (tmp_path / "out/annotate.html", work / "annotated/mine/annotate.html"):
        assert "The map is" not in page.read_text() and "mine.h5ad" in page.read_text()
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 1 and run.stderr.splitlines()[-1].endswith("or add --overwrite")
    here = cell2text.annotate(query, work / "packed", models=work / "resources/models")
    columns = [name for name in found.obs if name.startswith("cell2text_")]
    both = [
        table.obs[columns].astype(dict.fromkeys(table.obs.select_dtypes("category"), object)) for table in (here, found)
    ]
    pd.testing.assert_frame_equal(*both, rtol=0, atol=1e-3)

    (work / "results/pbmc68k").mkdir(parents=True)
    shutil.copytree(work / "packed", work / "results/pbmc68k/model")
    shutil.copy(tmp_path / "mine.h5ad", work / "my.h5ad")
    notebook = json.loads((ROOT / "docs/annotate.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=work, env=environment)
    assert run.returncode == 0, run.stderr
    assert "Cluster 0" in run.stdout and "of the counts are in genes of the model" in run.stdout

    (work / "packed/projector.safetensors").write_bytes(b"others")
    code, output = snakemake(work, *arguments)
    assert code != 0 and "projector.safetensors: has changed" in output and "Traceback" not in output


def test_labelled_cells_add_their_types_with_and_without_the_workflow(to_annotate, tmp_path):
    work, query, arguments = to_annotate
    study = scanpy.datasets.pbmc68k_reduced()
    others = study[~study.obs_names.isin(query.obs_names)]
    kinds = {"CD19+ B": "CL:0000556", "CD14+ Monocyte": "CL:0001054", "CD8+ Cytotoxic T": "CL:0000794"}
    added = kinds["CD19+ B"]  # any type that the model does not know
    others = others[[row for kind in kinds for row in others.obs_names[others.obs["bulk_labels"] == kind][:5]]]
    labels = others.obs[["bulk_labels"]].astype(str).replace(kinds).set_axis(["cell_type_ontology_term_id"], axis=1)
    labelled = anndata.AnnData(others.raw.X.copy(), labels, others.raw.var[[]])
    labelled.X.data = np.rint(np.expm1(labelled.X.data) * 2)
    labelled.write_h5ad(tmp_path / "labelled.h5ad")
    named = (*arguments[:-2], f"examples={tmp_path / 'labelled.h5ad'}", *arguments[-2:])
    code, output = snakemake(work, *named)
    assert code == 0, output
    assert "Nothing to be done" in snakemake(work, *named)[1]
    found = pd.read_csv(work / "annotated/mine/cells.tsv.gz", sep="\t")
    taken = found["cell2text_cell_type_guess_id"] == added
    b_cells = (study[query.obs_names].obs["bulk_labels"] == "CD19+ B").to_numpy()
    assert taken[b_cells].mean() > 0.5 > taken[~b_cells].mean()
    assert found.loc[taken, "cell2text_description"].str.startswith("This is a megakaryocyte.").all()
    assert found.loc[taken, "cell2text_cell_type_guess_confidence"].isna().all()
    assert found.loc[~taken, "cell2text_cell_type_guess_confidence"].notna().all()
    assert "megakaryocyte" in (work / "annotated/mine/annotate.html").read_text()

    command = [sys.executable, "-m", "cell2text", "annotate", tmp_path / "mine.h5ad", "--model", work / "packed"]
    command += ["--out", tmp_path / "out", "--models", work / "resources/models"]
    command += ["--examples", tmp_path / "labelled.h5ad"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow/scripts")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    theirs = pd.read_csv(tmp_path / "out/cells.tsv.gz", sep="\t")
    pd.testing.assert_frame_equal(found, theirs, rtol=0, atol=1e-3)

    for values, line in (
        ((f"examples={tmp_path / 'none.h5ad'}", *named[4:6]), "config: examples: no such file: "),
        ((f"examples={tmp_path / 'labelled.h5ad'}",), "config: examples: are for a query. Add query=my.h5ad model=..."),
    ):
        code, output = snakemake(work, *arguments[:4], *values, "--cores", "1")
        assert code != 0 and line in output and "Traceback (most" not in output, output


@pytest.mark.slow
def test_a_search_is_refused_before_anything_runs_and_plans_what_annotate_does(to_annotate, with_geneformer, tmp_path):
    work, cells, _ = to_annotate
    named = (f"input={tmp_path / 'mine.h5ad'}", f"model={with_geneformer / 'results/tiny/model'}")

    def search(*values):
        command = ("search", "--configfile", work / "mine.yaml", "--cores", "1", "--dry-run", "--config")
        return snakemake(work, *command, *values)

    for values, line in (
        (("query=", *named), "query: is empty. Write what to search for"),
        (("query=B cell", f"model={work / 'packed'}", named[0]), "this model cannot search. Train it with `retrieval:"),
        ((f"query={tmp_path / 'mine.h5ad'}", named[1]), "config: input: is missing. Add input=my.h5ad"),
    ):
        code, output = search(*values)
        assert code != 0 and output.count(line) == 1 and "Traceback (most" not in output, output
    code, output = search("query={B} cells $(touch planted); `touch planted`", *named)
    assert code == 0 and "search_cells" in output and not list(work.rglob("planted")), output

    command = [sys.executable, "-m", "cell2text", "annotate", tmp_path / "mine.h5ad", "--out", tmp_path / "out"]
    command += ["--model", with_geneformer / "results/tiny/model"]
    command += ["--models", with_geneformer / "resources/models", "--search", "B cell; blood"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow/scripts")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    ranked = pd.read_csv(tmp_path / "out/search/results.tsv", sep="\t")
    for query, found in ranked.groupby("query"):
        assert query in ("B cell", "blood") and sorted(found["cell_id"]) == sorted(cells.obs_names)
        assert found["rank"].tolist() == list(range(1, len(cells) + 1)) and found["score"].is_monotonic_decreasing


@pytest.mark.slow
def test_cell_types_are_refined_with_and_without_the_workflow(to_annotate, with_geneformer, tmp_path):
    """The model that can do so is the one whose run compares graphs."""
    work, cells, arguments = to_annotate
    model = with_geneformer / "results/tiny/model"
    (work / "mine.yaml").write_text("run: mine\nannotate: {shards: 2, graph: true}\n")
    line = "this model cannot refine cell types. Train it with `graph: {refine: true}` in its config"
    code, output = snakemake(work, *arguments)
    assert code != 0 and output.count(line) == 1 and "Traceback (most" not in output, output
    command = [sys.executable, "-m", "cell2text", "annotate", tmp_path / "mine.h5ad", "--out", tmp_path / "out"]
    command += ["--models", with_geneformer / "resources/models", "--graph", "--model"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow/scripts")}
    given = {"capture_output": True, "text": True, "cwd": tmp_path, "env": environment}
    run = subprocess.run([*command, work / "packed"], **given)
    assert run.returncode == 1 and run.stderr.splitlines()[-1].endswith(line) and not (tmp_path / "out").exists()

    other = [f"model={model}" if str(one).startswith("model=") else one for one in arguments]
    code, output = snakemake(work, *other)
    assert code == 0, output
    assert "Nothing to be done" in snakemake(work, *other)[1]
    assert len(list((work / "annotated/mine/refined").iterdir())) == 2
    facts = anndata.read_h5ad(work / "annotated/mine/annotated.h5ad").uns["cell2text"]["graph"]
    assert facts["neighbours"] == 15 and set(facts["accuracy"]) == {"before", "after", "shuffled"}
    assert "were refined among similar cells of this file" in (work / "annotated/mine/annotate.html").read_text()
    run = subprocess.run([*command, model], **given)
    assert run.returncode == 0, run.stderr
    ours, theirs = (folder / "cells.tsv.gz" for folder in (work / "annotated/mine", tmp_path / "out"))
    pd.testing.assert_frame_equal(pd.read_csv(ours, sep="\t"), pd.read_csv(theirs, sep="\t"), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_killed_annotation_resumes_to_the_same_bytes(to_annotate):
    work, _, arguments = to_annotate
    folder = work / "annotated/mine"
    assert snakemake(work, *arguments)[0] == 0
    results = ("annotated.h5ad", "cells.tsv.gz", "clusters.tsv", "descriptions.jsonl")
    uninterrupted = {name: (folder / name).read_bytes() for name in results}
    for last in ("tokens/mine.parquet", "scores/0.safetensors", "clusters.tsv"):
        shutil.rmtree(folder)
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--snakefile",
            ROOT / "Snakefile",
            "--directory",
            work,
            *arguments,
        ]
        run = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (folder / last).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert (folder / last).exists() and not (folder / "annotated.h5ad").exists()
        assert snakemake(work, "--configfile", work / "mine.yaml", "--unlock")[0] == 0
        code, output = snakemake(work, *arguments, "--rerun-incomplete")
        assert code == 0, output
        assert {name: (folder / name).read_bytes() for name in results} == uninterrupted


def test_the_slurm_profile_plans_the_same_jobs(fresh):
    assert planned(fresh, "--workflow-profile", str(ROOT / "profiles/slurm"))[0] == planned(fresh)[0]


@pytest.mark.parametrize("name", ["snakemake-report.html", "snakemake-report.zip"])
def test_the_snakemake_report_builds(finished, name):
    code, output = snakemake(finished, "--configfile", finished / "tiny.yaml", "--report", finished / name)
    assert code == 0, output
    assert (finished / name).stat().st_size > 100_000


def sheet(folder, **changes):
    table = pd.read_csv(folder / "config/datasets.tsv", sep="\t", dtype=str, keep_default_na=False)
    for column, value in changes.items():
        table[column] = value
    table.to_csv(folder / "config/datasets.tsv", sep="\t", index=False)


def settings(folder, old, new):
    path = folder / "tiny.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


MISTAKES = {
    "unknown key": (
        lambda folder: settings(folder, "seed: 1", "seeds: 1"),
        r"tiny\.yaml: keys: .*'seeds' was unexpected.*config/README\.md",
    ),
    "value out of range": (
        lambda folder: settings(folder, "epochs: 2", "epochs: -1"),
        r"tiny\.yaml: finetune\.epochs: -1 is less than the minimum of 0",
    ),
    "secret": (
        lambda folder: settings(folder, "source: tiny-model", f"source: hf://me:{SECRET}@hub/name@main"),
        r"tiny\.yaml: language_model\.source: a user name, password or token",
    ),
    "shares": (
        lambda folder: settings(folder, "train: 0.6", "train: 0.9"),
        r"tiny\.yaml: split_shares: the three shares do not sum to 1",
    ),
    "missing file": (
        lambda folder: sheet(folder, source="nowhere.h5ad"),
        r"config/datasets\.tsv line 2: source: no such file: nowhere\.h5ad",
    ),
    "unknown column": (
        lambda folder: sheet(folder, tisue="UBERON:0000178"),
        r"config/datasets\.tsv line 2: keys: .*'tisue' was unexpected",
    ),
    "no sheet": (
        lambda folder: (folder / "config/datasets.tsv").unlink(),
        r"config/datasets\.tsv: no such file",
    ),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_in_the_config_are_reported_before_anything_runs(fresh, mistake):
    make, expected = MISTAKES[mistake]
    make(fresh)
    code, output = snakemake(fresh, "--cores", "1", "--configfile", fresh / "tiny.yaml")
    assert code != 0
    reported = [line for line in output.splitlines() if re.search(expected, line)]
    assert len(reported) == 1, output
    assert "Traceback" not in output and SECRET not in output
    assert not (fresh / "results").exists()
    assert files_with(SECRET, contents(fresh)) == [fresh / "tiny.yaml"] * (mistake == "secret")


def test_orthologues_are_fetched_for_a_study_of_mice_unless_the_table_is_local(fresh):
    (fresh / "mice.tsv").write_text("dataset\tsource\tspecies\nmice\tmice.h5ad\tmouse\n")
    (fresh / "mice.h5ad").touch()
    (fresh / "pairs.csv").touch()
    settings = (fresh / "tiny.yaml").read_text().replace("config/datasets.tsv", "mice.tsv")
    (fresh / "mice.yaml").write_text(settings)
    (fresh / "local.yaml").write_text(f"{settings}genes:\n  orthologues: pairs.csv\n")
    # `--cores` ends the list of config files, which a target would be read as
    assert "fetch_resource" in planned(fresh, "--cores", "1", "models", config="mice.yaml")[0]
    rules, _ = planned(fresh, config="local.yaml")
    assert "fetch_dataset" in rules and "fetch_resource" not in rules


def test_texts_about_genes_are_fetched_for_their_encoder_alone(fresh):
    (fresh / "own.tsv").write_text("gene_id\ttext\nCD3D\tantigen\n")
    assert not {"describe_genes", "fetch_resource"} & planned(fresh)[0]
    settings(fresh, "kind: coexpression\n  dimensions: 8", "kind: gene_text")
    assert {"describe_genes", "fetch_resource"} <= planned(fresh)[0]
    settings(fresh, "kind: gene_text", "kind: gene_text\n  texts: [own.tsv]")
    rules, _ = planned(fresh)
    assert "describe_genes" in rules and "fetch_resource" not in rules


@pytest.mark.slow
def test_a_model_of_gene_texts_describes_cells_of_genes_that_it_never_saw(fresh):
    random = np.random.default_rng(0)
    new = [f"ENSG{100_000 + number:011d}" for number in range(400)]
    rows = [
        f"{gene}\t{' '.join(random.choice(['antigen', 'kinase', 'channel', 'histone', 'actin', 'ribosome'], 3))}\n"
        for gene in [*scanpy.datasets.pbmc68k_reduced().var_names, *new]
    ]
    (fresh / "own.tsv").write_text("gene_id\ttext\n" + "".join(rows))
    settings(fresh, "kind: coexpression\n  dimensions: 8", "kind: gene_text\n  texts: [own.tsv]")
    code, output = snakemake(fresh, "--cores", "1", "--configfile", fresh / "tiny.yaml")
    assert code == 0, output
    assert planned(fresh)[0] == set()
    counts = random.poisson(2.0, size=(30, 400)).astype(np.float32)
    symbols = [f"ZNF{9000 + number}" for number in range(400)]
    anndata.AnnData(counts, var=pd.DataFrame({"feature_name": symbols}, index=new)).write_h5ad(fresh / "new.h5ad")
    given = ["--config", "query=new.h5ad", "model=results/tiny/model"]
    code, output = snakemake(fresh, "annotate", "--cores", "1", "--configfile", fresh / "tiny.yaml", *given)
    assert code == 0, output
    found = pd.read_csv(fresh / "annotated/new/cells.tsv.gz", sep="\t")
    assert len(found) == 30 and found.filter(like="cell_type").notna().any(axis=1).all()
    assert json.loads((fresh / "annotated/new/fit.json").read_text())["counts_in_model"] == 1
    genes = pd.read_csv(fresh / "annotated/new/evidence.tsv", sep="\t")["gene"]
    assert len(genes) and set(genes) <= set(symbols)


def test_a_run_inherits_nothing_from_the_demo(fresh):
    (fresh / "mine.yaml").write_text("run: mine\ndatasets: config/datasets.tsv\n")
    assert "Splitting the corpus by donors" in planned(fresh, config="mine.yaml")[1]
    code, output = snakemake(fresh, "--dry-run")
    assert code == 0 and "Splitting the corpus by cells" in output and "results/pbmc68k/report.html" in output
    code, output = snakemake(fresh, "--dry-run", "--config", "datasets=config/datasets.tsv")
    assert code != 0 and "add --configfile" in output
    (fresh / "nameless.yaml").write_text("datasets: config/datasets.tsv\n")
    code, output = snakemake(fresh, "--dry-run", "--configfile", fresh / "nameless.yaml")
    assert code != 0 and "nameless.yaml: keys: 'run' is a required property" in output


def test_an_error_in_a_rule_is_reported_in_one_line_without_a_traceback(fresh):
    sheet(fresh, label_column="no_such_column")
    target = "results/tiny/cells/pbmc68k.h5ad"
    code, output = snakemake(fresh, target, "--cores", "1", "--configfile", fresh / "tiny.yaml")
    assert code != 0
    log = (fresh / "logs/tiny/fetch_dataset/pbmc68k.log").read_text()
    assert "no column no_such_column" in log.splitlines()[-1]
    assert "Traceback" not in output + log
    assert not list(fresh.glob("results/tiny/**/*.h5ad"))
