"""The configuration and the sheet of datasets: defaults, and mistakes reported before any rule runs."""

import json
from pathlib import Path

import pytest
import yaml

from cell2text.cells.choose_census_cells import with_descendants
from cell2text.config import check_config, check_files, cut_census, read_datasets
from cell2text.errors import InputError

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "workflow/schemas"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A user's folder with the files that the defaults name."""
    for name in ("config/datasets.tsv", "resources/programmes.gmt", "resources/programmes.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(text):
    config = check_config(yaml.safe_load(text), SCHEMAS / "config.schema.yaml", "my.yaml")
    check_files(config, "my.yaml")
    return config


def error_of(text):
    with pytest.raises(InputError) as error:
        check(text)
    return str(error.value)


def test_a_config_with_only_its_run_has_the_documented_defaults():
    config = check("run: mine")
    assert config["split"] == "donors"
    assert config["split_shares"] == {"train": 0.8, "validation": 0.1, "test": 0.1}
    assert (config["finetune"]["opening_epochs"], config["finetune"]["epochs"]) == (1, 0)


def test_the_order_of_keys_and_defaults_that_are_written_out_change_nothing():
    caps = "{natural: {any: 0.1, 'UBERON:0000178': 0.2}, donor: {any: 0.5}}"
    given = check(f"{{run: mine, qc: {{min_counts: 5, mads: 5}}, sample: {{caps: {caps}, cells: 300}}}}")
    caps = "{donor: {any: 0.5}, natural: {'UBERON:0000178': 0.2, any: 0.1}}"
    other = check(f"{{sample: {{cells: 300, caps: {caps}}}, qc: {{min_counts: 5}}, run: mine, annotate: {{}}}}")
    assert repr(given) == repr(other)  # as Snakemake compares the parameters of rules
    written = json.loads(json.dumps(given, sort_keys=True))
    assert repr(check_config(written, SCHEMAS / "config.schema.yaml", "config.json")) == repr(given)


def test_epochs_of_zero_train_the_projector_alone():
    assert check("{run: mine, finetune: {opening_epochs: 0, epochs: 0}}")["finetune"]["epochs"] == 0
    assert check("{run: mine, finetune: {opening_epochs: 2, epochs: 0}}")["finetune"]["align_steps"] == 600
    assert "finetune.epochs: 0 is less than the minimum of 1" in error_of("{run: mine, evaluate: {greedy: true}}")
    nothing = "{run: mine, finetune: {opening_epochs: 0, epochs: 0, align_steps: 0}}"
    assert "finetune.align_steps: 0 is less than the minimum of 1" in error_of(nothing)
    greedy = "{run: mine, finetune: {opening_epochs: 2, epochs: 0}, evaluate: {greedy: true}}"
    assert "finetune.epochs: 0 is less than the minimum of 1" in error_of(greedy)


@pytest.mark.parametrize(
    "name", ["..", ".", ".hidden", "-n", "a/b", "/a", "a\n", "a b", "~", "", "é", "a" * 101, "$(id)"]
)
@pytest.mark.parametrize("key", ["run", "language_model.name", "encoder.source", "dataset"])
def test_a_name_that_becomes_a_path_cannot_leave_its_folder(folder, key, name):
    if key == "dataset":
        if "\n" in name or not name:
            pytest.skip("such a line has no dataset")
        (folder / "sheet.tsv").write_text(f"dataset\tsource\n{name}\tscanpy://pbmc68k_reduced\n")
        with pytest.raises(InputError) as error:
            read_datasets("sheet.tsv", SCHEMAS / "datasets.schema.yaml")
        message = str(error.value)
    else:
        values = {"run": "mine"}
        if key == "run":
            values = {"run": name}
        elif key == "language_model.name":
            values["language_model"] = {"name": name}
        elif not name or name.startswith("/") or "/" in name:
            pytest.skip("only the last part of a source becomes a name")
        else:
            values["encoder"] = {"kind": "geneformer", "source": f"x/{name}"}
        with pytest.raises(InputError) as error:
            check_config(values, SCHEMAS / "config.schema.yaml", "my.yaml")
        message = str(error.value)
    assert "cannot be the name of a file or folder" in message
    assert "\n" not in message
    assert key in message


@pytest.mark.parametrize("name", ["pbmc68k", "2024_01", "a..b", "A-1.0", "x" * 100])
def test_usual_names_are_accepted(name):
    assert check(f"run: '{name}'")["run"] == name


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run: r\nqc:", ["my.yaml: qc: the section is empty", "delete the line"]),
        ("run: 2024_01", ["my.yaml: run: YAML reads this as the number 202401", "in quotes"]),
        ("run: r\nfinetune: {learning_rate: 1e-3}", ["finetune.learning_rate: YAML reads 1e-3 as text: write 0.001"]),
        ("run: r\nfinetune: {epochs: '0'}", ["finetune.epochs: 0 is quoted, or nested in a value of --config"]),
        ("run: r\nfinetune: {learning_rate: fast}", ["finetune.learning_rate: 'fast' is not of type 'number'"]),
        ("run: r\nqc: {mads: .nan}", ["my.yaml: qc.mads: nan is not a finite number"]),
        ("run: r\nfinetune: {learning_rate: .inf}", ["finetune.learning_rate: inf is not a finite number"]),
        ("run: r\nsample: {caps: {natural: {donor: .nan}}}", ["sample.caps.natural.donor: nan is not a finite"]),
        ("seed: 1", ["'run' is a required property"]),
        ("run: r\nseeds: 1", ["'seeds' was unexpected"]),
        ("run: r\ngenes: {table: 'a{b}.tsv'}", ["genes.table: Snakemake reads the braces in a{b}.tsv"]),
        ("run: r\npathways: {gene_sets: none.gmt}", ["pathways.gene_sets: no such file: none.gmt"]),
        ("run: r\nsplit: none.tsv", ["my.yaml: split: no such file: none.tsv"]),
        ("run: r\nsplit_shares: {train: 0.5}", ["the three shares do not sum to 1"]),
    ],
)
def test_a_mistake_in_the_config_says_what_to_write(text, parts):
    message = error_of(text)
    for part in parts:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("a\tx.h5ad", ["sheet.tsv line 2: source: no such file: x.h5ad"]),
        ("a\t{x}.h5ad", ["sheet.tsv line 2: source: Snakemake reads the braces in {x}.h5ad"]),
        ("a\tscanpy://x\nA\tscanpy://x", ["sheet.tsv line 3: dataset: A repeats"]),
    ],
)
def test_a_mistake_in_the_sheet_names_its_line(folder, row, parts):
    (folder / "sheet.tsv").write_text(f"dataset\tsource\n{row}\n")
    with pytest.raises(InputError) as error:
        read_datasets("sheet.tsv", SCHEMAS / "datasets.schema.yaml")
    for part in parts:
        assert part in str(error.value)


