"""The loss of the texts, and its gradient, without logits of more than a few tokens at once."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 128  # the logits of these stay in a CPU's cache, and are few beside a GPU's memory


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
            if of_states is not None:
                expected = (exponentials @ weight).float() / sums
                of_states[some] = expected - weight[targets[some]]
            if of_weight is None and of_bias is None:
                continue
            # softmax - 1 of the right token in float32: of a likely token, bfloat16 would leave nothing
            of_logits = in_float32.div_(sums)
            of_logits.scatter_add_(1, targets[some, None], of_logits.new_full((len(of_logits), 1), -1))
            of_logits = of_logits.to(weight.dtype)
            if of_weight is not None:
                of_weight.addmm_(of_logits.T, states[some])
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, of_sum: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of the states and, where they train, of the head's weight and bias."""
        scaled = (None if part is None else part * of_sum.to(part.dtype) for part in ctx.saved_tensors)
        return *scaled, None
