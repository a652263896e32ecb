"""Time and memory of each rule, from Snakemake's benchmark files."""

from pathlib import Path
from typing import Any

import pandas as pd

from cell2text.files import read_jsonl


def rule_costs(benchmarks: str | Path, excluded: str = "render_report") -> list[dict[str, Any]]:
    """Return jobs, seconds, CPU seconds and peak memory (MB) of each rule, the longest first.

    A file ``{rule}.jsonl`` or ``{rule}/{wildcards}.jsonl`` has one record per job. Values that were not measured
    ("NA", for jobs of less than half a second) are None.

    Parameters
    ----------
    benchmarks
        Folder of the benchmark files; it may be missing or empty.
    excluded
        The rule that renders the report: its own cost is known only afterwards.
    """
    folder = Path(benchmarks)
    records = [
        {"rule": path.relative_to(folder).parts[0].removesuffix(".jsonl"), **record}
        for path in sorted(folder.glob("**/*.jsonl"))
        for record in read_jsonl(path)
    ]
    table = pd.DataFrame(records, columns=["rule", "s", "max_rss", "cpu_time"])
    table = table[table["rule"] != excluded]
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
