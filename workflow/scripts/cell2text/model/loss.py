"""The loss of the texts, and its gradient, without logits of more than a few tokens at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 128  # the logits of these stay in a CPU's cache, and are few beside a GPU's memory


class TextLoss(torch.autograd.Function):
    """Summed negative log likelihood of tokens, given the hidden states before them.

    The gradient is computed while the logits are at hand, so that they are neither kept nor computed again: the
    method of the Liger kernels (arXiv 2410.10989), in plain torch. The head stays as it is.
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
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        total = states.new_zeros((), dtype=torch.float32)
        wide = states.new_empty(min(len(states), TOKENS_AT_ONCE), len(weight), dtype=torch.float32)
        for start in range(0, len(states), TOKENS_AT_ONCE):
            some = slice(start, start + TOKENS_AT_ONCE)
            logits = torch.nn.functional.linear(states[some], weight, bias)
            logits -= logits.amax(1, keepdim=True)
            right = logits.gather(1, targets[some, None]).float()
            # softmax = exponentials / sums; divided by later, where there are fewer numbers
            exponentials = logits.exp_()
            in_float32 = wide[: len(exponentials)].copy_(exponentials)
            sums = in_float32.sum(1, keepdim=True)
            total += (sums.log() - right).sum()
            if gradient is not None:
                expected = (exponentials @ weight).float() / sums
                gradient[some] = expected - weight[targets[some]]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, of_sum: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the states."""
        (gradient,) = ctx.saved_tensors
        return gradient * of_sum.to(gradient.dtype), None, None, None
