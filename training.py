"""The training loop. Read `train` from top to bottom; the functions it calls stand below it.

`train_cnn.py` and `train_vit.py` each make a network, an optimizer and batches, and call `train`.
"""

import contextlib
import copy
import dataclasses
import itertools
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import distributed
from batches import mixed_seed
from checkpoint import check_finite, check_metadata, restore, save_epoch, training_state
from cli import UserError
from logs import close_logs, log_epoch, open_logs, remove_files
from models import unwrap
from optimizers import learning_rates
from settings import AMP_TYPES, choose_amp
from stopping import finishing_steps, stop_if_asked


@dataclasses.dataclass(kw_only=True)
class TrainingSettings:
    """Settings of `train`. Each is also a flag of the training scripts."""

    out_dir: str | Path  # for checkpoints and curves
    epochs: int = 1
    warmup: float = 0.0  # fraction of the steps in which the learning rates rise
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


@finishing_steps
def train(
    model, optimizer, train_batches, val_batches, settings, metadata, checkpoint=None, pictures=None
):
    """Train `model`, write last.pt, best.pt and curves, and return the content of last.pt, a dict.

    Under `torchrun` every process calls this with the same arguments, and trains on its part of
    each batch; see `distributed.py`.

    Args:
        model: on its device; may be wrapped in torch.compile or DataParallel.
        optimizer: over the model's parameters. A group's peak is `initial_lr`, or else `lr`.
        train_batches: an iterable of `(images, labels)` with a length; each time it is iterated it
            gives an epoch. Labels are class indices (B,), or class probabilities (B, C).
        val_batches: the same for validation, with class indices; or None.
        settings: a `TrainingSettings`.
        metadata: what `checkpoint.make_metadata` returns.
        checkpoint: the content of the last.pt to resume from, or None.
        pictures: called after each epoch, as `logs.Pictures`, or None.

    Raises:
        UserError: wrong metadata, a checkpoint that does not fit, another run in the folder, or a
            loss that is not finite.
        ValueError: there are no batches.
        Stopped: SIGINT or SIGTERM has come; a step was finished.
    """
    network = unwrap(model)  # a wrapper would add a prefix to the checkpoint's keys
    device = next(network.parameters()).device
    check_metadata(metadata, network)  # now, not when the first checkpoint is used
    epochs, steps_per_epoch = settings.epochs, limited_length(train_batches, settings.limit_batches)
    total_steps = epochs * steps_per_epoch  # optimizer steps
    amp = choose_amp(settings.amp, device)  # automatic mixed precision: off, bf16 or fp16
    autocast = torch.autocast(device.type, AMP_TYPES[amp], enabled=amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    ema = copy.deepcopy(network).eval() if settings.ema_decay else None
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))  # its peak; phase 2 changes "lr"
    step, best, history, last = 0, None, [], checkpoint
    if checkpoint is not None:
        refuse_other_length(checkpoint, settings, total_steps)
        step, best, history = restore(checkpoint, network, optimizer, scaler, ema, settings.out_dir)
    distributed.check_same(step)
    model = distributed.wrap(model)  # averages gradients over the processes, if there are several
    seconds = history[-1]["seconds"] if history else 0.0
    logs, replaced = open_logs(settings, step, metadata, network)

    for epoch in range(len(history) + 1, epochs + 1):
        # 1. Seed: order and augmentation follow from (seed, epoch); phase 3 seeds what the network
        #    draws. So no random state has to be saved, and a resumed run is the same run.
        torch.manual_seed(mixed_seed(settings.seed, epoch))
        model.train()  # batch norm and stochastic depth behave differently in eval mode
        loss_sum, correct, norm_sum = torch.zeros(3, device=device)
        seen, points, started = 0, [], time.perf_counter()

        for images, labels in progress(train_batches, f"epoch {epoch}/{epochs}", steps_per_epoch):
            seen += len(labels)
            images, labels = distributed.own_part(images.to(device), labels.to(device))

            # 2. Learning rate: a function of the step, so there is no scheduler state to save.
            for group in optimizer.param_groups:
                group["lr"] = float(lr_at(step, total_steps, settings.warmup, group["initial_lr"]))

            # 3. Forward: in half precision where that is fast and safe, but the loss in float32.
            #    Sums stay on the device, because reading one at every step would make a GPU wait.
            with own_random_numbers(device, settings.seed, epoch, seen), autocast:
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
            loss_sum += loss.detach() * len(labels)  # without detach the graph would be kept
            correct += (logits.argmax(1) == class_indices(labels)).sum()

            # 4. Backward: the scaler enlarges the loss, so that small float16 gradients do not
            #    become 0. Under torchrun gradients become the mean over the processes here.
            scaler.scale(loss).backward()

            # 5. Step: gradients are unscaled first, because clipping needs their true norm. Without
            #    clipping it is only measured. If it is not finite, a step in float16 is skipped.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or float("inf"))
            norm_sum += norm.nan_to_num(posinf=0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()  # or the next gradients would be added to these
            step += 1
            values = {"loss": loss.detach(), "gradient norm": norm}
            points.append(values | learning_rates(optimizer))

            # 6. Average: a moving average of the weights often scores higher than the last ones.
            if ema is not None:
                update_average(ema, network, step, settings.ema_decay)

        loss_sum, correct = distributed.summed(loss_sum, correct)
        row = {"epoch": epoch, "step": step, "grad_norm": norm_sum.item() / len(points)}
        row |= {"train_loss": loss_sum.item() / seen, "train_accuracy": correct.item() / seen}
        epoch_seconds = time.perf_counter() - started  # after .item(), which waits for the GPU
        seconds += epoch_seconds
        row |= {"seconds": seconds, "images_per_second": seen / epoch_seconds}

        # 7. Validate (the averaged weights). This chooses best.pt; the test set never does.
        evaluated = network if ema is None else ema
        distributed.average_statistics(network, ema)
        scores, outputs = validate(evaluated, val_batches, metadata, settings, autocast)
        row |= scores
        check_finite(evaluated, row, settings)

        # 8. Log: the history is also in the checkpoint, for figures without TensorBoard.
        history.append(row)
        log_epoch(logs, row, points)
        if pictures is not None:
            pictures(logs, row, evaluated, outputs)

        # 9. Save: an interruption loses one epoch at most. Only then are old curves deleted.
        if is_best(row, best):
            best = {"epoch": epoch, "val_accuracy": row["val_accuracy"]}
        last = metadata | {"epoch": epoch, "step": step, "best": best, "history": history}
        last |= training_state(network, optimizer, scaler, ema)
        save_epoch(settings.out_dir, last)
        remove_files(replaced)

    close_logs(logs)
    return last


# ---------------------------------------------------------------- what a step needs


def progress(batches, title: str, steps: int):
    """The first `steps` batches, with a progress bar where there is a terminal.

    Raises Stopped: a signal came during a step; the step is finished.
    """
    for batch in tqdm(itertools.islice(batches, steps), title, steps, leave=False, disable=None):
        yield batch
        stop_if_asked()


@contextlib.contextmanager
def own_random_numbers(device: torch.device, *numbers: int):
    """Seed PyTorch's generators in the block with `numbers` and the process; restore them after it.

    So what a network draws, as in stochastic depth, changes no batch and differs between processes.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(mixed_seed(*numbers, 1 + distributed.rank()))
        yield


def limited_length(batches, limit: int | None) -> int:
    """How many of the batches are used: all, or at most `limit`.

    Raises ValueError: there is no batch.
    """
    if not len(batches):
        raise ValueError("no batches: there are fewer images than one batch has, or none")
    return min(len(batches), limit or len(batches))


def refuse_other_length(checkpoint: dict, settings, total_steps: int) -> None:
    """Raise UserError if an epoch of the run to resume had another number of steps.

    Its next learning rate would jump, or be negative.
    """
    had, now = checkpoint["step"] // checkpoint["epoch"], total_steps // settings.epochs
    if had != now:
        raise UserError(
            f"--resume: an epoch of {settings.out_dir}/last.pt has {had} steps; with these batches "
            f"it has {now}: use the same batches and batch size, or start again (--overwrite)"
        )


def lr_at(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """Learning rate of step 0, 1, ...: a line up to `peak`, then a line down to 0.

    `warmup` is the fraction of all steps that go up. Step `total_steps`, never taken, would have 0.
    """
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (total_steps - step) / (total_steps - warmup_steps)


def class_indices(labels: torch.Tensor) -> torch.Tensor:
    """Class indices (B,): `labels` themselves, or the most probable class of each row (B, C).

    So with mixed images the training accuracy counts the class that is more visible.
    """
    return labels if labels.ndim == 1 else labels.argmax(1)


@torch.no_grad()
def update_average(ema: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """The average <- d average + (1 - d) network, for weights and batch-norm statistics alike.

    d = min(decay, (1 + step) / (10 + step)): a young average forgets the random start faster.
    """
    # Batch-norm statistics are buffers, not parameters; so the state dicts are averaged.
    d, new = min(decay, (1 + step) / (10 + step)), network.state_dict()
    for name, average in ema.state_dict().items():
        if average.is_floating_point():  # not the number of batches that batch norm has seen
            average.lerp_(new[name], 1 - d)


@torch.no_grad()
def validate(network, batches, metadata, settings, autocast) -> tuple[dict, tuple | None]:
    """`val_loss` and `val_accuracy` over all batches, and (logits (N, C), labels (N,)).

    The loss is the plain cross-entropy, without label smoothing. Without batches all is None.

    Raises UserError: images are not of the size to which evaluate.py will scale.
    """
    if not batches:
        return {"val_loss": None, "val_accuracy": None}, None
    network.eval()  # batch norm uses its running statistics, not those of the batch
    device = next(network.parameters()).device
    own = slice(distributed.rank(), None, distributed.world_size())  # rows of this process
    outputs, labels = [], []
    steps = limited_length(batches, settings.limit_batches)
    for images, numbers in progress(batches, "validation", steps):
        check_size(images, metadata["dataset"]["image_size"])
        with autocast:
            part = network(images[own].to(device)).float()
        # Rows of the other processes are 0 here, so a sum puts all together, each image once.
        outputs.append(part.new_zeros(len(images), part.shape[1]))
        outputs[-1][own] = part
        labels.append(numbers.to(device))
    logits, labels = torch.cat(outputs), torch.cat(labels)
    distributed.summed(logits)
    loss = F.cross_entropy(logits, labels).item()
    correct = (logits.argmax(1) == labels).sum().item()
    return {"val_loss": loss, "val_accuracy": correct / len(labels)}, (logits, labels)


def check_size(images: torch.Tensor, size: int) -> None:
    """Raise UserError if images (B, 3, H, W) have another side than the metadata say."""
    if images.ndim == 4 and images.shape[2:] != (size, size):
        raise UserError(
            f"validation images have {images.shape[2]}×{images.shape[3]} pixels, the metadata say "
            f"{size}×{size}: scale them, or use make_metadata(..., dataset={{'image_size': ...}})"
        )


def is_best(row: dict, best: dict | None) -> bool:
    """Whether no epoch before had a higher validation accuracy (a tie: the later one is best).

    Without validation every epoch is.
    """
    accuracy = row["val_accuracy"]
    return best is None or accuracy is None or accuracy >= best["val_accuracy"]
