"""The one error for mistakes in the user's input."""


class InputError(Exception):
    """A mistake in the user's input, reported in one line: where, what is wrong, how to fix it.

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
        line = f"{where}: {problem}. {fix}"
        super().__init__(" ".join(line.split()))
