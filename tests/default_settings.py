"""Sections of the configuration for tests and benchmarks: the schema's defaults, with changes."""

from pathlib import Path

from cell2text import settings
from cell2text.config import check_config

SCHEMA = Path(__file__).parents[1] / "workflow/schemas/config.schema.yaml"


def _section(kind, name, changes):
    return kind(**(check_config({"run": "defaults"}, SCHEMA, "defaults")[name] | changes))


def encoder_settings(**changes):
    return _section(settings.EncoderSettings, "encoder", changes)


def projector_settings(**changes):
    return _section(settings.ProjectorSettings, "projector", changes)


def finetune_settings(**changes):
    return _section(settings.FinetuneSettings, "finetune", changes)


def qc_settings(**changes):
    return _section(settings.QcSettings, "qc", changes)