SECRETS = ["hf://me:s3cret@hub/name@main", "https://s3cret@example.org/a.h5ad", "https://example.org/a?token=s3cret"]


@pytest.mark.parametrize("source", SECRETS)
@pytest.mark.parametrize("key", ["language_model.source", "encoder.source", "query", "source", "cell_table"])
def test_a_secret_in_a_source_is_refused_and_not_repeated(folder, key, source):
    if "." in key or key == "query":
        section, _, name = key.partition(".")
        message = error_of(yaml.safe_dump({"run": "mine", section: {name: source} if name else source}))
        assert message.startswith(f"my.yaml: {key}: a user name, password or token")
    else:
        row = {"source": "scanpy://pbmc68k_reduced"} | {key: source}
        (folder / "sheet.tsv").write_text("\t".join(["dataset", *row]) + "\n" + "\t".join(["a", *row.values()]) + "\n")
        with pytest.raises(InputError, match=rf"^sheet\.tsv line 2: {key}: a user name, password or token") as error:
            read_datasets("sheet.tsv", SCHEMAS / "datasets.schema.yaml")
        message = str(error.value)
    assert "s3cret" not in message and "set HF_TOKEN" in message


def test_a_line_of_an_error_is_short_and_holds_no_control_characters():
    message = error_of(f'run: r\nsplit: "{"x" * 1_000_000}"')
    assert len(message) < 3000
    line = str(InputError("a.h5ad", "\x1b[31mred\x07\n\u202ereversed", "Correct\tit"))
    assert line == "a.h5ad: \ufffd[31mred\ufffd \ufffdreversed. Correct it"


def test_a_census_row_becomes_one_dataset_per_shard():
    rows = {"big": {"dataset": "big", "source": "census://2025-01-30", "notes": "n", "min_genes": "5"}}
    rows |= {"own": {"dataset": "own", "source": "own.h5ad"}}
    assert cut_census(rows, 2) == {"big": ["big-0", "big-1"]}
    with pytest.raises(InputError, match="big-1: a shard of big has this name"):
        cut_census(rows | {"big-1": {"dataset": "big-1", "source": "x.h5ad"}}, 2)
    rows["big"] |= {"tissue": "UBERON:0000178"}
    with pytest.raises(InputError, match="tissue of big: the Census brings its own labels"):
        cut_census(rows, 2)


def test_the_config_at_the_papers_scale_is_valid():
    config = yaml.safe_load((ROOT / "config/cellxgene.yaml").read_text())
    config = check_config(config, SCHEMAS / "config.schema.yaml", "config/cellxgene.yaml")
    assert sum(config["sample"]["shares"].values()) == pytest.approx(1)
    rows = read_datasets(ROOT / config["datasets"], SCHEMAS / "datasets.schema.yaml")
    assert cut_census(rows, config["shards"]) == {"census": [f"census-{shard}" for shard in range(16)]}
    assert len(config["census"]["leave_out_datasets"]) == 4
    assert len(with_descendants(config["census"]["leave_out_assays"])) >= 10
