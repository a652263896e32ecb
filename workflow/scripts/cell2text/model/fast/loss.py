"""The loss of the texts, and its gradient, without logits of more than a few tokens at once."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 256  # are multiplied fast, and their logits are few beside a GPU's memory
TOKENS_IN_CACHE = 32  # the logits of these stay in a CPU's cache while they are worked on
TILE = 32  # to so many tokens, or a multiple, the last are filled up: a product's first of a new size takes long


class TextLoss(torch.autograd.Function):
    """Summed negative log likelihood of tokens, given the hidden states before them.

    The gradients are computed while the logits are at hand, so that they are neither kept nor computed again: the
    method of the Liger kernels (arXiv 2410.10989), in plain torch. That of the head is computed only where it trains.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Return the sum in nats, float32.

        Parameters
        ----------
        states
            (tokens, width).
        weight, bias
            Of the head: (vocabulary, width) and (vocabulary,) or None.
        targets
            Token ids, int64 (tokens,).
        """
        gradients = [
            torch.zeros_like(part) if needed else None
            for part, needed in zip((states, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        of_states, of_weight, of_bias = gradients
        head_learns = of_weight is not None or of_bias is not None
        total = states.new_zeros((), dtype=torch.float32)
        # One place for the logits of all blocks, and one for those that are worked on.
        at_once = min(-(-len(states) // TILE) * TILE, TOKENS_AT_ONCE)
        together = at_once if states.is_cuda else min(at_once, TOKENS_IN_CACHE)
        room = states.new_empty(at_once, len(weight))
        wide = states.new_empty(together, len(weight), dtype=torch.float32)
        for start in range(0, len(states), at_once):
            some = slice(start, start + at_once)
            there = len(states[some])
            filled = nn.functional.pad(states[some], (0, 0, 0, -there % TILE))
            logits = torch.mm(filled, weight.T, out=room[: len(filled)])
            sums = []
            right = targets[some, None].split(together)
            for part, right_tokens in zip(logits[:there].split(together), right, strict=True):
                if bias is not None:
                    part += bias
                part -= part.amax(1, keepdim=True)
                of_right = part.gather(1, right_tokens).float()
                exponentials = wide[: len(part)].copy_(part.exp_())
                sums.append(exponentials.sum(1, keepdim=True))
                total += (sums[-1].log() - of_right).sum()
                if head_learns:
                    # softmax - 1 of the right token in float32: of a likely token, bfloat16 would leave nothing
                    of_logits = exponentials.div_(sums[-1])
                    part.copy_(of_logits.scatter_add_(1, right_tokens, of_logits.new_full((len(part), 1), -1)))
            if head_learns:
                if of_states is not None:
                    of_states[some] = (logits @ weight)[:there]
                if of_weight is not None:
                    of_weight.addmm_(logits.T, filled)
                if of_bias is not None:
                    of_bias += logits.sum(0)
            elif of_states is not None:  # the sums divide later, where there are fewer numbers
                of_states[some] = (logits @ weight)[:there].float() / torch.cat(sums) - weight[targets[some]]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, of_sum: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of the states and, where they train, of the head's weight and bias."""
        scaled = (None if part is None else part * of_sum.to(part.dtype) for part in ctx.saved_tensors)
        return *scaled, None
