"""Compare fine-tuned models with different settings or seeds, and the baselines of a run, on the same test cells.

    .venv/bin/snakemake --cores all models embeddings \\
        results/studies-2000/baselines/{majority,knn,pca_logistic}.parquet --configfile tests/config/studies_2000.yaml
    .venv/bin/python tests/benchmarks/compare_models.py tests/config/studies_2000.yaml models.tsv \\
        --variants "" "projector.kind=mlp" "finetune.balance=true finetune.epochs=2" --seeds 42 1

All models use the run's corpus and embeddings; the seed determines only weights, batches and noise. Each model is added
to the table when it is scored, and models in the table are not trained again.
"""

import argparse
import logging
import sys
from pathlib import Path

import pandas as pd
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "workflow/scripts"))

from cell2text.confidence.calibrate import calibrate
from cell2text.confidence.choose_thresholds import choose_thresholds
from cell2text.config import check_config
from cell2text.contracts import CELLS, DESCRIPTIONS, HISTORY, PREDICTIONS, TERM_SLOTS
from cell2text.embedding.vectors import Embeddings
from cell2text.evaluation.baselines.aligned import predict_aligned
from cell2text.evaluation.bootstrap import Bootstrap
from cell2text.evaluation.metrics import known, score_method
from cell2text.files import read_json, read_jsonl
from cell2text.finetuning.finetune import finetune
from cell2text.generation.generate_descriptions import generate_descriptions
from cell2text.generation.score_candidates import score_candidates
from cell2text.settings import FinetuneSettings, ProjectorSettings

ROOT = Path(__file__).parents[2]
METRICS = (("cell_type", "accuracy"), ("cell_type", "macro_f1"), ("tissue", "accuracy"), ("pathways", "jaccard"))
COLUMNS = ["variant", "seed", "method", *(f"{slot} {metric}" for slot, metric in METRICS), "parsed"]
COLUMNS += ["weights to train", "tokens/s", "minutes", "best epoch", "validation accuracy of each epoch"]


def settings_of(config: str, variant: str) -> dict:
    """Return a configuration, updated with the keys of a variant."""
    merged = yaml.safe_load(Path(config).read_text())
    for change in variant.split():
        key, value = change.split("=")
        section, name = key.split(".")
        merged[section] = {**merged.get(section, {}), name: yaml.safe_load(value)}
    return check_config(merged, ROOT / "workflow/schemas/config.schema.yaml", config)


def score(predictions: pd.DataFrame, truth: pd.DataFrame, bootstrap: Bootstrap) -> dict[str, str]:
    """Return the metrics of a method on the test cells, as text with their confidence intervals."""
    predictions = predictions.set_index("cell_id").loc[truth["cell_id"]].reset_index()
    predictions = predictions.assign(**{f"{slot}_id": known(predictions[f"{slot}_id"]) for slot in TERM_SLOTS})
    rows = {score.key: score.row() for score in score_method(truth, predictions, {}, bootstrap)}
    found = {f"{key[0]} {key[1]}": "{value:.3f} [{low:.3f}, {high:.3f}]".format(**rows[key]) for key in METRICS}
    return found | {"parsed": f"{(predictions['status'] == 'parsed').sum()}/{len(predictions)}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="configuration of a run with corpus, embeddings and baselines")
    parser.add_argument("table", type=Path, help="rows are added to it; models go to a folder of the same name")
    parser.add_argument("--variants", nargs="+", default=[""], help='such as "projector.kind=mlp finetune.epochs=2"')
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)

    config = settings_of(arguments.config, "")
    results = ROOT / "results" / config["run"]
    language_model = str(ROOT / "resources/models" / config["language_model"]["name"])
    corpus, terms = str(results / "corpus/cells.parquet"), str(results / "corpus/terms.parquet")
    descriptions = str(results / "corpus/descriptions.parquet")
    embeddings = Embeddings(sorted(map(str, results.glob("embeddings/*/*.safetensors"))))
    truth = DESCRIPTIONS.read(descriptions).merge(CELLS.read(corpus, ["cell_id", "donor"]), on="cell_id")
    truth = truth[truth["split"] == "test"].sort_values("cell_id", ignore_index=True)
    truth = truth.assign(**{f"{slot}_id": known(truth[f"{slot}_id"]) for slot in TERM_SLOTS})
    bootstrap = Bootstrap(truth["donor"], config["evaluate"]["bootstrap"], 42)

    def add(variant: str, seed: int | str, method: str, predictions: pd.DataFrame, **about: str) -> None:
        row = {"variant": variant, "seed": seed, "method": method, **score(predictions, truth, bootstrap), **about}
        line = pd.DataFrame([row]).reindex(columns=COLUMNS)
        line.to_csv(arguments.table, sep="\t", index=False, mode="a", header=not arguments.table.exists())
        print(line.to_string(index=False), flush=True)

    table = (
        pd.read_csv(arguments.table, sep="\t", dtype=str, keep_default_na=False) if arguments.table.exists() else None
    )
    done = set() if table is None else set(zip(table["variant"], table["seed"], strict=True))
    if not done:
        for path in sorted(results.glob("baselines/*.parquet")):
            predictions = PREDICTIONS.read(path)
            add("", "", path.stem, predictions[predictions["split"] == "test"])
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if (variant, str(seed)) in done:
                continue
            settings = settings_of(arguments.config, variant)
            folder = arguments.table.with_suffix("") / f"{variant.replace(' ', ',') or 'default'}-{seed}"
            model = folder / "model"
            sections = ProjectorSettings(**settings["projector"]), FinetuneSettings(**settings["finetune"])
            finetune(language_model, descriptions, terms, embeddings, str(model), *sections, seed, "")
            files = (str(model), language_model, corpus, terms, embeddings)
            predict_aligned(*files, str(folder / "aligned.parquet"), ["test"])
            calibration, reference, confidence = (
                str(folder / name) for name in ("calibration.json", "reference.safetensors", "confidence.json")
            )
            scores = {split: str(folder / f"{split}.safetensors") for split in ("validation", "test")}
            for split, path in scores.items():
                score_candidates(*files, path, split, settings["generate"]["batch_cells"])
            known = files[0], [scores["validation"]], None, descriptions
            calibrate(*known, embeddings.files, calibration, reference, seed)
            choose_thresholds(calibration, *known, terms, confidence, settings["generate"]["confidence"])
            fitted = confidence, reference
            texts = str(folder / "test.jsonl")
            generate_descriptions(files[0], scores["test"], *fitted, terms, embeddings.files, texts, "test")
            about = read_json(model / "cell2text.json")
            history = HISTORY.read(model / "history.parquet")
            history = history[history["stage"] != "align"]
            whole = history[history["stage"] == "finetune"]  # the steps with whole texts
            accuracies = history["validation_accuracy"].dropna()
            further = {
                "weights to train": f"{about['trainable_parameters'] / 1e6:.2f} M",
                "tokens/s": f"{(whole['tokens'] / whole['seconds'].diff()).median():.0f}",
                "minutes": f"{history['seconds'].iloc[-1] / 60:.1f}",
                "best epoch": str(about["best_epoch"]),
                "validation accuracy of each epoch": " ".join(f"{value:.3f}" for value in accuracies),
            }
            add(variant, seed, "cell2text", pd.DataFrame(read_jsonl(folder / "test.jsonl")), **further)
            add(variant, seed, "aligned", PREDICTIONS.read(folder / "aligned.parquet"))


if __name__ == "__main__":
    main()
