"""The model card: what the model is, what it learnt from, how well it does and where it stops, in Markdown."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from cell2text.contracts import SPLITS
from cell2text.evaluation.methods import METHODS
from cell2text.files import whole_file
from cell2text.report.limits import tell_limits
from cell2text.report.results import Results

SCORES = {"Cell type accuracy": ("cell_type", "accuracy"), "Macro-F1": ("cell_type", "macro_f1")}
LEARNT = {
    "lora": "a LoRA adapter of rank {lora_rank}",
    "full": "all its weights",
    "qlora": "a LoRA adapter of rank {lora_rank} on weights of 4 bits",
}


def write_model_card(results: Results, run: str, notes: dict[str, str], path: str | Path) -> None:
    """Write the model card of a run.

    Parameters
    ----------
    results
        Of the run.
    run
        Its name.
    notes
        What the sheet of datasets says a reader should know, by dataset.
    path
        The Markdown file to write.
    """
    sections = (_model(results, run), _data(results), _scores(results), _limits(results, notes), _traces(results))
    text = "\n\n".join("\n".join(section) for section in sections)
    with whole_file(path) as unfinished:
        unfinished.write_text(f"{text}\n", encoding="utf-8")


def _model(results: Results, run: str) -> Iterator[str]:
    model, base = results.model, results.model["language_model"]
    types = len(model["labels"]["cell_type"])
    learnt = LEARNT[model["finetune"].get("mode", "lora")].format(**model["finetune"])
    yield f"# Cell2Text model of the run {run}"
    yield ""
    yield (
        f"Describes a cell in words from its gene counts: cell type, tissue, disease, sex, developmental stage and "
        f"active gene programmes. A `{model['projector']['kind']}` projector turns vectors of {model['dimensions']} "
        f"dimensions into soft tokens; of the language model {learnt} learnt, with the projector "
        f"{model['trainable_parameters']:,} weights. It can say {types} cell types and no other."
    )
    yield ""
    licence = escape(base.get("licence", "not stated"))
    yield f"- Language model: {escape(base['source'].split('#')[0])}, licence: {licence}"
    yield f"- Epoch kept: {model['best_epoch']}, with {model['validation_loss']:.4f} nats a token on validation cells"
    yield "- To load: `cell2text.model.cell2text.load(directory, language_model)`, with `model/` as the directory"


def _data(results: Results) -> Iterator[str]:
    yield "## Data"
    yield ""
    yield "| dataset | cells | kept | source |"
    yield "|---|---|---|---|"
    for row in results.qc:
        cells = f"{escape(row['dataset_id'])} | {row['cells']:,} | {row['kept']:,} | {escape(row.get('source', ''))}"
        yield f"| {cells.replace(chr(10), ' ')} |"
    yield ""
    counts = ", ".join(f"{name} {results.audit['cells'][name]:,}" for name in SPLITS)
    yield f"Split by {escape(results.audit['split'])}: {counts} cells. Licences are those of the sources."


def _scores(results: Results) -> Iterator[str]:
    yield "## Scores"
    yield ""
    yield f"On {len(results.cells):,} test cells, by ontology id, with 95% intervals:"
    yield ""
    yield f"| method | {' | '.join(SCORES)} |"
    yield "|---|" + "---|" * len(SCORES)
    for method, about in METHODS.items():
        scores = [results.metric(method, *figure) for figure in SCORES.values()]
        if all(scores):
            told = [f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" for score in scores]
            yield f"| {about.title} | {' | '.join(told)} |"


def _limits(results: Results, notes: dict[str, str]) -> Iterator[str]:
    yield "## Limits"
    yield ""
    yield "- For research. What it writes of a cell is a guess from its counts, not a diagnosis."
    for limit in tell_limits(results, notes):
        yield f"- {escape(limit, quote=False)}"


def _traces(results: Results) -> Iterator[str]:
    packages = results.provenance.get("packages", {})
    yield "## Traces"
    yield ""
    yield f"- Seed {results.model['seed']}; configuration, SHA-256: `{results.provenance['config']}`"
    yield f"- Packages: {', '.join(f'{name} {version}' for name, version in sorted(packages.items()))}"
