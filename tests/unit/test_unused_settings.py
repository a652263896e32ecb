"""A setting that other settings make ineffective is refused, and the schema knows which ones those are."""

import json
import re
from inspect import signature
from pathlib import Path

import pytest
import yaml

from cell2text.config import check_config
from cell2text.errors import InputError
from cell2text.model.projectors import PROJECTORS

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "workflow/schemas/config.schema.yaml"
SECTIONS = yaml.safe_load(SCHEMA.read_text())["properties"]
CONDITIONS = [
    (section, key, other, values)
    for section, entry in SECTIONS.items()
    for key, rule in entry.get("properties", {}).items()
    for other, values in rule.get("only_with", {}).items()
]
OTHER_VALUES = {
    "generate.agreement": 0.9,
    "qc.max_doublet_score": 0.2,
    "encoder.source": "models/geneformer",
    "encoder.layer": -1,
    "encoder.size": "tiny",
    "finetune.lora_targets": ["q_proj"],
    "finetune.lora_dropout": 0.1,
    "finetune.dora": True,
    "finetune.rslora": True,
}


def values_of(section, key):
    rule = SECTIONS[section]["properties"][key]
    named = {
        "score_doublets": [True, False],
        "batch_tokens": [None, 500],
        "refine": [False, True],
        "compare": [False, True],
        "train": [False, True],
    }
    return rule.get("enum") or named[key]


def changed(section, key):
    default = SECTIONS[section]["properties"][key]["default"]
    return OTHER_VALUES[f"{section}.{key}"] if f"{section}.{key}" in OTHER_VALUES else default * 2


def check(section, **settings):
    if settings.get("kind") == "geneformer":
        settings = {"source": "models/geneformer"} | settings
    return check_config({"run": "x", section: settings}, SCHEMA, "my.yaml")


@pytest.mark.parametrize(("section", "key", "other", "values"), CONDITIONS)
def test_a_setting_without_effect_is_refused_in_one_line(section, key, other, values):
    value = changed(section, key)
    for chosen in values_of(section, other):
        if chosen in values:
            assert check(section, **{key: value, other: chosen})[section][key] == value
            continue
        given, wanted = json.dumps(value), " or ".join(map(json.dumps, values))
        line = (
            f"my.yaml: {section}.{key}: {given} has no effect with {section}.{other}: {json.dumps(chosen)}. "
            f"Remove it, or set {section}.{other} to {wanted}"
        )
        with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
            check(section, **{key: value, other: chosen})


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("projector", {"kind": "mlp", "soft_tokens": 4}),
        ("projector", {"layers": 4}),
        ("encoder", {"kind": "pretrain", "dimensions": 32}),
        ("encoder", {"source": "hf://org/name@main"}),
        ("finetune", {"mode": "full", "lora_rank": 8}),
        ("finetune", {"batch_tokens": 500, "batch_cells": 4}),
        ("qc", {"score_doublets": False, "max_doublet_score": 0.25}),
    ],
)
def test_known_cases_of_settings_without_effect(section, settings):
    with pytest.raises(InputError, match="has no effect with"):
        check(section, **settings)


def test_a_default_that_another_file_repeats_is_no_mistake():
    assert check("projector", kind="mlp", soft_tokens=8, layers=2)["projector"]["kind"] == "mlp"


@pytest.mark.parametrize("kind", sorted(PROJECTORS))
def test_a_projector_takes_the_settings_that_the_schema_gives_it(kind):
    rules = SECTIONS["projector"]["properties"]
    given = {key for key, rule in rules.items() if kind in rule.get("only_with", {}).get("kind", [kind])} - {"kind"}
    assert set(signature(PROJECTORS[kind]).parameters) - {"dimensions", "width"} == given


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("coexpression", ["coexpression"]),
        ("geneformer", ["geneformer"]),
        ("pretrain", ["pretrain", "masked_genes"]),
        ("gene_text", ["gene_text"]),
    ],
)
def test_an_encoder_reads_the_settings_that_the_schema_gives_it(kind, modules):
    folder = ROOT / "workflow/scripts/cell2text/embedding/encoders"
    read = {key for name in modules for key in re.findall(r"settings\.(\w+)", (folder / f"{name}.py").read_text())}
    rules = SECTIONS["encoder"]["properties"]
    given = {key for key, rule in rules.items() if kind in rule.get("only_with", {}).get("kind", [])}
    assert read == given - {"source", "texts"}  # which are read by fetch_encoder and describe_genes
