"""The model card in Markdown: the model, its training data, its scores and its limits."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from cell2text.contracts import SPLITS
from cell2text.evaluation.methods import METHODS, title_of
from cell2text.files import whole_file
from cell2text.report.confidence import LIKE_VALIDATION, count_novel, rate_slots
from cell2text.report.limits import describe_intervals, list_limits
from cell2text.report.results import METHOD, Results, slot_name
from cell2text.report.tables import DIFFERENCE, compare_with_best, list_unparsed

SCORES = {
    "cell type accuracy": ("cell_type", "accuracy"),
    "cell type macro-F1": ("cell_type", "macro_f1"),
    "gene programmes, Jaccard index": ("pathways", "jaccard"),
    "gene programmes, all correct": ("pathways", "subset_accuracy"),
    "calibration error, cell type": ("cell_type", "calibration_error"),
    "calibration error, gene programmes": ("pathways", "calibration_error"),
}
TRAINED = {
    "lora": "a LoRA adapter of rank {lora_rank}",
    "full": "all weights of the language model",
    "qlora": "a LoRA adapter of rank {lora_rank} on 4-bit weights",
}


def write_model_card(results: Results, run: str, notes: dict[str, str], path: str | Path) -> None:
    """Write the model card of a run.

    Parameters
    ----------
    results
        Results of the run.
    run
        Name of the run.
    notes
        Notes for readers from the sheet of datasets, by dataset.
    path
        The Markdown file to write.
    """
    sections = [_model(results, run), _data(results), _scores(results), _confidence(results)]
    sections += [_limits(results, notes), _provenance(results)]
    text = "\n\n".join("\n".join(section) for section in sections)
    with whole_file(path) as unfinished:
        unfinished.write_text(f"{text}\n", encoding="utf-8")


def _model(results: Results, run: str) -> Iterator[str]:
    model, base = results.model, results.model["language_model"]
    types = len(model["labels"]["cell_type"])
    trained = "the projector alone, by alignment"
    if model["best_epoch"]:
        tuned = TRAINED[model["finetune"].get("mode", "lora")].format(**model["finetune"])
        trained = f"the projector and {tuned} ({model['trainable_parameters']:,} parameters)"
    yield f"# Cell2Text model of run {run}"
    yield ""
    yield (
        f"This model describes a cell in words, from its gene counts: cell type, tissue, disease, sex, developmental "
        f"stage and active gene programmes. A `{model['projector']['kind']}` projector maps gene vectors of "
        f"{model['dimensions']} dimensions to soft tokens, which the language model reads. Fine-tuning trained "
        f"{trained}. The training data has {types} cell types; do not expect the model to recognise any other."
    )
    yield ""
    licence = escape(base.get("licence", "not stated"))
    yield f"- Language model: {escape(base['source'].split('#')[0])}, licence: {licence}"
    if model["best_epoch"]:
        loss = f"{model['validation_loss']:.4f} nats per token"
        yield f"- Saved weights: those of epoch {model['best_epoch']}, with a validation loss of {loss}"
    yield "- To load the model: `cell2text.model.bundle.load(directory, language_model)`; `directory` is `model/`"


def _data(results: Results) -> Iterator[str]:
    yield "## Data"
    yield ""
    yield "| dataset | cells | cells after QC | source |"
    yield "|---|---|---|---|"
    for row in results.qc:
        cells = f"{escape(row['dataset_id'])} | {row['cells']:,} | {row['kept']:,} | {escape(row.get('source', ''))}"
        yield f"| {cells.replace(chr(10), ' ')} |"
    yield ""
    counts = ", ".join(f"{name} {results.audit['cells'][name]:,}" for name in SPLITS)
    yield f"Split by {escape(results.audit['split'])}: {counts} cells. The licences of the sources apply to the data."


def _scores(results: Results) -> Iterator[str]:
    yield "## Scores"
    yield ""
    yield (
        f"On {len(results.cells):,} test cells, by ontology id, from 0 to 1, with 95% confidence intervals. "
        f"{describe_intervals(results)}"
    )
    yield ""
    yield f"| method | {' | '.join(SCORES)} |"
    yield "|---|" + "---|" * len(SCORES)
    for method, about in METHODS.items():
        scores = [results.metric(method, *metric) for metric in SCORES.values()]
        if any(scores):
            yield f"| {about.title} | {' | '.join(map(_with_interval, scores))} |"
    yield ""
    yield (
        "All correct: both sets of programmes are the same. Calibration error: the mean difference between confidence "
        "and share of right predictions; lower is better. A method without confidences has none."
    )
    for title, share in list_unparsed(results):
        yield f"{title}: {100 * share:.1f}% of the texts follow the grammar in full."
    compared = compare_with_best(results)
    if not compared:
        return
    yield ""
    yield f"{title_of(METHOD)} minus the best baseline, on the same cells and resamples:"
    yield ""
    yield "| score | best baseline | difference | verdict |"
    yield "|---|---|---|---|"
    for row in compared:
        difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*(row["baseline"][end] for end in DIFFERENCE))
        yield f"| {row['title']} | {row['baseline']['name']} | {difference} | {row['words']} |"


def _confidence(results: Results) -> Iterator[str]:
    rows = rate_slots(results)
    yield "## Confidence"
    yield ""
    yield (
        "Each guess has a confidence, calibrated on the validation cells. Next to it, the model reports the most "
        "specific term of the ontology whose probability, the sum over the candidate names at or below it, reaches the "
        'slot\'s threshold: the guess itself, a more general term, or nothing ("not determined"). A reported term is '
        "right if it is the true term or an ancestor of it."
    )
    if results.requested is not None:
        yield ""
        yield (
            f"Thresholds were chosen on the validation cells (conformal risk control), so that on average at most "
            f"{100 - 100 * results.requested:g}% of the reported terms are wrong. This assumes that new cells are like "
            f"the validation cells: {LIKE_VALIDATION}."
        )
    yield ""
    yield (
        "| slot | requested | threshold | rests on | right (precision) | cells with one (coverage) | mean depth | "
        "of the truth | calibration error of guesses | of reported terms |"
    )
    yield "|---|" + "---|" * 9
    for row in rows:
        threshold, depth = row["threshold"], row["depth"]
        requested, least = ("–", "–") if threshold is None else (f"{threshold.confidence:g}", f"{threshold.value:.3f}")
        least = "none is reported" if threshold and threshold.value > 1 else least
        depths = (f"{depth['value']:.1f}", f"{row['true_depth']:.1f}") if depth else ("–", "–")
        numbers = [_with_interval(row[name]) for name in ("precision", "coverage", "error", "reported_error")]
        slot = slot_name(row["slot"]) + (f" (only {escape(row['only'])}: not informative)" if row["only"] else "")
        cells = [slot.replace("|", "&#124;"), requested, least, row["basis"], *numbers[:2], *depths, *numbers[2:]]
        yield f"| {' | '.join(cells)} |"
    novel = count_novel(results)
    if novel:
        yield ""
        about = f"{novel['novel']:,} of {novel['cells']:,}"
        yield f"Flagged as novel, that is, far from the training cells: {about} test cells."
        if novel["unseen_cells"]:
            about = f"{novel['unseen_novel']:,} of {novel['unseen_cells']:,}"
            yield f"Among cells whose type has no training cells: {about}."


def _with_interval(score: dict[str, float] | None) -> str:
    if score is None:
        return "–"
    interval = f" [{score['low']:.3f}, {score['high']:.3f}]" if score["low"] == score["low"] else ""
    return f"{score['value']:.3f}{interval}"


def _limits(results: Results, notes: dict[str, str]) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield "- For research use only. A description is a prediction from gene counts, not a diagnosis."
    for limit in list_limits(results, notes):
        yield f"- {escape(limit, quote=False)}"


def _provenance(results: Results) -> Iterator[str]:
    packages = results.provenance.get("packages", {})
    yield "## Provenance"
    yield ""
    yield f"- Seed: {results.model['seed']}; SHA-256 of the configuration: `{results.provenance['config']}`"
    yield f"- Packages: {', '.join(f'{name} {version}' for name, version in sorted(packages.items()))}"
