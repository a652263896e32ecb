"""Time and memory of each rule, from Snakemake's benchmark files."""

from pathlib import Path
from typing import Any

import pandas as pd

from cell2text.files import read_jsonl


def rule_costs(benchmarks: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Return jobs, seconds, CPU seconds and peak memory (MB) of each rule, the longest first.

    Values that were not measured ("NA", for jobs of less than half a second) are None.

    Parameters
    ----------
    benchmarks
        Benchmark files of each rule, one per job, with one record; files that do not exist are skipped.
    """
    records = [
        {"rule": rule, **record}
        for rule, files in sorted(benchmarks.items())
        for path in files
        if Path(path).is_file()
        for record in read_jsonl(path)
    ]
    table = pd.DataFrame(records, columns=["rule", "s", "max_rss", "cpu_time"])
    for column in ("s", "max_rss", "cpu_time"):
        table[column] = pd.to_numeric(table[column], errors="coerce")
    costs = table.groupby("rule").agg(
        jobs=("s", "size"),
        seconds=("s", "sum"),
        cpu_seconds=("cpu_time", lambda times: times.sum(min_count=1)),
        peak_mb=("max_rss", "max"),
    )
    costs = costs.reset_index().sort_values(["seconds", "rule"], ascending=[False, True])
    return costs.astype(object).where(costs.notna(), None).to_dict("records")
