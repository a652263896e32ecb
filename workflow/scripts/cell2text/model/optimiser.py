"""AdamW that keeps float32 masters of bfloat16 weights, and a state that safetensors can hold."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MasterAdamW:
    """AdamW on float32 copies of the weights, which it writes back after each step.

    In bfloat16 an update smaller than 1/256 of a weight is lost; the masters add such updates up.

    Parameters
    ----------
    groups
        For each learning rate, the named parameters that take it.
    clip
        Largest norm of the whole gradient.
    """

    def __init__(self, groups: list[tuple[float, dict[str, nn.Parameter]]], clip: float = 1.0):
        self.parameters = {name: value for _, group in groups for name, value in group.items()}
        # weights in float32 are their own masters
        self.masters = {name: value.detach().float() for name, value in self.parameters.items()}
        self.clip = clip
        self.rates = [rate for rate, _ in groups]
        self.adam = torch.optim.AdamW(
            [{"params": [self.masters[name] for name in group], "lr": rate} for rate, group in groups],
            betas=(0.9, 0.999),
            weight_decay=0.0,
            fused=True,
        )

    def take_gradients(self) -> None:
        """Add the weights' gradients to those of the masters, in float32, and forget the former."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def step(self, gradient_scale: float, rate_scale: float) -> None:
        """Clip the gradients that were taken, step and write back, then forget them.

        Parameters
        ----------
        gradient_scale
            What the summed gradients are multiplied by, as 1/tokens for a mean over tokens.
        rate_scale
            Of the schedule: this share of each group's learning rate.
        """
        for master in self.masters.values():
            if master.grad is not None:
                master.grad *= gradient_scale
        nn.utils.clip_grad_norm_(self.masters.values(), self.clip)
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_scale
        self.adam.step()
        self.adam.zero_grad()
        self.write_back(self.masters)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Take over weights that something else has changed in the model."""
        for name, parameter in self.parameters.items():
            self.masters[name].copy_(parameter)

    @torch.no_grad()
    def write_back(self, weights: dict[str, Tensor]) -> None:
        """Copy float32 weights into the model's own."""
        for name, parameter in self.parameters.items():
            if weights[name].data_ptr() != parameter.data_ptr():
                parameter.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments as named tensors."""
        tensors = {f"master.{name}": value for name, value in self.masters.items()}
        for name, value in self.masters.items():
            for key, moment in self.adam.state.get(value, {}).items():
                tensors[f"{key}.{name}"] = moment
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` returned."""
        with torch.no_grad():
            for name, value in self.masters.items():
                value.copy_(tensors[f"master.{name}"])
                moments = {
                    key: tensors[f"{key}.{name}"].to(value.device) if key != "step" else tensors[f"{key}.{name}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if moments:
                    self.adam.state[value] = moments
        self.write_back(self.masters)


def warm_up_then_decay(total: int, warm_up_share: float = 0.05) -> Callable[[int], float]:
    """Return the schedule of learning rates: a straight rise over the first share of steps, then a straight fall.

    Parameters
    ----------
    total
        Steps of the whole training.
    warm_up_share
        Share of them in which the rate rises.
    """
    rise = max(1, round(total * warm_up_share))

    def scale(step: int) -> float:
        return (step + 1) / rise if step < rise else max(0.0, (total - step) / max(1, total - rise))

    return scale
