"""The loss of the texts and its gradient, with the logits of only a few tokens in memory at a time."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TOKENS_AT_ONCE = 256  # enough for an efficient product, few enough that their logits are small on a GPU
TOKENS_IN_CACHE = 32  # the logits of so few stay in a CPU's cache from one operation to the next
TILE = 32  # blocks are padded to a multiple of this, because a CPU is slow at the first product of each new size


class TextLoss(torch.autograd.Function):
    """Summed negative log likelihood of tokens, given the hidden states before them.

    The forward pass computes the gradients as well, block by block, so that logits are neither kept nor computed
    twice: the method of the Liger kernels (arXiv 2410.10989), in plain torch. The gradient of the head is computed
    only if the head is trained.
    """

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Return the sum in nats, float32.

        Parameters
        ----------
        states
            (tokens, width).
        weight, bias
            Weight of the head, (vocabulary, width), and its bias, (vocabulary,) or None.
        targets
            Token ids, int64 (tokens,).
        """
        gradients = [
            torch.zeros_like(part) if needed else None
            for part, needed in zip((states, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        grad_states, grad_weight, grad_bias = gradients
        head_trains = grad_weight is not None or grad_bias is not None
        total = states.new_zeros((), dtype=torch.float32)
        # All blocks use the same memory for their logits, and all chunks the same for their exponentials.
        at_once = min(-(-len(states) // TILE) * TILE, TOKENS_AT_ONCE)
        chunk_tokens = at_once if states.is_cuda else min(at_once, TOKENS_IN_CACHE)
        logits_buffer = states.new_empty(at_once, len(weight))
        exponentials_buffer = states.new_empty(chunk_tokens, len(weight), dtype=torch.float32)
        for start in range(0, len(states), at_once):
            block = slice(start, start + at_once)
            tokens = len(states[block])
            padded = nn.functional.pad(states[block], (0, 0, 0, -tokens % TILE))
            logits = torch.mm(padded, weight.T, out=logits_buffer[: len(padded)])
            sums = []
            target_chunks = targets[block, None].split(chunk_tokens)
            for chunk, target in zip(logits[:tokens].split(chunk_tokens), target_chunks, strict=True):
                if bias is not None:
                    chunk += bias
                chunk -= chunk.amax(1, keepdim=True)
                target_logits = chunk.gather(1, target).float()
                exponentials = exponentials_buffer[: len(chunk)].copy_(chunk.exp_())
                sums.append(exponentials.sum(1, keepdim=True))
                total += (sums[-1].log() - target_logits).sum()
                if head_trains:
                    # softmax - 1 at the target, in float32: bfloat16 would round it to zero for a likely token
                    grad_logits = exponentials.div_(sums[-1])
                    chunk.copy_(grad_logits.scatter_add_(1, target, grad_logits.new_full((len(chunk), 1), -1)))
            if head_trains:
                if grad_states is not None:
                    grad_states[block] = (logits @ weight)[:tokens]
                if grad_weight is not None:
                    grad_weight.addmm_(logits.T, padded)
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
            elif grad_states is not None:  # divide by the sums after the product, which has fewer columns
                grad_states[block] = (logits @ weight)[:tokens].float() / torch.cat(sums) - weight[targets[block]]
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Return the gradients of the states and, if they are trained, of the head's weight and bias."""
        scaled = (None if part is None else part * grad_sum.to(part.dtype) for part in ctx.saved_tensors)
        return *scaled, None
