"""Layers of a language model that is fine-tuned, with fewer passes over memory than their general forms.

A step spends most of its time in many small operations on tensors as large as the activations. What is written
here does the same in fewer of them; the weights stay where transformers and PEFT keep them.
"""

import logging
import sys
from collections.abc import Callable
from functools import cache, partial, wraps
from inspect import signature

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

log = logging.getLogger("cell2text.model")

# oneDNN leaves all but one thread idle where so many rows with so many inputs meet so few outputs. Blocks of rows,
# multiples of the 32 that fill its tiles, are spread over the threads.
IDLE_ROWS, IDLE_INPUTS, IDLE_OUTPUTS = range(545, 1472), 512, range(257, 1024)
TILE = 32
# Layers that read the same input, one after the other, in every model of transformers that names them so.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """Add rows @ matrix to total, in blocks of rows that a CPU multiplies fast.

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


class LoraProducts(torch.autograd.Function):
    """x W' + b + scale (x A') B' of each of some layers, W and b frozen: LoRA (arXiv 2106.09685).

    The narrow products with x and its gradient are made once for all layers, and sums are made in place.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scales: tuple[float, ...], *parts: Tensor | None) -> tuple[Tensor, ...]:
        """Return the product of each layer, (..., outputs).

        Parameters
        ----------
        x
            (..., inputs).
        scales
            Of the adapters, one a layer.
        parts
            Weights, then biases (or None), then A, then B of the layers.
        """
        weights, biases, downs, ups = _in_kinds(parts)
        rows = x.reshape(-1, x.shape[-1])
        down = torch.cat(downs) if len(downs) > 1 else downs[0]
        lows = (rows @ down.T).split([len(a) for a in downs], dim=1)
        products = []
        for scale, weight, bias, low, up in zip(scales, weights, biases, lows, ups, strict=True):
            low.mul_(scale)
            product = low @ up.T if bias is None else torch.addmm(bias, low, up.T)
            add_product(product, rows, weight.T)
            products.append(product.view(*x.shape[:-1], -1))
        ctx.save_for_backward(rows, down, *lows, *weights, *ups)
        ctx.scales, ctx.shape = scales, x.shape
        return tuple(products)

    @staticmethod
    @once_differentiable
    def backward(ctx, *of_products: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        rows, down, *rest = ctx.saved_tensors
        count = len(ctx.scales)
        lows, weights, ups = rest[:count], rest[count : 2 * count], rest[2 * count :]
        of_products = [of_product.reshape(len(rows), -1) for of_product in of_products]
        of_lows = [
            (of_product @ up).mul_(scale) for of_product, up, scale in zip(of_products, ups, ctx.scales, strict=True)
        ]
        of_low = torch.cat(of_lows, dim=1) if count > 1 else of_lows[0]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_low @ down
            for of_product, weight in zip(of_products, weights, strict=True):
                add_product(of_x, of_product, weight)
            of_x = of_x.view(ctx.shape)
        of_downs = (of_low.T @ rows).split([part.shape[1] for part in of_lows])
        of_ups = [(low.T @ of_product).T for of_product, low in zip(of_products, lows, strict=True)]
        return of_x, None, *[None] * 2 * count, *of_downs, *of_ups


def _in_kinds(parts: tuple) -> list[tuple]:
    count = len(parts) // 4
    return [parts[kind * count : (kind + 1) * count] for kind in range(4)]


class FusedLora(lora.Linear):
    """PEFT's LoRA layer; where nothing but the plain product is asked for, it is computed by ``LoraProducts``.

    The first of some siblings computes the products of all, and the others hand theirs out.
    """

    siblings: tuple["FusedLora", ...] = ()
    waiting: tuple[Tensor, dict["FusedLora", Tensor]] | None = None

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return what PEFT's layer returns."""
        layers = self.siblings or (self,)
        if args or kwargs or not all(layer.is_plain(x.dtype) for layer in layers):
            return super().forward(x, *args, **kwargs)
        first = layers[0]
        if first.waiting is None or first.waiting[0] is not x or self is first:
            name = self.active_adapters[0]
            bases = [layer.base_layer for layer in layers]
            products = LoraProducts.apply(
                x,
                tuple(layer.scaling[name] for layer in layers),
                *(base.weight for base in bases),
                *(base.bias for base in bases),
                *(layer.lora_A[name].weight for layer in layers),
                *(layer.lora_B[name].weight for layer in layers),
            )
            first.waiting = (x, dict(zip(layers, products, strict=True)))
        product = first.waiting[1].pop(self)
        if not first.waiting[1]:
            first.waiting = None
        return product

    def is_plain(self, dtype: torch.dtype) -> bool:
        """Return whether the layer is LoRA and nothing else, on input of this type."""
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
    """Let PEFT's plain LoRA layers compute as :class:`FusedLora`; only their class changes.

    Layers that read the same input learn of one another, so that the first computes for all.
    """
    for layer in model.modules():
        if type(layer) is lora.Linear:
            layer.__class__ = FusedLora
    for module in list(model.modules()):
        for names in SIBLINGS:
            layers = tuple(getattr(module, name, None) for name in names)
            if all(type(layer) is FusedLora for layer in layers):
                for layer in layers:
                    # past nn.Module's own attributes: it would register them as parts of one another
                    object.__setattr__(layer, "siblings", layers)


