"""The training loop. Read `train` from top to bottom; the functions it calls stand below it.

`train_cnn.py` and `train_vit.py` each make a model, an optimizer and batches, and call `train`.
"""

import copy
import itertools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import load_checkpoint, save_checkpoint
from cli import UserError


def train(model, optimizer, train_batches, val_batches, *, settings, card, resumed=None) -> dict:
    """Train `model` and return its last checkpoint.

    Args:
        model: on its device already.
        optimizer: over the model's parameters; the learning rate of its groups is set here.
        train_batches: any iterable with a length that gives an epoch of `(images, labels)`; labels
            are class numbers (B,), or each image's shares of the classes (B, C).
        val_batches: the same for validation, with class numbers, or None.
        settings: what the command line said (see `recipe.py`).
        card: what a checkpoint says of the run beside its tensors (see `recipe.py`).
        resumed: the checkpoint to go on from, or None.

    Raises:
        UserError: the loss is no longer a finite number, or `resumed` does not fit.
    """
    device = next(model.parameters()).device
    out_dir, epochs = Path(settings.out_dir), settings.epochs
    steps_per_epoch = min(len(train_batches), settings.limit_batches or len(train_batches))
    total_steps = epochs * steps_per_epoch
    amp_dtype = choose_amp(settings.amp, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    ema = copy.deepcopy(model).eval() if settings.ema_decay else None
    first_epoch, step, best, history = 1, 0, None, []

    if resumed:
        try:
            model.load_state_dict(resumed["model"])
            groups = optimizer.param_groups
            optimizer.load_state_dict(resumed["optimizer"])
            for old, new in zip(groups, optimizer.param_groups, strict=True):
                if not old.keys() <= new.keys():
                    raise ValueError("another optimizer")
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            line = " ".join(str(error).split())[:200]
            raise UserError(
                f"--resume: {out_dir}/last.pt is not of this version ({line})"
            ) from None
        if resumed["scaler"]:  # empty where float16 was not used
            scaler.load_state_dict(resumed["scaler"])
        if ema:
            ema.load_state_dict(resumed["ema"])
        first_epoch, step = resumed["epoch"] + 1, resumed["step"]
        best, history = resumed["best"], resumed["history"]

    old_curves = []  # those of a run that --overwrite replaces stay until a new epoch is saved
    if settings.overwrite and not resumed:
        old_curves = [
            p for d in ("train", "val") for p in out_dir.glob(f"{d}/events.out.tfevents.*")
        ]
    # Two writers with the same tags: TensorBoard draws training and validation in one chart.
    # purge_step hides what an interrupted run logged after its last checkpoint.
    purge_step = None if old_curves else step + 1
    log_train = SummaryWriter(out_dir / "train", purge_step=purge_step)
    log_val = SummaryWriter(out_dir / "val", purge_step=purge_step)
    log_train.add_text("settings", markdown_table(vars(settings)), step)
    seconds = history[-1]["seconds"] if history else 0.0
    print(TABLE_HEAD, flush=True)

    for epoch in range(first_epoch, epochs + 1):
        # 1. Seed: all that is random in this epoch (order, augmentation, stochastic depth) follows
        #    from (seed, epoch). So there is no random state to save: a resumed run is the same run.
        torch.manual_seed(epoch_seed(settings.seed, epoch))
        model.train()
        loss_sum, correct, norm_sum = torch.zeros(3, device=device)
        seen, started = 0, time.perf_counter()

        batches = itertools.islice(train_batches, steps_per_epoch)
        bar = tqdm(batches, f"epoch {epoch}/{epochs}", steps_per_epoch, leave=False, disable=None)
        for images, labels in bar:
            images, labels = images.to(device), labels.to(device)

            # 2. Learning rate: a function of the step, so a scheduler has nothing to remember.
            lr = float(lr_at(step, total_steps, settings.warmup, settings.lr))
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)

            # 3. Forward, in half precision where that is faster (autocast picks where it is safe).
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)

            # 4. Backward. The scaler keeps small float16 gradients from becoming 0; gradients are
            #    unscaled before they are clipped. When it is disabled, its calls do nothing.
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step += 1

            # 5. Average: a moving average of the weights is a better network than the last one.
            if ema:
                update_average(ema, model, step, settings.ema_decay)

            # 6. Sums stay on the device: reading one here would stop the GPU at every step.
            loss_sum += loss.detach() * len(labels)
            correct += (logits.argmax(1) == most_likely(labels)).sum()
            norm_sum += norm.nan_to_num(posinf=0)  # infinite where float16 skips the step
            seen += len(labels)

        train_loss, train_accuracy = loss_sum.item() / seen, correct.item() / seen
        epoch_seconds = time.perf_counter() - started  # after .item(): the GPU has finished
        seconds += epoch_seconds

        # 7. Validate, with the averaged weights. These images choose best.pt, never the test set.
        val_loss, val_accuracy = validate(ema or model, val_batches, settings, amp_dtype)
        good = all(bool(p.isfinite().all()) for p in model.parameters())
        if not (good and np.isfinite([train_loss, val_loss or 0]).all()):
            kept = f"; {out_dir} keeps epoch {epoch - 1}, the last good one" if history else ""
            raise UserError(
                f"the loss or the weights are no longer finite in epoch {epoch} (by step {step}) "
                f"with --lr {settings.lr:g}: start again with lower --lr, --muon-lr or "
                f"--weight-decay{kept}"
            )

        # 8. Log: a row here and in the history, points in TensorBoard.
        row = {
            "epoch": epoch,
            "step": step,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "lr": lr,
            "grad_norm": norm_sum.item() / steps_per_epoch,
            "images_per_second": seen / epoch_seconds,
            "seconds": seconds,
        }
        history.append(row)
        print(table_row(row), flush=True)
        log_row(row, log_train, log_val)

        # 9. Save: last.pt to go on from, best.pt to use.
        state = card | {
            "model": model.state_dict(),
            "ema": ema.state_dict() if ema else None,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "epoch": epoch,
            "step": step,
            "best": best,
            "history": history,
        }
        if best is None or val_accuracy is None or val_accuracy >= best["val_accuracy"]:
            state["best"] = best = {"epoch": epoch, "val_accuracy": val_accuracy}
            weights = {"model": state["ema"] or state["model"], "ema": None}
            chosen = state | weights | {"optimizer": None, "scaler": None}
        else:  # best.pt tells of the whole training, with what came after its epoch
            chosen = load_checkpoint(out_dir / "best.pt") | {"history": history}
        save_checkpoint(out_dir / "best.pt", chosen)
        save_checkpoint(out_dir / "last.pt", state)
        while old_curves:
            old_curves.pop().unlink()

    log_train.close()
    log_val.close()
    return state


