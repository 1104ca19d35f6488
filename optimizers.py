"""Muon for matrices and filters, AdamW for all other parameters."""

import collections
import functools

import torch
from torch import nn


def parameter_groups(named_parameters, weight_decay: float) -> list[dict]:
    """Two groups: weights, and what never decays (norms, biases, class token, positions)."""
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0}]
    for name, parameter in named_parameters:
        decays = parameter.ndim >= 2 and name.split(".")[-1] not in ("class_token", "positions")
        groups[0 if decays else 1]["params"].append(parameter)
    return groups


def learning_rates(optimizer) -> dict[str, float]:
    """The learning rate of each optimizer, by name; that of each group, if they differ."""
    found = {}
    for part in getattr(optimizer, "parts", [optimizer]):
        peaks = {group.get("initial_lr", group["lr"]) for group in part.param_groups}
        for number, group in enumerate(part.param_groups, 1):
            suffix = f" {number}" if len(peaks) > 1 else ""
            found[f"learning rate {type(part).__name__}{suffix}"] = group["lr"]
    return found


def muon_and_adamw(model: nn.Module, hidden: nn.Module, flags) -> "Optimizers":
    """Muon for the matrices and filters of `hidden`, a part of `model`; AdamW for all the rest.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the singular values of each
    step about equal. AdamW decouples the weight decay from the gradient (Loshchilov and Hutter
    2019, arXiv 1711.05101).

    Args:
        model: the whole network.
        hidden: the part whose matrices and filters Muon trains.
        flags: has `lr` for AdamW, `muon_lr` for Muon, and `weight_decay` for both.
    """
    matrices = [p for p in hidden.parameters() if p.ndim >= 2 and p.requires_grad]
    chosen = set(matrices)
    rest = [(name, p) for name, p in model.named_parameters() if p not in chosen]
    return Optimizers(
        Muon(matrices, lr=flags.muon_lr, weight_decay=flags.weight_decay),
        torch.optim.AdamW(parameter_groups(rest, flags.weight_decay), flags.lr, fused=True),
    )


class Muon(torch.optim.Optimizer):
    """Muon for matrices (O, I), and for filters (O, I, k, k) as matrices (O, I·k·k).

    W <- (1 - lr weight_decay) W - lr sqrt(max(1, O / I)) orthogonalised(momentum), with Nesterov
    momentum. The same steps as those of `torch.optim.Muon`, which takes matrices only.

    Args:
        parameters: to train; one group.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        momentum: how much of the moving average of gradients is kept at a step.
    """

    def __init__(self, parameters, *, lr: float, weight_decay: float, momentum: float = 0.95):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": parameters}], defaults)  # there may be none, if all are frozen

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        alike = collections.defaultdict(list)  # matrices of one shape go through as one batch
        for weight in group["params"]:
            if weight.grad is None:
                continue
            gradient, state = weight.grad.flatten(1), self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            alike[gradient.shape].append((weight, gradient.lerp(average, momentum)))
        for (rows, columns), pairs in alike.items():
            weights, updates = zip(*pairs, strict=True)
            for weight, update in zip(weights, orthogonalise(torch.stack(updates)), strict=True):
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-lr * max(1, rows / columns) ** 0.5)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Nearly U V^T of each singular value decomposition U S V^T: S becomes about 0.7 to 1.2.

    Five Newton-Schulz steps with the coefficients of Jordan et al. 2024, in bfloat16 where that is
    fast. The result has that type. matrices (n, O, I) -> (n, O, I).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices.bfloat16() if fast_bfloat16(matrices.device) else matrices.float()
    wide = X.shape[1] <= X.shape[2]
    X = X if wide else X.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # so no singular value is above 1
    for _ in range(5):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X if wide else X.mT


@functools.cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products are faster in bfloat16 than in float32: on most GPUs, on some CPUs.

    On CPUs without instructions for it they are 14 times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older versions of PyTorch do not say what a CPU has; there it counts as slow.
    has = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


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
        if not isinstance(states, list):
            raise ValueError("another optimizer")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
