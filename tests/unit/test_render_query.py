"""The page of an annotated file: content, the user's own map, samples of many cells, and that all input is escaped."""

import base64
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cell2text.annotation import render_query as module
from cell2text.annotation.annotate_query import annotation_columns
from cell2text.annotation.cluster_text import clusters_table
from cell2text.annotation.clusters import Cluster, TermShare
from cell2text.annotation.render_query import lay_out_sample, pack_percent, pack_texts, render_query
from cell2text.contracts import CLUSTERS, EMBEDDINGS, EVIDENCE, PREDICTIONS, QC, TERM_SLOTS
from cell2text.files import write_json
from cell2text.report import page as page_module
from report_run import HOSTILE, Page

CELLS = 30
B_CELL = TermShare("CL:0000236", "B cell", 0.9)
CALIBRATION = {
    "slots": {},
    "thresholds": {"cell_type": {"value": 0.6, "confidence": 0.8, "cells": 9, "guaranteed": True}},
    "ranking": {"weights": [0, 1], "none": 0.0, "steps": None, "cells": 9},
    "programmes": {"slope": 1.0, "intercept": 0.0, "steps": None, "programmes": 9},
    "limit": 2.0,
    "studies": {},
    "new_studies": None,
    "least_lead": None,
    "projector_alone": None,
}
FIT = {
    "cells_without_genes": 1,
    "genes": 1500,
    "genes_in_model": 1200,
    "model_genes": 2400,
    "model_genes_measured": 1200,
    "counts_in_model": 0.4,
    "median_counts": 700.0,
    "training_median_counts": 1300.0,
    "warnings": ["only 40% of the counts are in genes of the model"],
}


@pytest.fixture
def render(tmp_path):
    """Return a function that writes the inputs for a number of cells and renders their page."""

    def run(cells=CELLS, obsm=None, text="", names=None, calibration=CALIBRATION):
        ids = [f"mine|{i}" for i in range(cells)]
        labelled = np.arange(cells) % 3 < 2
        empty = np.arange(cells) == 5  # a cell without a gene of the model
        rows = pd.DataFrame({name: [None] * cells for name in PREDICTIONS.columns}, dtype=object)
        for slot in TERM_SLOTS:
            rows[f"{slot}_name"] = rows[f"{slot}_reported_name"] = None
        rows["cell_type_name"] = np.where(empty, None, np.where(labelled, f"B cell{text}", "T cell"))
        rows["cell_type_confidence"] = np.where(empty, np.nan, np.where(labelled, 0.7, 0.3))
        rows["cell_type_reported_name"] = np.where(labelled & ~empty, f"lymphocyte{text}", None)
        rows["cell_type_reported_confidence"] = np.where(labelled & ~empty, 0.96, np.nan)
        rows["tissue_name"] = f"blood{text}"
        rows["programmes"] = [[f"cytotoxicity{text}", "glycolysis"]] * cells
        rows["novelty"] = np.where(empty, np.nan, np.linspace(1, 3, cells))
        rows["novel"] = np.linspace(1, 3, cells) > 2
        rows["flag"] = [f"too few counts ({i} < 99)" if i % 10 == 0 else "" for i in range(cells)]
        rows["text"] = [f"This is a cell{text}. Its number is {i % 4}." for i in range(cells)]
        of_cells = [f"{'b' if i % 5 else 'NA'}{text}" for i in range(cells)]
        CLUSTERS.write(pd.DataFrame({"cell_id": ids, "cluster": of_cells}, dtype=object), tmp_path / "clusters.parquet")
        EVIDENCE.write(pd.DataFrame(columns=list(EVIDENCE.columns)), tmp_path / "evidence.parquet")
        columns = annotation_columns(rows, *(str(tmp_path / f"{name}.parquet") for name in ("clusters", "evidence")))
        columns.index = names or [f"{text}cell-{i}" for i in range(cells)]
        annotated = ad.AnnData(np.zeros((cells, 1), dtype=np.float32), obs=columns)
        for name, values in (obsm or {}).items():
            annotated.obsm[name] = values
        annotated.write_h5ad(tmp_path / "annotated.h5ad")
        qc = {name: [None] * cells for name in QC.columns} | {"cell_id": ids, "n_counts": 1.0, "n_genes": 1}
        qc |= {"mitochondrial_percent": 0.0, "ribosomal_percent": 0.0, "doublet_score": np.nan, "kept": True}
        types = {"n_genes": "int32", "mitochondrial_percent": "float32", "ribosomal_percent": "float32"}
        QC.write(pd.DataFrame(qc).astype(types | {"doublet_score": "float32"}), tmp_path / "qc.parquet")
        sizes = pd.Series(of_cells).value_counts()
        found = [
            Cluster(name, int(size), B_CELL, B_CELL, None, (f"CD79A{text}",), (), 0.1, 0.0, None)
            for name, size in sizes.items()
        ]
        clusters_table(found).to_csv(tmp_path / "clusters.tsv", sep="\t", index=False)
        pooled = np.random.default_rng(0).normal(size=(cells, 4)).astype(np.float32)
        tensors = {"gene_vectors": np.zeros((cells, 0, 4), np.float16), "lengths": np.zeros(cells, np.int32)}
        EMBEDDINGS.write(tensors | {"pooled": pooled}, ids, tmp_path / "0.safetensors")
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/README.md").write_text(f"# Model of blood{text}\n\nMore.")
        about = {"training_cells": 1734, "labels": {"cell_type": ["a", "b"]}, "seal": "0" * 64}
        write_json(about, tmp_path / "model/cell2text.json")
        write_json(calibration, tmp_path / "model/confidence.json")
        write_json(FIT, tmp_path / "fit.json")
        evidence = f"cluster\tcell_type\tside\trank\tgene\tshare\nNA{text}\tB cell\tfor\t1\tMS4A1{text}\t0.5\n"
        (tmp_path / "evidence.tsv").write_text(evidence)
        files = ("annotated.h5ad", "qc.parquet", "fit.json", "clusters.tsv", "evidence.tsv")
        inputs = [str(tmp_path / name) for name in files]
        last = [str(tmp_path / "0.safetensors")], str(tmp_path / "model"), str(tmp_path / "annotate.html")
        render_query(f"folder/my{text.replace('/', '')}.h5ad", *inputs, *last, seed=1)
        html = (tmp_path / "annotate.html").read_text(encoding="utf-8")
        page = Page(html)
        return html, page, json.loads(page.scripts[0])

    return run


