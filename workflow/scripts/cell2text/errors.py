"""The one error for mistakes in the user's input, and what libraries raise if memory runs out."""

LONGEST = 1000  # characters of each part of an error's line


class InputError(Exception):
    """A mistake in the user's input, reported in one line: where, what is wrong, how to fix it.

    Values of the user may be in any of the three. Long ones are cut, and characters that control a terminal replaced.

    Parameters
    ----------
    where
        The file and, if there is one, the field, as in ``"config/datasets.tsv: label_column"``.
    problem
        What is wrong.
    fix
        What the user should do.
    """

    def __init__(self, where: object, problem: str, fix: str):
        super().__init__(f"{_in_one_line(where)}: {_in_one_line(problem)}. {_in_one_line(fix)}")


def _in_one_line(text: object) -> str:
    line = " ".join(str(text).split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST - 100]} [...] {line[-90:]}"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory ran out, on the CPU or a GPU; torch need not be imported."""
    cpu = isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
    return cpu or type(error).__name__ == "OutOfMemoryError"


def in_one_line(error: Exception) -> Exception:
    """Return an ``InputError`` in place of an exception that says that memory ran out, and any other as it is."""
    if not is_out_of_memory(error):
        return error
    problem = f"ran out ({str(error).strip() or type(error).__name__})"
    return InputError("memory", problem, "Give the job more, or run fewer jobs at once; docs/memory.md has every rule")
