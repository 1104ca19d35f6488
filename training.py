"""The training loop. Read `train` from top to bottom; the functions it calls stand below it.

`train_cnn.py` and `train_vit.py` each make a network, an optimizer and batches, and call `train`.
"""

import copy
import dataclasses
import itertools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import check_finite, check_metadata, restore, save_epoch, training_state
from cli import choose_amp, printable, writing
from models import unwrap


@dataclasses.dataclass(kw_only=True)
class TrainingSettings:
    """Settings of `train`. Each is also a flag of the training scripts."""

    out_dir: str | Path  # for checkpoints and curves
    epochs: int = 1
    lr: float = 1e-3  # peak learning rate, of parameter groups without an `lr_scale`
    warmup: float = 0.0  # fraction of the steps in which the rate rises
    label_smoothing: float = 0.0
    clip: float = 0.0  # largest gradient norm; 0: no clipping
    ema_decay: float = 0.0  # of the exponential moving average (EMA) of the weights; 0: none
    seed: int = 0
    amp: str = "off"  # mixed precision: auto, off, bf16 or fp16
    limit_batches: int | None = None  # per epoch, for validation too
    overwrite: bool = False  # replace the run in out_dir

    @classmethod
    def from_flags(cls, flags) -> "TrainingSettings":
        """The settings among all flags of a script (an `argparse.Namespace`)."""
        return cls(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(cls)})


def train(model, optimizer, train_batches, val_batches, settings, metadata, checkpoint=None):
    """Train `model`, write last.pt, best.pt and curves, and return the content of last.pt, a dict.

    Args:
        model: on its device; may be wrapped in torch.compile or DataParallel.
        optimizer: over the model's parameters. `train` sets the learning rate of its groups.
        train_batches: an iterable of `(images, labels)` with a length; each time it is iterated it
            gives an epoch. Labels are class numbers (B,), or the weight of each class (B, C).
        val_batches: the same for validation, with class numbers; or None.
        settings: a `TrainingSettings`.
        metadata: what `checkpoint.make_metadata` returns.
        checkpoint: the content of the last.pt to resume from, or None.

    Raises:
        UserError: wrong metadata, a checkpoint that does not fit, or a loss that is not finite.
    """
    network = unwrap(model)  # without a wrapper, whose prefix would end in the checkpoint's keys
    device = next(network.parameters()).device
    check_metadata(metadata, network)  # now, not when the first checkpoint is used
    epochs, steps_per_epoch = settings.epochs, limited_length(train_batches, settings.limit_batches)
    total_steps = epochs * steps_per_epoch  # optimizer steps
    amp_dtype = choose_amp(settings.amp, device)
    autocast = torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    ema = copy.deepcopy(network).eval() if settings.ema_decay else None
    step, best, history, last = 0, None, [], checkpoint
    if checkpoint is not None:
        step, best, history = restore(checkpoint, network, optimizer, scaler, ema, settings.out_dir)
    seconds = history[-1]["seconds"] if history else 0.0
    log_train, log_val, replaced = open_logs(settings, step, metadata["settings"])

    for epoch in range(len(history) + 1, epochs + 1):
        # 1. Seed: order, augmentation and stochastic depth follow from (seed, epoch). So no random
        #    state has to be saved, and a resumed run is the same run.
        torch.manual_seed(epoch_seed(settings.seed, epoch))
        model.train()  # batch norm and stochastic depth behave differently in eval mode
        loss_sum, correct, norm_sum = torch.zeros(3, device=device)
        seen, first_step, started = 0, step, time.perf_counter()

        for images, labels in progress(train_batches, f"epoch {epoch}/{epochs}", steps_per_epoch):
            images, labels = images.to(device), labels.to(device)

            # 2. Learning rate: a function of the step, so there is no scheduler state to save.
            lr = float(lr_at(step, total_steps, settings.warmup, settings.lr))
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)  # see optimizers.py

            # 3. Forward: in half precision where that is fast and safe, but the loss in float32.
            #    Sums stay on the device, because reading one at every step would make a GPU wait.
            with autocast:
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
            loss_sum += loss.detach() * len(labels)  # without detach the graph would be kept
            correct += (logits.argmax(1) == class_numbers(labels)).sum()
            seen += len(labels)

            # 4. Backward: the scaler enlarges the loss, so that small float16 gradients do not
            #    become 0. Where it is disabled, its methods change nothing.
            scaler.scale(loss).backward()

            # 5. Step: gradients are unscaled first, because clipping needs their true norm. Without
            #    clipping the norm is only measured. It is infinite where float16 skips the step.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or float("inf"))
            norm_sum += norm.nan_to_num(posinf=0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()  # or the next gradients would be added to these
            step += 1

            # 6. Average: a moving average of the weights usually scores higher than the last ones.
            if ema is not None:
                update_average(ema, network, step, settings.ema_decay)

        row = {"epoch": epoch, "step": step, "lr": lr}
        row |= {"train_loss": loss_sum.item() / seen, "train_accuracy": correct.item() / seen}
        row |= {"grad_norm": norm_sum.item() / (step - first_step)}
        epoch_seconds = time.perf_counter() - started  # after .item(), which waits for the GPU
        seconds += epoch_seconds
        row |= {"seconds": seconds, "images_per_second": seen / epoch_seconds}

        # 7. Validate (the averaged weights). This chooses best.pt; the test set never does.
        row |= validate(network if ema is None else ema, val_batches, settings, autocast)
        check_finite(network, row, settings)

        # 8. Log: the history is also in the checkpoint, for figures without TensorBoard.
        history.append(row)
        log_row(row, log_train, log_val)

        # 9. Save: an interruption loses one epoch at most. What is replaced goes only now.
        if is_best(row, best):
            best = {"epoch": epoch, "val_accuracy": row["val_accuracy"]}
        last = metadata | {"epoch": epoch, "step": step, "best": best, "history": history}
        last |= training_state(network, optimizer, scaler, ema)
        save_epoch(settings.out_dir, last)
        remove_files(replaced)

    close_logs(log_train, log_val)
    return last


# ---------------------------------------------------------------- what a step needs


def progress(batches, title: str, steps: int):
    """The first `steps` batches, with a progress bar where there is a terminal."""
    return tqdm(itertools.islice(batches, steps), title, steps, leave=False, disable=None)


def limited_length(batches, limit: int | None) -> int:
    """How many of the batches are used: all, or at most `limit`.

    Raises:
        ValueError: there is no batch.
    """
    if not len(batches):
        raise ValueError("no batches: there are fewer images than one batch has, or none")
    return min(len(batches), limit or len(batches))


def epoch_seed(seed: int, epoch: int) -> int:
    """One well-mixed 64-bit number for each (seed, epoch)."""
    # seed + epoch would not do: epoch 2 of seed 0 would be epoch 1 of seed 1.
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])


