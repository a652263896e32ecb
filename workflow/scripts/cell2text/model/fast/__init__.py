"""Faster training of common language models, with the same result as plain transformers and PEFT.

A newcomer may skip this folder: ``finetune.fast: false`` trains without it, and :func:`check` compares the two before
each run. ``docs/finetuning.md`` says what each part gains.
"""

import logging
import math

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cell2text.model.cell2text import Cell2Text
from cell2text.model.fast.attention import NAME, Row, attend
from cell2text.model.fast.layers import fuse_gates, fuse_lora, fuse_norms, match_adapters
from cell2text.model.fast.loss import TextLoss

log = logging.getLogger("cell2text.model")

TOLERANCE = 1e-4  # relative difference of the two losses in float32; with other weights they differ in every digit


class FastCell2Text(Cell2Text):
    """The model with a forward pass that computes the shared prompt once and skips padding."""

    fast = True

    def text_loss(self, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``Cell2Text.text_loss`` returns; logits are computed for a few tokens at a time."""
        return self._loss_of(self._states_before(soft, present, text, text_mask), text[text_mask]), text_mask.sum()

    def _judge(
        self, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor, judged: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = self._states_before(soft, present, text, text_mask)
        best = self.language_model.get_output_embeddings()(states[judged[text_mask]]).argmax(-1)
        return self._loss_of(states, text[text_mask]), best

    def _states_before(self, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Return the hidden state before each token of the texts, (tokens, width)."""
        before, after = (self.embed_tokens(half.to(soft.device)) for half in (self.prompt.before, self.prompt.after))
        by_cell = torch.cat([soft.to(before.dtype), after.expand(len(soft), -1, -1), self.embed_tokens(text)], dim=1)
        mask = torch.cat([present, present.new_ones(len(soft), len(after)), text_mask], dim=1)
        row = Row.of(len(before), mask, before.dtype)
        output = self.base_model.get_decoder()(
            inputs_embeds=row.join(before, by_cell), position_ids=row.positions(), use_cache=False, row=row
        )
        # the hidden state before a token predicts it
        is_text = row.of_cells(nn.functional.pad(text_mask, (mask.shape[1] - text.shape[1], 0)))
        return output.last_hidden_state[0, row.prompt - 1 :].index_select(0, is_text.nonzero().squeeze(1))

    def _loss_of(self, states: Tensor, targets: Tensor) -> Tensor:
        head = self.language_model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if not torch.is_grad_enabled():  # an autograd function cannot see this, and would compute the head's gradients
            weight, bias = weight.detach(), bias if bias is None else bias.detach()
        return TextLoss.apply(states, weight, bias, targets)

    def ready_to_write(self) -> Cell2Text:
        """Merge the adapter, and switch to an attention that can decode one token at a time."""
        super().ready_to_write().language_model.set_attn_implementation("sdpa")
        return self


def speed_up(model: Cell2Text) -> None:
    """Turn a model into a fast one: it and its layers change class, its weights keep their names and values."""
    AttentionInterface.register(NAME, attend)
    model.base_model.set_attn_implementation(NAME)
    fuse_norms(model.base_model)
    fuse_gates(model.base_model)
    fuse_lora(model.language_model)
    model.__class__ = FastCell2Text


@torch.no_grad()
def check(model: Cell2Text, soft: Tensor, present: Tensor, text: Tensor, text_mask: Tensor) -> bool:
    """Speed a model up, return whether it still computes the loss of the plain model, and log the reason if not.

    A model with another loss must be rebuilt. The losses of a batch are compared in float32, to which the weights are
    cast and back, so that rounding hides no difference; 4-bit weights stay as they are.

    Parameters
    ----------
    model
        As ``bundle.build`` returns it.
    soft, present, text, text_mask
        A batch as in ``Cell2Text.text_loss``.
    """
    training = model.training
    model.eval()
    with model.in_float32():
        expected, tokens = (float(value) for value in model.text_loss(soft, present, text, text_mask))
        try:
            speed_up(model)
            found = float(model.text_loss(soft, present, text, text_mask)[0])
            reason = f"its loss is {found / tokens:.5f} nats per token, not {expected / tokens:.5f}"
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, NotImplementedError) as error:
            found, reason = math.nan, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    match_adapters(model.language_model)
    model.train(training)
    same = math.isclose(found, expected, rel_tol=0.02 if model.is_quantised else TOLERANCE)
    if not same:
        log.info(
            "the fast path cannot train %s (%s): training with plain transformers and PEFT",
            type(model.base_model).__name__, reason,
        )  # fmt: skip
    return same