def unpack(text):
    return np.frombuffer(base64.b64decode(text), dtype="<u2")


def test_the_page_tells_what_the_types_of_new_studies_rest_on(render):
    threshold = {"value": 0.9, "confidence": 0.8, "cells": 9, "guaranteed": True, "studies": 7}
    new = CALIBRATION | {"thresholds": {"cell_type": threshold}}
    text = " ".join(render(calibration=CALIBRATION | {"new_studies": new})[1].text.split())
    assert "With 7 training studies held out in turn, at most 20% of the cells of a further study" in text
    assert "probably too high" not in text
    new = CALIBRATION | {"thresholds": {"cell_type": threshold | {"guaranteed": False, "studies": 3}}}
    assert "held out in turn" not in render(calibration=CALIBRATION | {"new_studies": new})[1].text


def named(column):
    return [[*column["names"], None][code] for code in unpack(column["codes"])]


def test_the_page_shows_what_is_known_of_the_file(render):
    _, page, data = render()
    text = " ".join(page.text.split())
    assert "my.h5ad 30 cells, described by the model “Model of blood”. It was trained on 1,734 cells of 2 cell" in text
    assert "folder" not in text  # no paths
    assert "With a reported cell type66.7%" in text and "Novel51.7%" in text and "Flagged by QC10.0%" in text
    assert "Caution: only 40% of the counts are in genes of the model" in text
    assert "The file measures 1,200 of the model’s 2,400 genes" in text and "at least 700 counts" in text
    assert "1 cells have no counts" not in text and "1 cell has no counts in genes of the model" in text
    assert "for yours they are probably too high" in text  # no confidences of new studies
    assert "held out in turn" not in text
    assert "a confidence of 80% was requested" in text and "“Not determined” means" in text
    assert (
        'Cluster "b" (24 cells): B cell (90% of the cells; also the most frequent guess, 90%). Markers: CD79A' in text
    )
    assert "Genes that argue most for B cell: MS4A1; against it: none." in text
    assert text.index('Cluster "b"') < text.index('Cluster "NA"')  # as in the file
    assert "95% 20 0" in text and "70% 20 20" in text  # reported, guessed
    assert "novel: far from the training cells 15" in text and "flagged: too few counts 3" in text
    assert "drawn evenly" not in text
    columns = data["columns"]
    assert [*columns["cell_type"]["names"], columns["cell_type"]["empty"]] == ["lymphocyte", 10]
    assert named(columns["guess"])[:6] == ["B cell", "B cell", "T cell", "B cell", "B cell", None]
    assert columns["flag"]["names"] == ["too few counts"] and columns["programme"]["names"] == ["cytotoxicity"]
    assert dict(zip(columns["cluster"]["names"], data["markers"], strict=True))["NA"] == ["CD79A"]
    assert sum(columns["novelty"]["sizes"]) + columns["novelty"]["empty"] == CELLS
    assert columns["novelty"]["names"][-1] == "novel" and columns["novelty"]["sizes"][-1] == 15
    last = data["texts"][unpack(data["text"])[29]]
    assert [data["sentences"][i] for i in last] == ["This is a cell.", "Its number is 1."]


