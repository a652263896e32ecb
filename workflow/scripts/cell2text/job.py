"""Shared by the scripts of all rules: logging, seeds, and errors that a user can read."""

import ctypes
import logging
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cell2text.errors import InputError, in_one_line
from cell2text.files import writing

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h
INVOCATION = "CELL2TEXT_INVOCATION"  # environment variable, different for each call of Snakemake; its jobs inherit it
MEETING = "CELL2TEXT_MEETING"  # environment variable of processes that srun starts: the address where they meet


def find_process_number() -> int | None:
    """Return the number of this process, from 0, among those that ``processes.run_on_nodes`` started; None if alone."""
    return int(os.environ["SLURM_PROCID"]) if MEETING in os.environ else None


def run_job(main: Callable[[Any], None], snakemake: Any) -> None:
    """Run a script's ``main`` with its log file open.

    Messages go to the rule's log and to the terminal. An ``InputError`` ends the job with one line and exit code 1; any
    other exception is logged with its traceback and raised. A job that failed in this way would fail again: if
    Snakemake retries it in the same invocation, it ends at once with the same line. Only jobs that a signal or a lost
    node stopped, or that ran out of memory, start again.

    Parameters
    ----------
    main
        Called with the ``snakemake`` object.
    snakemake
        The object that Snakemake passes to a script. ``params.seed``, if the rule has it, seeds Python and numpy.
    """
    failure = Path(f"{snakemake.log[0]}.failed") if snakemake.log else None
    number = find_process_number()
    logging.raiseExceptions = False  # on a full disk, each line would be followed by a traceback
    logging.basicConfig(
        level=logging.ERROR if number else logging.INFO,  # the first of several processes reports
        stream=sys.stderr,
        format=f"%(asctime)s {snakemake.rule}: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("fontTools", "httpx", "numba", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if "transformers" in sys.modules:  # its bars would fill a log with a line per redraw
        sys.modules["transformers"].logging.disable_progress_bar()
    log = logging.getLogger("cell2text")
    if failure and failure.is_file():
        invocation, _, message = failure.read_text().partition(" ")
        if invocation == os.environ.get(INVOCATION):
            log.error("%s", message)
            sys.exit(1)
        failure.unlink()
    seed_everything(snakemake.params.get("seed", 0))
    if "cell2text.cells.h5ad" in sys.modules:  # only in jobs that read counts: it makes torch on CPUs a fifth slower
        give_memory_back()
    try:
        if snakemake.log:
            _log_to(Path(snakemake.log[0]), new=number is None)
        main(snakemake)
        log.info("threads: %d", snakemake.threads)  # on a CPU, results depend on their number in the last digits
    except Exception as raised:
        error = in_one_line(raised)
        if error is raised and failure and INVOCATION in os.environ:
            with suppress(OSError):  # the disk may be full
                failure.write_text(f"{os.environ[INVOCATION]} {error}")
        if isinstance(error, InputError):
            log.error("%s", error)
            sys.exit(1)
        log.exception("failed")
        raise


def _log_to(path: Path, new: bool) -> None:
    root = logging.getLogger()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if new:
            path.write_text("")
        file = logging.FileHandler(path)  # appends, because processes on several nodes write to the same file
    file.setFormatter(root.handlers[0].formatter)
    root.addHandler(file)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python and numpy; code that uses torch seeds it itself."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries such as umap read the global generator


def give_memory_back() -> None:
    """Make glibc return the memory of large freed blocks to the operating system at once; no effect elsewhere.

    By default glibc keeps freed memory. It becomes fragmented, the next block may not fit into any gap, and the
    process grows with each block of counts that it reads.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)
