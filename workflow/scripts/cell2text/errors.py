"""The one error that a user's input may raise."""


class InputError(Exception):
    """A mistake in what the user gave, told in one line: the place, what is wrong, how to mend it.

    Parameters
    ----------
    where
        The file, and the field in it where there is one, as in ``"config/datasets.tsv: label_column"``.
    problem
        What is wrong there.
    fix
        What the user should do.
    """

    def __init__(self, where: object, problem: str, fix: str):
        line = f"{where}: {problem}. {fix}"
        super().__init__(" ".join(line.split()))
