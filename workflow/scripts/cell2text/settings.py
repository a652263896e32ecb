"""The sections of a checked configuration as frozen dataclasses.

A rule hands its sections to a script as plain dictionaries, which Snakemake can compare; the script turns each into
one of these classes once. There are no defaults here: they stand in ``workflow/schemas/config.schema.yaml``, and
``config/README.md`` says what each key does.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class QcSettings:
    """The section ``qc``: limits of a whole transcriptome, and how doublets are treated."""

    min_genes: int
    min_counts: int
    max_mitochondrial_percent: float
    mads: float | None
    score_doublets: bool
    max_doublet_score: float | None


@dataclass(frozen=True)
class SampleSettings:
    """The section ``sample``: how many cells are drawn, and what each way of drawing favours."""

    cells: int
    shares: dict[str, float]
    caps: dict[str, dict[str, float]]


@dataclass(frozen=True)
class CensusSettings:
    """The section ``census``: which datasets, organs and assays of CELLxGENE Census are taken."""

    datasets: list[str]
    tissues: list[str]
    leave_out_datasets: list[str]
    leave_out_assays: list[str]


@dataclass(frozen=True)
class EncoderSettings:
    """The section ``encoder``; which keys count depends on ``kind``."""

    kind: str
    top_k: int
    views: int
    cache: bool
    dimensions: int
    source: str | None
    texts: list[str]
    layer: int
    size: str
    epochs: int
    batch_cells: int
    learning_rate: float


@dataclass(frozen=True)
class ProjectorSettings:
    """The section ``projector``."""

    kind: str
    soft_tokens: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class FinetuneSettings:
    """The section ``finetune``."""

    fast: str | bool
    align_steps: int
    align_to: str
    align_weight: float
    view_share: float
    opening_epochs: int
    epochs: int
    curriculum: bool
    patience: int
    keep_best: str
    batch_cells: int
    batch_tokens: int | None
    learning_rate: float
    projector_learning_rate: float
    mode: str
    lora_rank: int
    lora_alpha: float
    lora_targets: str | list[str]
    lora_dropout: float
    dora: bool
    rslora: bool
    accumulate: int
    checkpoint_activations: bool
    balance: bool
    gpus: int
    nodes: int
    checkpoint_steps: int
