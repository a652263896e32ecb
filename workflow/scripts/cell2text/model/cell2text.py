"""The model: soft tokens of a cell between the two halves of a chat prompt, and a language model that answers."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cell2text.errors import InputError
from cell2text.model.fast.attention import Row
from cell2text.model.fast.loss import TextLoss
from cell2text.model.language_model import TUNING

INSTRUCTION = "Describe the cell."
_CELL = "\N{BLACK SQUARE}"  # stands where the soft tokens go while the prompt is still text


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
        """Cut the model's own chat template where the cell goes, so that no reserved token is needed."""
        messages = [{"role": "user", "content": f"{INSTRUCTION} {_CELL}"}]
        if tokenizer.chat_template is None:
            text = f"{INSTRUCTION} {_CELL}\n"
        else:
            if "system" in tokenizer.chat_template:
                # some templates put in a long system message of their own when there is none
                messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": _CELL}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        halves = [tokenizer(half, add_special_tokens=False)["input_ids"] for half in text.split(_CELL)]
        return cls(*(torch.tensor(half, dtype=torch.long) for half in halves))


class Cell2Text(nn.Module):
    """A causal language model with a projector in front.

    Parameters
    ----------
    language_model
        Any causal model of transformers, or the same wrapped by PEFT.
    tokenizer
        Its tokenizer.
    projector
        One of ``projectors.PROJECTORS``.
    settings
        What :func:`save` needs to write beside the weights: the config's ``projector`` section, the encoder's
        dimensions, and what :func:`build` takes as ``tuning``.
    """

    def __init__(
        self,
        language_model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        projector: nn.Module,
        settings: dict,
    ):
        super().__init__()
        self.language_model, self.tokenizer, self.projector = language_model, tokenizer, projector
        self.settings = settings
        self.prompt = Prompt.of(tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projector.scale.device

    @property
    def mode(self) -> str:
        """What of the language model learns, one of ``MODES``."""
        return self.settings.get("tuning", TUNING)["mode"]

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        model = self.language_model
        return (model.get_base_model() if isinstance(model, PeftModel) else model).get_decoder()

    @property
    def head(self) -> nn.Linear:
        """From hidden states to logits."""
        return self.language_model.get_output_embeddings()

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return the language model's own embeddings of token ids."""
        return self.language_model.get_input_embeddings()(ids)

    def read_cells(self, vectors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prompt of each cell as embeddings, padded on the left.

        Parameters
        ----------
        vectors, lengths
            What the projector reads; see its ``forward``.

        Returns
        -------
        embeddings
            (cells, prompt, width), in the language model's dtype.
        mask
            bool (cells, prompt); false on the padding.
        """
        soft, there = self.projector(vectors, lengths)
        cells = len(soft)
        before, after = (
            self.embed_tokens(half.to(soft.device)).expand(cells, -1, -1)
            for half in (self.prompt.before, self.prompt.after)
        )
        prompt = torch.cat([before, soft.to(before.dtype), after], dim=1)
        mask = torch.cat([there.new_ones(before.shape[:2]), there, there.new_ones(after.shape[:2])], dim=1)
        if bool(mask.all()):
            return prompt, mask
        # Padding moves from behind the soft tokens to the left; a stable sort keeps the order of the rest.
        order = mask.to(torch.int8).argsort(dim=1, stable=True)
        return prompt.gather(1, order[..., None].expand_as(prompt)), mask.gather(1, order)

    def text_loss(self, soft: Tensor, there: Tensor, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed negative log likelihood of the texts, and of how many tokens it is the sum.

        Only the text is scored, never the prompt, and logits are computed nowhere else. What stands before the
        soft tokens is the same for all cells and read once.

        Parameters
        ----------
        soft, there
            As the projector gives them.
        text, text_mask
            Token ids of the description and the end token, int64 (cells, text), padded on the right; which
            are there, bool.
        """
        return self.loss_of(self.states_before(soft, there, text, text_mask), text[text_mask]), text_mask.sum()

    def states_before(self, soft: Tensor, there: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Return the hidden state before each token of the texts, (tokens, width); parameters as of `text_loss`."""
        before, after = (self.embed_tokens(half.to(soft.device)) for half in (self.prompt.before, self.prompt.after))
        of_cells = torch.cat([soft.to(before.dtype), after.expand(len(soft), -1, -1), self.embed_tokens(text)], dim=1)
        mask = torch.cat([there, there.new_ones(len(soft), len(after)), text_mask], dim=1)
        row = Row.of(len(before), mask, before.dtype)
        hidden = self.decoder(
            inputs_embeds=row.join(before, of_cells),
            position_ids=row.positions(),
            use_cache=False,
            row=row,
        ).last_hidden_state
        # The hidden state before a token predicts it.
        of_text = row.of_cells(nn.functional.pad(text_mask, (mask.shape[1] - text.shape[1], 0)))
        return hidden[0, row.prompt - 1 :].index_select(0, of_text.nonzero().squeeze(1))

    def loss_of(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return the summed negative log likelihood of tokens, (tokens,), given the states before them."""
        weight, bias = self.head.weight, self.head.bias
        if not torch.is_grad_enabled():  # an autograd function is not told so, and would compute their gradients
            weight, bias = weight.detach(), bias if bias is None else bias.detach()
        return TextLoss.apply(states, weight, bias, targets)

    def checkpoint_activations(self) -> None:
        """Hold the activations of one layer, not of all: the backward pass computes each anew (arXiv 1604.06174).

        Raises
        ------
        InputError
            If transformers cannot do so with this language model.
        """
        if not self.decoder.supports_gradient_checkpointing:
            told = f"{type(self.decoder).__name__} cannot compute its layers anew"
            raise InputError("config: finetune.checkpoint_activations", told, "Set it to false")
        self.decoder.activation_checkpointing_enable({"use_reentrant": False})

    def ready_to_write(self) -> "Cell2Text":
        """Fold the adapter into the language model's weights and take the attention that decodes fastest."""
        if self.mode == "lora":  # the sum with weights of 4 bits would be rounded to 4 bits again
            self.language_model = self.language_model.merge_and_unload()
        self.language_model.set_attn_implementation("sdpa")
        return self.eval()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that fine-tuning changes, by name, in a fixed order."""
        return {name: value for name, value in sorted(self.named_parameters()) if value.requires_grad}