@cache
def can_compile() -> bool:
    """Return whether torch can compile for this CPU, for which it needs a C++ compiler and Python's headers."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except (RuntimeError, OSError) as error:
        told = str(error).strip().partition("\n")[0]
        log.info("torch cannot compile here, so a step takes a little longer (%s)", told)
        return False
    return True


def in_one_pass(function: Callable) -> Callable:
    """Compile a function whose operations are on single numbers or sums of lines, so that each tensor is read once.

    Only for bfloat16 on a CPU, which else rounds and stores after each operation. Elsewhere it runs as it is written.
    """
    compiled = cache(partial(torch.compile, function, dynamic=True))  # called once it is needed: it loads much

    @wraps(function)
    def run(x: Tensor, *others: Tensor | float) -> Tensor | tuple[Tensor, ...]:
        fast = x.dtype == torch.bfloat16 and x.device.type == "cpu" and can_compile()
        return (compiled() if fast else function)(x, *others)

    return run


@in_one_pass
def normalise(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x / sqrt(mean(x^2) + epsilon) * weight, and by what x was multiplied, (..., 1)."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square()
    inverse = (square / x.shape[-1] + epsilon).rsqrt().to(x.dtype)
    return x * inverse * weight, inverse


@in_one_pass
def differentiate_norm(of_normal: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of x, given that of :func:`normalise`'s first result."""
    normal, of_normal = x * inverse, of_normal * weight
    return (of_normal - normal * (of_normal * normal).mean(-1, keepdim=True)) * inverse


