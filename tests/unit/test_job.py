"""What every script does: logging, one-line errors for the user, progress."""

import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cell2text import progress
from cell2text.errors import InputError
from cell2text.job import INVOCATION, run_job
from small_disk import small_files


@pytest.fixture
def job(tmp_path):
    yield SimpleNamespace(log=[str(tmp_path / "logs/rule.log")], rule="some_rule", params={"seed": 7}, threads=3)
    logging.getLogger().handlers.clear()


def read_log(job):
    return Path(job.log[0]).read_text()


def test_an_input_error_is_one_line_and_exit_code_one(job, capsys):
    def main(snakemake):
        raise InputError("cells.h5ad: obs.label", "no such\n column", "Name a column")

    with pytest.raises(SystemExit) as stopped:
        run_job(main, job)
    assert stopped.value.code == 1
    for text in (read_log(job), capsys.readouterr().err):
        assert text.count("\n") == 1
        assert text.endswith("some_rule: cells.h5ad: obs.label: no such column. Name a column\n")


def test_any_other_error_leaves_its_traceback_in_the_log(job):
    def main(snakemake):
        raise KeyError("broken")

    with pytest.raises(KeyError):
        run_job(main, job)
    assert "Traceback" in read_log(job)


@pytest.mark.parametrize("error", [InputError("a.h5ad", "no cells", "Give cells"), KeyError("broken")])
def test_a_job_that_failed_by_itself_is_not_run_again_by_the_same_invocation(job, monkeypatch, error):
    calls = []

    def main(snakemake):
        calls.append(1)
        if len(calls) == 1:
            raise error

    monkeypatch.setenv(INVOCATION, "first")
    for _ in range(2):
        with pytest.raises((SystemExit, KeyError)):
            run_job(main, job)
    assert len(calls) == 1
    assert str(error) in read_log(job)
    monkeypatch.setenv(INVOCATION, "second")
    run_job(main, job)
    run_job(main, job)
    assert len(calls) == 3
    assert [path.name for path in Path(job.log[0]).parent.iterdir()] == ["rule.log"]


def test_a_job_that_was_terminated_runs_again(job, monkeypatch):
    calls = []

    def main(snakemake):
        calls.append(1)
        if len(calls) == 1:
            sys.exit(143)

    monkeypatch.setenv(INVOCATION, "first")
    with pytest.raises(SystemExit):
        run_job(main, job)
    run_job(main, job)
    assert len(calls) == 2


def test_a_job_that_ran_out_of_memory_is_one_line_and_runs_again(job, monkeypatch, capsys):
    sizes = [1 << 46, 1]  # the next attempt is given more memory
    monkeypatch.setenv(INVOCATION, "first")
    with pytest.raises(SystemExit) as stopped:
        run_job(lambda snakemake: np.empty(sizes.pop(0), dtype=np.uint8), job)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "some_rule: memory: ran out (Unable to allocate 64.0 TiB for an array" in line
    run_job(lambda snakemake: np.empty(sizes.pop(0), dtype=np.uint8), job)
    assert not sizes


def test_the_seed_is_set(job):
    drawn = []
    for _ in range(2):
        run_job(lambda snakemake: drawn.append(np.random.random()), job)  # noqa: NPY002 - the generator that is seeded
    assert drawn[0] == drawn[1]


def test_progress_logs_rate_and_time_left_but_not_too_often(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    shown = progress.Progress(300, "cells", done=100, every=10)
    for _ in range(20):
        now[0] += 1
        shown.advance(10)
    assert [record.getMessage() for record in caplog.records] == [
        "200 of 300 cells, 10 cells/s, 0:10 left",
        "300 of 300 cells, 10 cells/s, 0:00 left",
    ]


def test_a_log_that_cannot_be_written_is_one_line(job, tmp_path, capsys):
    (tmp_path / "logs").write_text("a file in place of the folder")
    with pytest.raises(SystemExit) as stopped:
        run_job(lambda snakemake: None, job)
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"some_rule: {job.log[0]}: cannot be written: File exists. Run in a folder" in line


def test_a_disk_that_fills_up_under_the_log_does_not_disturb_the_job(job, capsys):
    def main(snakemake):
        for number in range(50):
            logging.getLogger("cell2text").info("line %d", number)

    with small_files(300):
        run_job(main, job)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 51 and lines.pop().endswith("some_rule: threads: 3")
    assert all(f"some_rule: line {number}" in line for number, line in enumerate(lines))
    assert len(read_log(job)) <= 300
