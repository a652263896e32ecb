"""Layers for fine-tuning a language model, with fewer passes over memory than those of transformers and PEFT.

A training step spends most of its time in many small operations on tensors the size of the activations. These layers
compute the same in fewer operations; the weights stay where transformers and PEFT keep them.
"""

import logging
from collections.abc import Callable
from functools import cache, partial, wraps

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

log = logging.getLogger("cell2text.model")

# oneDNN uses a single thread for products of these sizes. Split into blocks of rows, they use all threads. Blocks are
# multiples of the 32 rows that fill its tiles.
IDLE_ROWS, IDLE_INPUTS, IDLE_OUTPUTS = range(545, 1472), 512, range(257, 1024)
TILE = 32


def add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """Add rows @ matrix to total, in blocks of rows that a CPU multiplies efficiently.

    Parameters
    ----------
    total, rows, matrix
        (rows, outputs), (rows, inputs) and (inputs, outputs).
    """
    count, (inputs, outputs) = len(rows), matrix.shape
    if not rows.is_cuda and count in IDLE_ROWS and inputs >= IDLE_INPUTS and outputs in IDLE_OUTPUTS:
        blocks = -(-count // (IDLE_ROWS.start - 1))
        count = -(-count // (blocks * TILE)) * TILE
    for out, block in zip(total.split(count), rows.split(count), strict=True):
        out.addmm_(block, matrix)


class LoraProduct(torch.autograd.Function):
    """x W' + b + scale (x A') B' with W and b frozen (LoRA, arXiv 2106.09685); sums are in place."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        """Return the product, (..., outputs).

        Parameters
        ----------
        x
            (..., inputs).
        scale
            Scale of the adapter.
        weight, bias
            (outputs, inputs) and (outputs,) or None.
        down, up
            A and B, (rank, inputs) and (outputs, rank).
        """
        rows = x.reshape(-1, x.shape[-1])
        low = (rows @ down.T).mul_(scale)
        product = low @ up.T if bias is None else torch.addmm(bias, low, up.T)
        add_product(product, rows, weight.T)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        return product.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_product: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        rows, low, weight, down, up = ctx.saved_tensors
        grad = grad_product.reshape(len(rows), -1)
        grad_low = (grad @ up).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ down
            add_product(grad_x, grad, weight)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, None, grad_low.T @ rows, (low.T @ grad).T


class FusedLora(lora.Linear):
    """PEFT's LoRA layer, which computes plain LoRA with ``LoraProduct`` and leaves any variant of it to PEFT."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return what PEFT's layer returns."""
        if args or kwargs or not self.is_plain(x.dtype):
            return super().forward(x, *args, **kwargs)
        name, base = self.active_adapters[0], self.base_layer
        adapter = self.lora_A[name].weight, self.lora_B[name].weight
        return LoraProduct.apply(x, self.scaling[name], base.weight, base.bias, *adapter)

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Return whether the layer is plain LoRA, on input of this dtype."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        return (
            name in self.lora_A
            and not (self.disable_adapters or self.merged)
            and name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and self.lora_B[name].bias is None
            and type(self.base_layer) is nn.Linear
            and dtype == self.base_layer.weight.dtype == self.lora_A[name].weight.dtype
        )


def fuse_lora(model: nn.Module) -> None:
    """Turn PEFT's LoRA layers into :class:`FusedLora`; only their class changes."""
    for layer in model.modules():
        if type(layer) is lora.Linear:
            layer.__class__ = FusedLora
    match_adapters(model)


def match_adapters(model: nn.Module) -> None:
    """Give adapters the dtype of their layer, so that it need not cast; the optimiser keeps float32 masters."""
    for layer in model.modules():
        if type(layer) is FusedLora and type(layer.base_layer) is nn.Linear:
            for part in (layer.lora_A, layer.lora_B):
                part.to(layer.base_layer.weight.dtype)


@cache
def can_compile() -> bool:
    """Return whether ``torch.compile`` works on this CPU; it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        log.info("torch.compile does not work here, so training is slightly slower (%s)", reason)
        return False
    return True


def in_one_pass(function: Callable) -> Callable:
    """Compile a function of elementwise operations and sums over rows, so that each tensor is read once.

    Only bfloat16 on a CPU uses the compiled function: without it, torch rounds and stores after each operation.
    """
    compiled = cache(partial(torch.compile, function, dynamic=True))  # on first use, because it imports a lot

    @wraps(function)
    def run(x: Tensor, *others: Tensor | float) -> Tensor | tuple[Tensor, ...]:
        fast = x.dtype == torch.bfloat16 and x.device.type == "cpu" and can_compile()
        return (compiled() if fast else function)(x, *others)

    return run


@in_one_pass
def normalise(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + epsilon) * weight, and 1 / sqrt(mean(x^2) + epsilon), (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
    inverse = (square / x.shape[-1] + epsilon).rsqrt().to(x.dtype)
    return x * inverse * weight, inverse


@in_one_pass
def differentiate_norm(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of x from that of the normalised x, the first result of :func:`normalise`."""
    normal, grad = x * inverse, grad * weight
    return (grad - normal * (grad * normal).mean(-1, keepdim=True)) * inverse


@in_one_pass
def gate_by_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up: SwiGLU (arXiv 2002.05202)."""
    return functional.silu(gate) * up


@in_one_pass
def differentiate_gate(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up from that of :func:`gate_by_silu`."""
    return torch.ops.aten.silu_backward(grad * up, gate), grad * functional.silu(gate)


class RootMeanSquareNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return the normalised rows, (..., width)."""
        normal, inverse = normalise(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients of x and, if it is trained, of the weight."""
        x, weight, inverse = ctx.saved_tensors
        grad_weight = (grad * (x * inverse)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return differentiate_norm(grad, x, weight, inverse), grad_weight, None


class FusedNorm(nn.Module):
    """RMSNorm of a model, computed by ``RootMeanSquareNorm``, with the same weight under the same name.

    Parameters
    ----------
    weight
        (width,), frozen or not.
    epsilon
        Added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised rows, (..., width)."""
        return RootMeanSquareNorm.apply(x, self.weight, self.epsilon)


def _probe(weight: Tensor) -> Tensor:
    """Return input to compare two layers, (1, 2, inputs): compiled code for three dimensions serves training too."""
    values = torch.linspace(-2, 3, weight.shape[-1], device=weight.device, dtype=weight.dtype)
    return values.expand(1, 2, -1).contiguous()


def fuse_norms(model: nn.Module) -> None:
    """Replace each RMSNorm by ``FusedNorm`` if both compute the same; others stay as they are.

    Model families differ in where they add the epsilon and whether they add 1 to the weight, so the output of each
    layer is compared instead of trusting its name. It pays in bfloat16 on a Xeon with AMX (docs/finetuning.md).
    """
    for name, module in list(model.named_modules()):
        epsilon = getattr(module, "variance_epsilon", None)
        if epsilon is None or [key for key, _ in module.named_parameters()] != ["weight"]:
            continue
        fused = FusedNorm(module.weight, epsilon)
        probe = _probe(module.weight)
        with torch.no_grad():
            same = torch.allclose(fused(probe), module(probe), rtol=0.02, atol=1e-3)
        if same:
            model.set_submodule(name, fused)


class Gate(torch.autograd.Function):
    """silu(gate) * up, without storing silu(gate) or its gradient."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        """Return the product, (..., width)."""
        ctx.save_for_backward(gate, up)
        return gate_by_silu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up."""
        return differentiate_gate(grad, *ctx.saved_tensors)


class FusedGate(nn.Module):
    """Gated feed-forward layers of a model, computed with ``Gate``, with the same parts under the same names.

    Parameters
    ----------
    gated
        The model's module, with ``gate_proj``, ``up_proj`` and ``down_proj``.
    """

    def __init__(self, gated: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gated.gate_proj, gated.up_proj, gated.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model's own module returns, (..., width)."""
        return self.down_proj(Gate.apply(self.gate_proj(x), self.up_proj(x)))


def fuse_gates(model: nn.Module) -> None:
    """Replace gated feed-forward layers by ``FusedGate`` if both compute the same; others stay as they are.

    It pays in bfloat16 on a Xeon with AMX (docs/finetuning.md).
    """
    for name, module in list(model.named_modules()):
        if [part for part, _ in module.named_children()] != ["gate_proj", "up_proj", "down_proj", "act_fn"]:
            continue
        linear = getattr(module.gate_proj, "base_layer", module.gate_proj)  # inside PEFT's layer
        if type(linear) is not nn.Linear:  # such as a 4-bit layer, whose weight has another shape
            continue
        fused, probe = FusedGate(module), _probe(linear.weight)
        with torch.no_grad():
            expected = module(probe)
            same = torch.allclose(fused(probe), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
            same &= torch.allclose(functional.silu(probe), module.act_fn(probe), rtol=0.02, atol=1e-3)
        if same:
            model.set_submodule(name, fused)
