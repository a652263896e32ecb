"""The chat prompt around the soft tokens of a cell, made with the language model's own chat template.

Transformers renders a template in Jinja's sandbox: it can neither reach Python's attributes nor change anything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cell2text.errors import InputError

SOURCE = "config: language_model.source"
INSTRUCTION = "Describe the cell."
_CELL = "\N{BLACK SQUARE}"  # marks the place of the soft tokens while the prompt is still text
# Some templates state today's date: with this one instead, a model reads the same prompt whenever it runs.
_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


@dataclass(frozen=True)
class Prompt:
    """Token ids before and after the soft tokens.

    Parameters
    ----------
    before, after
        int64 (tokens,).
    """

    before: Tensor
    after: Tensor

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Prompt":
        """Split the model's own chat template where the cell goes, so that no reserved token is needed.

        Raises
        ------
        InputError
            If the template fails, or does not show a message exactly once.
        """
        text = _render(tokenizer) if tokenizer.chat_template else f"{INSTRUCTION} {_CELL}\n"
        halves = [tokenizer(half, add_special_tokens=False)["input_ids"] for half in text.split(_CELL)]
        return cls(*(torch.tensor(half, dtype=torch.long) for half in halves))


def _render(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt as text that contains the mark of the cell once."""
    conversations = [[{"role": "user", "content": f"{INSTRUCTION} {_CELL}"}]]
    if "system" in str(tokenizer.chat_template):
        # Some templates add a long system message of their own when there is none; others refuse a system message.
        system = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": _CELL}]
        conversations.insert(0, system)
    for messages in conversations:
        try:
            text = apply_template(tokenizer, messages, add_generation_prompt=True)
        except InputError as error:
            failed = error
            continue
        if text.count(_CELL) == 1 and INSTRUCTION in text:
            return text
        problem = f"its chat template shows a message {text.count(_CELL)} times instead of once, or changes it"
        failed = InputError(SOURCE, problem, "Correct the template, or remove it from the model's folder")
    raise failed


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: bool) -> str:
    """Return messages rendered by the tokenizer's chat template.

    Raises
    ------
    InputError
        If the template fails.
    """
    try:
        template = _DATE + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except MemoryError:
        raise
    except Exception as error:  # the code in a template can raise any exception
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = f"its chat template fails ({reason})"
        raise InputError(SOURCE, problem, "Correct the template, or remove it from the model's folder") from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the first token after a message of the assistant; None if there is no template or nothing follows."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": INSTRUCTION}, {"role": "assistant", "content": _CELL}]
    rest = apply_template(tokenizer, messages).rpartition(_CELL)[2].strip()
    return next(iter(tokenizer(rest, add_special_tokens=False)["input_ids"]), None)
