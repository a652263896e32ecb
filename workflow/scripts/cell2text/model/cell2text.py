"""The model: a chat prompt with the soft tokens of a cell in it, and a language model that answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cell2text.errors import InputError
from cell2text.model.prompt import Prompt


class Cell2Text(nn.Module):
    """A causal language model with a projector in front.

    Parameters
    ----------
    language_model
        Any causal language model of transformers, possibly wrapped by PEFT.
    tokenizer
        Its tokenizer.
    projector
        One of ``projectors.PROJECTORS``.
    about
        What ``bundle.save`` writes next to the weights, as JSON.

    Attributes
    ----------
    fast
        Whether training takes the fast path (``model.fast``) or plain transformers and PEFT.
    """

    fast = False

    def __init__(
        self,
        language_model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        projector: nn.Module,
        about: dict[str, Any],
    ):
        super().__init__()
        self.language_model, self.tokenizer, self.projector = language_model, tokenizer, projector
        self.about = about
        self.prompt = Prompt.of(tokenizer)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.projector.scale.device

    @property
    def base_model(self) -> PreTrainedModel:
        """The language model without PEFT's wrapper; its layers carry the adapter."""
        model = self.language_model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return the language model's own embeddings of token ids."""
        return self.language_model.get_input_embeddings()(ids)

    @property
    def positions(self) -> int | None:
        """Greatest number of tokens that the language model has positions for; None if it has no limit."""
        return count_positions(self.base_model.config)

    @property
    def vocabulary(self) -> int:
        """Number of logits that the language model computes for each token."""
        return self.base_model.config.get_text_config().vocab_size

    @torch.no_grad()
    def count_prompt(self, vectors: Tensor, lengths: Tensor) -> tuple[int, int]:
        """Return the number of tokens before a cell's text, and how many of them are soft tokens.

        Parameters
        ----------
        vectors, lengths
            Input of the projector for any cells; see its ``forward``.
        """
        soft, _ = self.projector(vectors.to(self.device), lengths.to(self.device))
        return len(self.prompt.before) + soft.shape[1] + len(self.prompt.after), soft.shape[1]

    def prompt_embeddings(self, soft: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prompt of each cell as embeddings, (cells, prompt, width), and its mask, bool (cells, prompt).

        Parameters
        ----------
        soft, present
            Soft tokens of each cell and their mask, as the projector returns them.
        """
        before, after = (
            self.embed_tokens(half.to(soft.device)).expand(len(soft), -1, -1)
            for half in (self.prompt.before, self.prompt.after)
        )
        prompt = torch.cat([before, soft.to(before.dtype), after], dim=1)
        mask = torch.cat([present.new_ones(before.shape[:2]), present, present.new_ones(after.shape[:2])], dim=1)
        return prompt, mask

    def read_cells(self, vectors: Tensor, lengths: Tensor, skipped: int = 0) -> tuple[Tensor, Tensor]:
        """Return the prompt of each cell, padded on the left, to generate from.

        Parameters
        ----------
        vectors, lengths
            Input of the projector; see its ``forward``.
        skipped
            Number of tokens to leave out at the beginning of the prompt, before the soft tokens.

        Returns
        -------
        embeddings
            (cells, prompt, width), in the language model's dtype.
        mask
            bool (cells, prompt); false at the padding.
        """
        prompt, mask = (part[:, skipped:] for part in self.prompt_embeddings(*self.projector(vectors, lengths)))
        if bool(mask.all()):
            return prompt, mask
        # A stable sort moves the padding of the soft tokens to the left and keeps the order of the rest.
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        return _reorder(prompt, order), mask.gather(1, order)

    def text_loss(self, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed negative log likelihood of the texts in nats, and their number of tokens.

        The prompt is not scored.

        Parameters
        ----------
        soft, present
            As the projector returns them.
        text, text_mask
            Token ids of the description and the end token, int64 (cells, text), padded on the right; and their
            mask, bool, false at the padding.
        """
        logits = self.text_logits(soft, present, text, text_mask)
        return functional.cross_entropy(logits, text[text_mask], reduction="sum"), text_mask.sum()

    @torch.no_grad()
    def judge_text(
        self, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor, judged: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of :meth:`text_loss`, and which of the judged tokens greedy decoding would choose.

        Parameters
        ----------
        soft, present, text, text_mask
            As in :meth:`text_loss`.
        judged
            Tokens to judge, given the ones before them, bool (cells, text).

        Returns
        -------
        loss
            Scalar.
        chosen
            bool (cells, text); true also where no token is judged.
        """
        loss, best = self._judge(soft, present, text, text_mask, judged)
        chosen = torch.ones_like(text_mask)
        chosen[judged] = best == text[judged]
        return loss, chosen

    def _judge(
        self, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor, judged: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the most likely token at each judged position, int64 (judged,)."""
        logits = self.text_logits(soft, present, text, text_mask)
        loss = functional.cross_entropy(logits, text[text_mask], reduction="sum")
        return loss, logits.argmax(-1)[judged[text_mask]]

    def text_logits(self, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Return the logits that predict each token of the texts, float32 (tokens, vocabulary), from transformers.

        Parameters
        ----------
        soft, present, text, text_mask
            As in :meth:`text_loss`.
        """
        prompt, prompt_mask = self.prompt_embeddings(soft, present)
        embeddings = torch.cat([prompt, self.embed_tokens(text)], dim=1)
        mask = torch.cat([prompt_mask, text_mask], dim=1)
        is_text = torch.cat([torch.zeros_like(prompt_mask), text_mask], dim=1)
        # With all padding on the right, every model derives correct positions itself.
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        embeddings, mask, is_text = _reorder(embeddings, order), mask.gather(1, order), is_text.gather(1, order)
        logits = self.language_model(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False).logits
        return logits[:, :-1][is_text[:, 1:]].float()

    def accepts(self, argument: str) -> bool:
        """Return whether the language model's ``forward`` takes an argument of this name."""
        return argument in signature(self.base_model.forward).parameters

    @property
    def is_quantised(self) -> bool:
        """Whether the language model has 4-bit weights."""
        return getattr(self.base_model, "is_quantized", False)

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Cast the language model's weights to float32 and back, so that rounding hides no difference.

        4-bit weights stay as they are.
        """
        # parameters alone: buffers such as rotary frequencies are float32 in a bfloat16 model and must stay so
        dtypes = {} if self.is_quantised else {value: value.dtype for value in self.language_model.parameters()}
        for value in dtypes:
            value.data = value.data.float()
        try:
            yield
        finally:
            for value, dtype in dtypes.items():
                value.data = value.data.to(dtype)

    @contextmanager
    def head_for(self, words: Tensor) -> Iterator[None]:
        """Let the language model compute the logits of some tokens alone, if its head is an ordinary one.

        Parameters
        ----------
        words
            Token ids, int64 (words,).
        """
        head = self.base_model.get_output_embeddings()
        if type(head) is not nn.Linear:
            yield
            return
        some = nn.Linear(head.in_features, len(words), bias=False, device="meta")
        some.weight = nn.Parameter(head.weight[words], requires_grad=False)
        if head.bias is not None:
            some.bias = nn.Parameter(head.bias[words], requires_grad=False)
        self.base_model.set_output_embeddings(some)
        try:
            yield
        finally:
            self.base_model.set_output_embeddings(head)

    def checkpoint_activations(self) -> None:
        """Keep the activations of one layer at a time; the backward pass recomputes the others (arXiv 1604.06174).

        Raises
        ------
        InputError
            If transformers does not support it for this language model.
        """
        model = self.base_model
        if not model.supports_gradient_checkpointing:
            raise InputError(
                "config: finetune.checkpoint_activations",
                f"{type(model).__name__} cannot recompute its activations",
                "Set it to false",
            )
        model.activation_checkpointing_enable({"use_reentrant": False})

    def ready_to_write(self) -> "Cell2Text":
        """Merge the adapter into the language model's weights, and switch to evaluation mode."""
        if self.about["finetune"]["mode"] == "lora":  # merged into 4-bit weights, the sum would be rounded again
            self.language_model = self.language_model.merge_and_unload()
        return self.eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that fine-tuning changes, by name, in a fixed order."""
        return {name: value for name, value in sorted(self.named_parameters()) if value.requires_grad}


def _reorder(embeddings: Tensor, order: Tensor) -> Tensor:
    return embeddings.gather(1, order[..., None].expand_as(embeddings))


def count_positions(config: PreTrainedConfig) -> int | None:
    """Return the greatest number of tokens that a language model has positions for; None if it has no limit."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