@in_one_pass
def gate_by_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up: SwiGLU (arXiv 2002.05202)."""
    return functional.silu(gate) * up


@in_one_pass
def differentiate_gate(of_product: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up, given that of :func:`gate_by_silu`."""
    return torch.ops.aten.silu_backward(of_product * up, gate), of_product * functional.silu(gate)


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
    def backward(ctx, of_normal: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients of x and, where it trains, of the weight."""
        x, weight, inverse = ctx.saved_tensors
        of_weight = (of_normal * (x * inverse)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return differentiate_norm(of_normal, x, weight, inverse), of_weight, None


class FusedNorm(nn.Module):
    """A model's RMSNorm computed by ``RootMeanSquareNorm``, with the same weight under the same name.

    Parameters
    ----------
    weight
        Frozen or not, (width,).
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
    """Return numbers to ask a layer with such a weight: (1, 2, inputs), for what is compiled to serve rows as well."""
    line = torch.linspace(-2, 3, weight.shape[-1], device=weight.device, dtype=weight.dtype)
    return line.expand(1, 2, -1).contiguous()


def fuse_norms(model: nn.Module) -> None:
    """Put ``FusedNorm`` in the place of each RMSNorm that computes the same; others stay as they are.

    Families of models differ in where they add the epsilon and whether they add 1 to the weight, so each layer is
    asked instead of its name being trusted.
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
    """silu(gate) * up, which keeps neither silu(gate) nor its gradient."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        """Return the product, (..., width)."""
        ctx.save_for_backward(gate, up)
        return gate_by_silu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_product: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of gate and up."""
        return differentiate_gate(of_product, *ctx.saved_tensors)


class FusedGate(nn.Module):
    """A model's gated layers computed with ``Gate``, with the same parts under the same names.

    Parameters
    ----------
    gated
        Has ``gate_proj``, ``up_proj`` and ``down_proj``.
    """

    def __init__(self, gated: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gated.gate_proj, gated.up_proj, gated.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return what the model's own layers return, (..., width)."""
        return self.down_proj(Gate.apply(self.gate_proj(x), self.up_proj(x)))


def fuse_gates(model: nn.Module) -> None:
    """Put ``FusedGate`` in the place of all gated layers that compute the same; others stay as they are."""
    for name, module in list(model.named_modules()):
        if [part for part, _ in module.named_children()] != ["gate_proj", "up_proj", "down_proj", "act_fn"]:
            continue
        linear = getattr(module.gate_proj, "base_layer", module.gate_proj)  # inside PEFT's layer
        if type(linear) is not nn.Linear:  # such as one of 4 bits, whose weight does not show its inputs
            continue
        fused, probe = FusedGate(module), _probe(linear.weight)
        with torch.no_grad():
            expected = module(probe)
            same = torch.allclose(fused(probe), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
            same &= torch.allclose(functional.silu(probe), module.act_fn(probe), rtol=0.02, atol=1e-3)
        if same:
            model.set_submodule(name, fused)


class Rotation(torch.autograd.Function):
    """Rotary positions: the halves (a, b) of each head are turned to (ac - bs, bc + as) (arXiv 2104.09864)."""

    @staticmethod
    def forward(ctx, cos: Tensor, sin: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """Return the states, (batch, heads, tokens, width), turned by angles, (batch, 1, tokens, width)."""
        ctx.save_for_backward(cos, sin)
        return tuple(_turn(x, cos, sin) for x in states)

    @staticmethod
    @once_differentiable
    def backward(ctx, *of_turned: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the states: what was turned is turned back."""
        cos, sin = ctx.saved_tensors
        back = sin.roll(sin.shape[-1] // 2, -1).neg_()
        return None, None, *(_turn(x, cos, back) for x in of_turned)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


def rotate(
    general: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by ``Rotation``, or by the general function where only part of a head turns."""
    if not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
        return general(q, k, cos, sin, unsqueeze_dim)
    return Rotation.apply(cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), q, k)


def fuse_rotations(model: nn.Module) -> None:
    """Let the model's layers call :func:`rotate` for transformers' function, where that computes the same.

    The function is not a part of the model: it is replaced in the module of transformers that has the layers.
    """
    for home in {sys.modules[type(module).__module__] for module in model.modules()}:
        general = getattr(home, "apply_rotary_pos_emb", None)
        if general is None or isinstance(general, partial):  # none there, or ours already
            continue
        if list(signature(general).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
            continue
        q, k, angles = torch.linspace(-2, 3, 96).view(3, 1, 2, 2, 8)
        probe = q, k, angles[:, 0].cos(), angles[:, 0].sin()
        if all(map(torch.allclose, rotate(general, *probe), general(*probe))):
            home.apply_rotary_pos_emb = partial(rotate, general)