def test_nothing_is_requested_from_elsewhere(render):
    html, page, _ = render()
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(value.startswith(("#", "data:")) for value in links)
    assert "http://" not in html and "https://" not in html and "url(" not in html and "@import" not in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_all_user_input_is_escaped(render):
    _, page, data = render(text=HOSTILE)
    _, plain, _ = render()
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.scripts) == 2 and "pointMap" in page.scripts[1]
    assert not set("<>&'\u2028") & set(page.scripts[0])
    assert data["cells"][0] == f"{HOSTILE}cell-0" and HOSTILE in data["sentences"][0]
    for name in ("cell_type", "guess", "cluster", "programme", "tissue_guess"):
        assert any(HOSTILE in one for one in data["columns"][name]["names"])
    assert HOSTILE in page.text  # displayed literally


def test_no_user_input_reaches_the_page_as_html_by_script():
    script = "".join(path.read_text() for path in page_module.FOLDER.glob("*.js"))
    assert "pointMap" in script and not any(
        unsafe in script for unsafe in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(")
    )


def test_of_many_cells_a_sample_is_shown_and_counts_are_of_all(render, monkeypatch):
    monkeypatch.setattr(module, "MOST_CELLS", 12)
    html, page, data = render()
    text = " ".join(page.text.split())
    assert "Map and search show 12 of 30 cells, drawn evenly at random (seed 1)." in text
    assert (
        'Cluster "b" (24 cells)' in text
        and "flagged: too few counts 3" in text
        and "With a reported cell type66.7" in text
    )
    assert len(data["cells"]) == len(unpack(data["x"])) == len(unpack(data["confidence"])) == 12 and data["total"] == 30
    assert data["columns"]["cell_type"]["sizes"] == [20] and data["columns"]["cluster"]["sizes"] == [24, 6]
    assert render()[0] == html  # the seed is fixed


def test_only_frequent_names_have_a_colour_and_all_shown_ones_can_be_found():
    values = pd.Series([f"type {i}" for i in range(20) for _ in range(40 - i)])
    column = module.encode("Type", values, np.arange(len(values)))
    assert column["sizes"] == list(range(40, 28, -1)) and len(column["names"]) == 20
    assert len(module.encode("Type", values, np.array([0]))["names"]) == 12


@pytest.mark.parametrize(
    ("obsm", "chosen"),
    [
        (("X_pca", "X_mine", "X_tsne", "X_umap"), "X_umap"),
        (("X_pca", "X_mine", "X_tsne"), "X_tsne"),
        (("X_pca", "X_mine"), "X_mine"),
        (("X_pca",), "X_pca"),
        (("X_wide",), None),
    ],
)
def test_the_files_own_map_is_preferred(render, obsm, chosen):
    made = {name: np.random.default_rng(i).normal(size=(CELLS, 2)) for i, name in enumerate(obsm)}
    made |= {name: np.pad(made[name], ((0, 0), (0, 3))) for name in ("X_pca", "X_wide") if name in made}
    _, page, data = render(obsm=made)
    text = " ".join(page.text.split())
    if not chosen:
        assert "The file has no embedding" in text
        return
    assert f"The map is the file’s own embedding, {chosen}." in text
    for axis, name in enumerate("xy"):
        assert np.corrcoef(unpack(data[name]), made[chosen][:, axis])[0, 1] > 0.9999


def test_an_embedding_that_lacks_cells_is_no_map(render):
    umap = np.full((CELLS, 2), np.nan)
    _, page, _ = render(
        obsm={"X_umap": umap, "X_table": pd.DataFrame(umap, [f"cell-{i}" for i in range(CELLS)], ["a", "b"])}
    )
    assert "The file has no embedding" in " ".join(page.text.split())


def test_one_cell(render):
    _, page, data = render(cells=1, names=["alone"])
    assert "1 cell, described by" in page.text and data["cells"] == ["alone"]
    assert (data["width"], data["height"]) == (1, 1)


def test_beyond_a_sample_cells_are_placed_amid_their_neighbours(monkeypatch):
    monkeypatch.setattr(module, "MOST_LAID_OUT", 40)
    groups = np.repeat(np.eye(2) * 50, 100, axis=0)
    places = lay_out_sample(groups + np.random.default_rng(0).normal(size=groups.shape), 1)
    assert places.shape == (200, 2) and places.min() == 0
    centres = places[:100].mean(axis=0), places[100:].mean(axis=0)
    right = np.linalg.norm(places - centres[0], axis=1) < np.linalg.norm(places - centres[1], axis=1)
    assert right[:100].all() and not right[100:].any()


def test_confidences_and_texts_are_packed():
    assert unpack(pack_percent(pd.Series([0, 0.496, 0.998, 1, np.nan]))).tolist() == [0, 50, 99, 100, 101]
    packed = pack_texts(pd.Series(["A b. C d.", "", "A b. E.", "A b. C d."]))
    assert packed["sentences"] == ["A b.", "C d.", "", "E."] and packed["texts"] == [[0, 1], [2], [0, 3]]
    assert unpack(packed["text"]).tolist() == [0, 1, 2, 0]
