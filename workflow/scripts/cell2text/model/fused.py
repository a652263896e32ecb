"""Layers of a language model that is fine-tuned, with fewer passes over memory than their general forms.

A step spends most of its time in many small operations on tensors as large as the activations. What is written
here does the same in fewer of them; the weights stay where transformers and PEFT keep them.
"""

import sys
from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN leaves all but one thread idle where more rows than these meet few outputs; blocks of 32 rows fill its tiles.
ROWS_AT_ONCE, FEW_OUTPUTS, TILE = 544, range(257, 1024), 32
# Layers that read the same input, one after the other, in every model of transformers that names them so.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """Add rows @ matrix to total, in blocks of rows that a CPU multiplies fast.

    Parameters
    ----------
    total, rows, matrix
        (rows, outputs), (rows, inputs) and (inputs, outputs).
    """
    count = len(rows)
    if not rows.is_cuda and matrix.shape[1] in FEW_OUTPUTS:
        count = -(-count // -(-count // ROWS_AT_ONCE))
    count = -(-count // TILE) * TILE
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
        if args or kwargs or not all(layer._is_plain(x.dtype) for layer in layers):
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

    def _is_plain(self, dtype: torch.dtype) -> bool:
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


def join_siblings(model: nn.Module) -> None:
    """Tell the LoRA layers that read the same input of one another."""
    for module in list(model.modules()):
        for names in SIBLINGS:
            layers = tuple(getattr(module, name, None) for name in names)
            if all(type(layer) is FusedLora for layer in layers):
                for layer in layers:
                    # past nn.Module's own attributes: it would register them as parts of one another
                    object.__setattr__(layer, "siblings", layers)


class RootMeanSquareNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight (arXiv 1910.07467); only sums are float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return the normalised rows, (..., width)."""
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = square.div_(x.shape[-1]).add_(epsilon).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_normal: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return the gradients of x and, where it trains, of the weight."""
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse
        of_weight = (of_normal * normal).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        of_normal = of_normal * weight
        along = (of_normal * normal) @ x.new_full((x.shape[-1], 1), 1 / x.shape[-1])
        return of_normal.addcmul_(normal, along, value=-1).mul_(inverse), of_weight, None


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
        probe = torch.linspace(-2, 3, module.weight.numel(), device=module.weight.device, dtype=module.weight.dtype)
        with torch.no_grad():
            same = torch.allclose(fused(probe[None]), module(probe[None]), rtol=0.02, atol=1e-3)
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
