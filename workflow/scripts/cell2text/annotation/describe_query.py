"""The descriptions of the cells to annotate, with the confidences of a new study."""

from pathlib import Path

from cell2text.generation.generate_descriptions import generate_descriptions


def describe_query(model: str, scores: str, embeddings: str, descriptions: str) -> None:
    """Describe the cells of a file of scores.

    Parameters
    ----------
    model
        Folder of a packed model.
    scores, embeddings
        Files of ``contracts.SCORES`` and ``contracts.EMBEDDINGS`` of the cells.
    descriptions
        Output file, JSONL with the fields of ``contracts.PREDICTIONS``.
    """
    folder = Path(model)
    generate_descriptions(
        model,
        scores,
        str(folder / "confidence.json"),
        str(folder / "reference.safetensors"),
        str(folder / "terms.parquet"),
        [embeddings],
        descriptions,
        split="query",
        new_study=True,
    )