def lr_at(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """Learning rate of step 0, 1, ...: a line up to `peak`, then a line down to 0.

    `warmup` is the fraction of all steps that go up. Step `total_steps`, never taken, would have 0.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (total_steps - step) / (total_steps - warmup_steps)


def class_numbers(labels: torch.Tensor) -> torch.Tensor:
    """Class numbers (B,): `labels` themselves, or the class of the largest weight (B, C).

    So with mixed images the training accuracy counts the class that is more visible.
    """
    return labels if labels.ndim == 1 else labels.argmax(1)


@torch.no_grad()
def update_average(ema: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """The average <- d average + (1 - d) network, for weights and batch-norm statistics alike.

    d = min(decay, (1 + step) / (10 + step)): a young average forgets the random start faster.
    """
    # Batch-norm statistics are buffers, not parameters; so the state dicts are averaged.
    d = min(decay, (1 + step) / (10 + step))
    new = network.state_dict()
    old = {name: value for name, value in ema.state_dict().items() if value.is_floating_point()}
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(d)  # one call for all tensors
    average(list(old.values()), [new[name] for name in old], None)


@torch.no_grad()
def validate(network, batches, settings, autocast) -> dict:
    """`val_loss` and `val_accuracy` over all batches; both None without batches.

    The loss is smoothed as in training, so that the two can be compared.
    """
    if not batches:
        return {"val_loss": None, "val_accuracy": None}
    network.eval()  # batch norm uses its running statistics, not those of the batch
    device = next(network.parameters()).device
    loss_sum, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    steps = limited_length(batches, settings.limit_batches)
    for images, labels in progress(batches, "validation", steps):
        images, labels = images.to(device), labels.to(device)
        with autocast:
            logits = network(images).float()
        smoothing = settings.label_smoothing
        # A sum, because a mean of means would give an incomplete last batch too much weight.
        loss_sum += F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        correct += (logits.argmax(1) == class_numbers(labels)).sum()
        seen += len(labels)
    return {"val_loss": loss_sum.item() / seen, "val_accuracy": correct.item() / seen}


def is_best(row: dict, best: dict | None) -> bool:
    """Whether no epoch before had a higher validation accuracy (a tie: the later one is best).

    Without validation every epoch is.
    """
    accuracy = row["val_accuracy"]
    return best is None or accuracy is None or accuracy >= best["val_accuracy"]


# ---------------------------------------------------------------- logs

COLUMNS = (  # heading, key of the row, format: all as wide as the heading
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


def open_logs(settings, step: int, flags: dict):
    """Print the table's head; open two TensorBoard writers, whose curves share each chart.

    Also returns the event files of a run that --overwrite replaces.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes a second: not for --help

    # What an interrupted run logged after its last checkpoint is hidden. The curves of a run that
    # is replaced are not: they stay until the new run has saved an epoch.
    folders, replaced = [Path(settings.out_dir, part) for part in ("train", "val")], []
    if settings.overwrite and step == 0:
        replaced = [file for folder in folders for file in folder.glob("events.out.tfevents.*")]
    purge_step = None if replaced else step + 1
    with writing(settings.out_dir):
        log_train, log_val = (SummaryWriter(folder, purge_step=purge_step) for folder in folders)
    # In Markdown, values are code: a name such as _draft_ is shown as it is.
    table = [f"|{k}|`{printable(v).replace('`', '')}`|" for k, v in flags.items()]
    log_train.add_text("settings", "\n".join(["|setting|value|", "|---|---|", *table]), step)
    print(TABLE_HEAD, flush=True)
    return log_train, log_val, replaced


def log_row(row: dict, log_train, log_val) -> None:
    """Print a row of the history, and add its points to TensorBoard, at the row's step."""
    print(table_row(row), flush=True)
    with writing(log_train.log_dir, needed=False):
        for tag in ("loss", "accuracy"):
            log_train.add_scalar(tag, row[f"train_{tag}"], row["step"])
            if row[f"val_{tag}"] is not None:
                log_val.add_scalar(tag, row[f"val_{tag}"], row["step"])
        log_train.add_scalar("learning rate", row["lr"], row["step"])
        log_train.add_scalar("gradient norm", row["grad_norm"], row["step"])
        log_train.add_scalar("images per second", row["images_per_second"], row["step"])
        log_train.flush()
        log_val.flush()


def close_logs(*logs) -> None:
    """Write what is left."""
    for log in logs:
        with writing(log.log_dir, needed=False):
            log.close()


def remove_files(files: list[Path]) -> None:
    """Remove the files, and empty the list."""
    while files:
        files.pop().unlink(missing_ok=True)
