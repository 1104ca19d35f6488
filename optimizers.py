"""Muon for matrices and filters, AdamW for all other parameters."""

import torch
from torch import nn


def parameter_groups(named_parameters) -> list[dict]:
    """Two groups: weights, and what never decays (norms, biases, class token, positions)."""
    weights, others = [], []
    for name, parameter in named_parameters:
        decays = parameter.ndim >= 2 and name.split(".")[-1] not in ("class_token", "positions")
        (weights if decays else others).append(parameter)
    return [{"params": weights}, {"params": others, "weight_decay": 0}]


def muon_and_adamw(model: nn.Module, hidden: nn.Module, settings) -> "Optimizers":
    """Muon for the matrices and filters of `hidden`, a part of `model`; AdamW for all the rest.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the singular values of each
    step about equal. AdamW decouples the weight decay from the gradient (Loshchilov and Hutter
    2019, arXiv 1711.05101).

    Args:
        model: the whole network.
        hidden: the part whose matrices and filters Muon trains.
        settings: has `lr` for AdamW, `muon_lr` for Muon, and `weight_decay` for both.
    """
    matrices = {p for p in hidden.parameters() if p.ndim >= 2 and p.requires_grad}
    rest = [(name, p) for name, p in model.named_parameters() if p not in matrices]
    muon = {
        "params": [p for p in hidden.parameters() if p in matrices],  # a set has no fixed order
        "lr_scale": settings.muon_lr / settings.lr,
    }
    return Optimizers(
        FilterMuon(muon, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(
            parameter_groups(rest), settings.lr, weight_decay=settings.weight_decay, fused=True
        ),
    )


class FilterMuon(torch.optim.Optimizer):
    """`torch.optim.Muon`, which takes matrices only, extended to filters (O, I, k, k).

    Filters are copied to matrices (O, I·k·k), stepped, and copied back. (A view is not possible:
    filters may lie in memory as channels-last.)

    Args:
        group: one group of parameters, as optimizers take it.
        **muon_settings: passed on to `torch.optim.Muon`.
    """

    def __init__(self, group: dict, **muon_settings):
        super().__init__([group], {"lr": muon_settings["lr"]})
        matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in group["params"]]
        self.muon = torch.optim.Muon(matrices, **muon_settings)

    @torch.no_grad()
    def step(self):
        (own,), (inner,) = self.param_groups, self.muon.param_groups
        inner["lr"] = own["lr"]
        pairs = list(zip(own["params"], inner["params"], strict=True))
        for weight, matrix in pairs:
            matrix.copy_(weight.flatten(1))
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.muon.step()
        for weight, matrix in pairs:
            weight.copy_(matrix.view_as(weight))

    def state_dict(self) -> dict:
        return self.muon.state_dict()

    def load_state_dict(self, state: dict) -> None:
        if any(
            group.keys() != self.muon.defaults.keys() | {"params"}
            for group in state["param_groups"]
        ):
            raise ValueError("not a state of Muon")
        self.muon.load_state_dict(state)


class Optimizers:
    """Several optimizers, each with its own parameters, behind the interface of one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
