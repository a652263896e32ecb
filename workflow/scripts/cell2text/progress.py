"""Progress in plain log lines: amount done, rate and time left."""

import logging
import time

log = logging.getLogger("cell2text.progress")


class Progress:
    """Logs at most one line every ``every`` seconds; works the same in a terminal, a file and a cluster log.

    Parameters
    ----------
    total
        Amount of work, in ``unit``.
    unit
        Unit of work, as in ``"cells"``.
    done
        Work done by an earlier, interrupted run; it does not count towards the rate.
    every
        Minimum number of seconds between lines.
    """

    def __init__(self, total: int, unit: str, done: int = 0, every: float = 10.0):
        self.total, self.unit, self.done, self.every = total, unit, done, every
        self.start = self.last = time.monotonic()
        self.before = done

    def advance(self, amount: int, note: str = "") -> None:
        """Add ``amount`` to the work done; log a line if one is due or all work is done."""
        self.done += amount
        now = time.monotonic()
        if now - self.last < self.every and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.before) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        log.info(
            "%d of %d %s, %.3g %s/s, %s left%s",
            self.done, self.total, self.unit, rate, self.unit, clock(left), f", {note}" if note else "",
        )  # fmt: skip


def clock(seconds: float) -> str:
    """Return a duration as ``h:mm:ss`` or ``m:ss``.

    Examples
    --------
    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    if seconds == float("inf"):
        return "unknown"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
