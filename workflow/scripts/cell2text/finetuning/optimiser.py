"""AdamW with float32 master copies of bfloat16 weights, and a state that can be saved as safetensors."""

import torch
from torch import Tensor, nn

from cell2text.processes import ALONE, Team


class MasterAdamW:
    """AdamW on float32 copies of the weights, which are written back to the model after each step.

    In bfloat16 an update smaller than 1/256 of a weight is lost; the masters accumulate such updates. If several
    processes train together, each keeps only the masters and moments of its own share of the weights, updates these and
    broadcasts them: stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).

    Parameters
    ----------
    groups
        Learning rates, each with its named parameters, in the same order in all processes.
    clip
        Maximum norm of the gradient of all parameters.
    team
        The processes that train together. All of them must call every method.
    """

    def __init__(self, groups: list[tuple[float, dict[str, nn.Parameter]]], clip: float = 1.0, team: Team = ALONE):
        self.parameters = {name: value for _, group in groups for name, value in group.items()}
        self.owners = share_out({name: value.numel() for name, value in self.parameters.items()}, team.size)
        # weights in float32 are their own masters
        self.masters = {
            name: value.detach().float() for name, value in self.parameters.items() if self.owners[name] == team.rank
        }
        self.gradients: dict[str, Tensor] = {}
        self.clip, self.team = clip, team
        self.rates = [rate for rate, _ in groups]
        self.adam = torch.optim.AdamW(
            [
                {"params": [self.masters[name] for name in group if name in self.masters], "lr": rate}
                for rate, group in groups
            ],
            betas=(0.9, 0.999),
            weight_decay=0.0,
            fused=True,
        )

    def take_gradients(self) -> None:
        """Add the gradients of the weights to their float32 sums, and clear them."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            if name in self.gradients:
                self.gradients[name] += parameter.grad
            else:
                self.gradients[name] = parameter.grad.float()
            parameter.grad = None

    def step(self, gradient_scale: float, rate_scale: float) -> None:
        """Scale and clip the summed gradients, update the weights, and clear the sums.

        Parameters
        ----------
        gradient_scale
            Factor of the gradients after the sum over all processes, such as 1/tokens for a mean over tokens.
        rate_scale
            Factor of each group's learning rate, from the schedule.
        """
        if self.team.size > 1:
            for name, parameter in self.parameters.items():
                # a process without a micro-batch in this step has no gradients
                if name not in self.gradients:
                    self.gradients[name] = torch.zeros_like(parameter, dtype=torch.float32)
                self.team.reduce(self.owners[name], self.gradients[name])
        for name, master in self.masters.items():
            master.grad = self.gradients.get(name)
        self.gradients.clear()
        grads = [master.grad for master in self.masters.values() if master.grad is not None]
        square = nn.utils.get_total_norm(grads).to(next(iter(self.parameters.values())).device) ** 2
        norm = self.team.all_reduce(square).sqrt() * gradient_scale
        if grads:  # scale and clip in one pass; 1e-6 avoids division by zero, as in torch
            torch._foreach_mul_(grads, gradient_scale * (self.clip / (norm + 1e-6)).clamp(max=1.0))
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * rate_scale
        self.adam.step()
        self.adam.zero_grad()
        self.write_back(self.masters)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copy the model's weights into the masters, after they were changed elsewhere."""
        for name, master in self.masters.items():
            master.copy_(self.parameters[name])

    @torch.no_grad()
    def write_back(self, weights: dict[str, Tensor]) -> None:
        """Copy float32 weights of this process' share into the model, in all processes."""
        for name, parameter in self.parameters.items():
            if name in self.masters and weights[name].data_ptr() != parameter.data_ptr():
                parameter.copy_(weights[name])
            self.team.broadcast(self.owners[name], parameter)

    def collect(self, share: dict[str, Tensor], shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Return the tensors of all shares in the leading process, and an empty dictionary in the others.

        Parameters
        ----------
        share
            Float32 tensors for this process' share of the weights, by name.
        shape
            Shape of each tensor; that of the weight if None.
        """
        if self.team.size == 1:
            return dict(share)
        collected = {}
        for name, parameter in self.parameters.items():
            value = share[name] if name in share else parameter.new_empty(shape or parameter.shape, dtype=torch.float32)
            value = value.to(parameter.device).contiguous()
            self.team.broadcast(self.owners[name], value)
            if self.team.leads:
                collected[name] = value.cpu()
        return collected

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments of all processes as named tensors, in the leading process."""
        tensors = {f"master.{name}": value for name, value in self.collect(self.masters).items()}
        for key, shape in (("step", (1,)), ("exp_avg", None), ("exp_avg_sq", None)):
            share = {
                name: self.adam.state[master][key].reshape(shape or master.shape)
                for name, master in self.masters.items()
                if master in self.adam.state
            }
            tensors |= {f"{key}.{name}": value for name, value in self.collect(share, shape).items()}
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore this process' share of the tensors that :meth:`state` returned."""
        with torch.no_grad():
            for name, value in self.masters.items():
                value.copy_(tensors[f"master.{name}"])
                if f"step.{name}" in tensors:
                    self.adam.state[value] = {
                        "step": tensors[f"step.{name}"].squeeze().to(value.device),
                        "exp_avg": tensors[f"exp_avg.{name}"].to(value.device),
                        "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(value.device),
                    }
        self.write_back(self.masters)


def share_out(sizes: dict[str, int], shares: int) -> dict[str, int]:
    """Assign tensors to shares of similar size: in descending order, each to the share that is smallest so far.

    Examples
    --------
    >>> share_out({"a": 5, "b": 9, "c": 3}, 2)
    {'b': 0, 'a': 1, 'c': 1}
    """
    filled, share_of = [0] * shares, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        share_of[name] = filled.index(min(filled))
        filled[share_of[name]] += sizes[name]
    return share_of