def epoch_seed(seed: int, epoch: int) -> int:
    """One well-mixed 64-bit number for each (seed, epoch)."""
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


def lr_at(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """Learning rate of step 0, 1, ...: up in a line to `peak`, then down in a line to 0.

    `warmup` is the share of all steps that go up. Step `total_steps`, never taken, would have 0.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (total_steps - step) / (total_steps - warmup_steps)


@torch.no_grad()
def update_average(ema: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """The average <- d average + (1 - d) model, for weights and batch-norm statistics alike.

    d = min(decay, (1 + step) / (10 + step)): young averages forget the random start faster.
    """
    d = min(decay, (1 + step) / (10 + step))
    new = model.state_dict()
    old = {name: value for name, value in ema.state_dict().items() if value.is_floating_point()}
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(d)  # one call for all tensors
    average(list(old.values()), [new[name] for name in old], None)


@torch.no_grad()
def validate(model, batches, settings, amp_dtype=None) -> tuple[float | None, float | None]:
    """Loss (smoothed like the training's, so that the curves compare) and accuracy."""
    if not batches:
        return None, None
    model.eval()
    device = next(model.parameters()).device
    loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    count = min(len(batches), settings.limit_batches or len(batches))
    batches = itertools.islice(batches, count)
    for images, labels in tqdm(batches, "validation", count, leave=False, disable=None):
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            logits = model(images).float()
        smoothing = settings.label_smoothing
        loss_sum += F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        correct += (logits.argmax(1) == labels).sum()
        seen += len(labels)
    return loss_sum.item() / seen, correct.item() / seen


def most_likely(labels: torch.Tensor) -> torch.Tensor:
    """Class numbers (B,): `labels` themselves, or the greatest of each image's shares (B, C)."""
    return labels if labels.ndim == 1 else labels.argmax(1)


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The half-precision type that `--amp name` means on `device`; None: float32 throughout.

    Raises:
        UserError: float16, whose scaler needs a GPU, on another device.
    """
    cuda = device.type == "cuda"
    if name == "auto" and cuda:
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and not cuda:
        raise UserError(f"--amp fp16 needs --device cuda, not {device.type}; use --amp off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def parameter_groups(named_parameters) -> list[dict]:
    """Weights, which decay; and what never does: norms, biases, class token, positions."""
    weights, others = [], []
    for name, parameter in named_parameters:
        weight = parameter.ndim >= 2 and name not in ("class_token", "positions")
        (weights if weight else others).append(parameter)
    return [{"params": weights}, {"params": others, "weight_decay": 0}]


def muon_and_adamw(model: nn.Module, hidden: nn.Module, settings) -> "Optimizers":
    """Muon for the matrices and filters of `hidden`, a part of `model`; AdamW for all the rest.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) takes steps whose singular values
    are all about 1; AdamW decouples the decay from the steps (Loshchilov and Hutter 2019, arXiv
    1711.05101).
    """
    matrices = {p for p in hidden.parameters() if p.ndim >= 2 and p.requires_grad}
    rest = [(name, p) for name, p in model.named_parameters() if p not in matrices]
    muon = {
        "params": [p for p in hidden.parameters() if p in matrices],  # always in the same order
        "lr_scale": settings.muon_lr / settings.lr,
    }
    return Optimizers(
        FilterMuon(muon, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(
            parameter_groups(rest), settings.lr, weight_decay=settings.weight_decay, fused=True
        ),
    )


class FilterMuon(torch.optim.Optimizer):
    """`torch.optim.Muon`, which knows matrices only, for filters (O, I, k, k) as well.

    It steps copies of them as matrices (O, I·k·k): filters that lie in memory as channels-last
    cannot be seen as such a matrix in place. Arguments: one group of parameters, and those of
    `torch.optim.Muon`.
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
            raise ValueError("not Muon's")
        self.muon.load_state_dict(state)


class Optimizers:
    """Several optimizers, each over parameters of its own, which the loop uses as one."""

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


# ---------------------------------------------------------------- what is logged

COLUMNS = (  # heading, key of the history, format: all as wide as the heading
    ("epoch", "epoch", "d"),
    ("   step", "step", "d"),
    ("train loss", "train_loss", ".4f"),
    ("train acc", "train_accuracy", ".2%"),
    ("val loss", "val_loss", ".4f"),
    ("val acc", "val_accuracy", ".2%"),
    ("grad norm", "grad_norm", ".3f"),
    ("images/s", "images_per_second", ".0f"),
    ("  seconds", "seconds", ".1f"),
)
TABLE_HEAD = "  ".join(heading for heading, _, _ in COLUMNS)


def table_row(row: dict) -> str:
    """A row of the history under TABLE_HEAD."""
    cells = []
    for heading, key, form in COLUMNS:
        text = "-" if row[key] is None else format(row[key], form)
        cells.append(text.rjust(len(heading)))
    return "  ".join(cells)


def log_row(row: dict, log_train: SummaryWriter, log_val: SummaryWriter) -> None:
    """A row of the history as points in TensorBoard, at the row's step."""
    for tag in ("loss", "accuracy"):
        log_train.add_scalar(tag, row[f"train_{tag}"], row["step"])
        if row[f"val_{tag}"] is not None:
            log_val.add_scalar(tag, row[f"val_{tag}"], row["step"])
    log_train.add_scalar("learning rate", row["lr"], row["step"])
    log_train.add_scalar("gradient norm", row["grad_norm"], row["step"])
    log_train.add_scalar("images per second", row["images_per_second"], row["step"])
    log_train.flush()
    log_val.flush()


def markdown_table(values: dict) -> str:
    """A dict as a table that TensorBoard renders."""
    return "\n".join(["|setting|value|", "|---|---|", *(f"|{k}|{v}|" for k, v in values.items())])
