"""A disk that takes only small files, without the rights to mount one."""

import resource
from contextlib import contextmanager


@contextmanager
def small_files(size):
    """Let every write beyond ``size`` bytes of a file fail (EFBIG), as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
