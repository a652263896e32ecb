"""What every rule's script does around its work: a log, seeds, and errors a user can read."""

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

from cell2text.errors import InputError

MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD in malloc.h


def run_job(main: Callable[[Any], None], snakemake: Any) -> None:
    """Run a script's ``main`` with its log file open.

    Messages go to the rule's log and to the terminal. A mistake of the user's ends the job with one line
    and exit code 1; anything else leaves its traceback in the log and is raised.

    Parameters
    ----------
    main
        Called with the ``snakemake`` object.
    snakemake
        What Snakemake hands to a script. ``params.seed``, where the rule has it, seeds Python and numpy.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if snakemake.log:
        Path(snakemake.log[0]).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(snakemake.log[0], mode="w"))
    logging.basicConfig(
        level=logging.INFO,
        handlers=handlers,
        format=f"%(asctime)s {snakemake.rule}: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for noisy in ("fontTools", "httpx", "numba", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    seed_everything(snakemake.params.get("seed", 0))
    if "cell2text.cells.h5ad" in sys.modules:  # only jobs that read counts: it slows torch on CPUs by a fifth
        give_memory_back()
    log = logging.getLogger("cell2text")
    try:
        main(snakemake)
    except InputError as error:
        log.error("%s", error)
        sys.exit(1)
    except Exception:
        log.exception("failed")
        raise


def seed_everything(seed: int) -> None:
    """Seed Python's and numpy's global generators; code that uses torch seeds it where it is used."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries such as umap read the global generator


def give_memory_back() -> None:
    """Return the memory of a freed block to the operating system at once, if the C library is glibc.

    By default glibc keeps freed memory. It becomes fragmented, the next block may not fit into any gap, and the
    process grows with each block that it reads.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)


def stay_offline() -> None:
    """Keep Hugging Face libraries off the network: only the fetch rules may use it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
