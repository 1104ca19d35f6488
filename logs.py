"""What a run shows: a row per epoch in the terminal; curves, text and pictures in TensorBoard.

x is the number of steps done, everywhere. Only the first process writes; in others `Logs` is None.
"""

import copy
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.utils import make_grid

import distributed
from batches import mixed_seed
from checkpoint import formula_image
from cli import UserError, printable, writing
from models import count_parameters, counting_operations
from settings import CHANGEABLE

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


@dataclasses.dataclass
class Logs:
    """Two TensorBoard writers, whose curves share each chart."""

    train: "SummaryWriter"  # noqa: F821, imported late
    val: "SummaryWriter"  # noqa: F821


def open_logs(settings, step: int, metadata: dict, network: nn.Module):
    """Print the table's head, open the writers, write settings and layers as text.

    Returns:
        (`Logs` or None, the event files of a run that --overwrite replaces).

    Raises UserError: there is another run in the folder, or it cannot be written.
    """
    last = Path(settings.out_dir, "last.pt")
    if step == 0 and not settings.overwrite and last.exists():
        raise UserError(f"{last} is of another run: choose another out_dir, or overwrite=True")
    print(TABLE_HEAD, flush=True)
    if distributed.rank():
        return None, []
    from torch.utils.tensorboard import SummaryWriter  # takes a second: not for --help
    from torch.utils.tensorboard.summary import hparams

    # What an interrupted run logged after its last checkpoint is hidden. The curves of a run that
    # is replaced are not: they stay until the new run has saved an epoch.
    folders, replaced = [Path(settings.out_dir, part) for part in ("train", "val")], []
    if settings.overwrite and step == 0:
        replaced = [file for folder in folders for file in folder.glob("events.out.tfevents.*")]
    purge_step = None if replaced else step + 1
    # TensorBoard reads files of the same second in the order of process numbers, so wait a moment.
    while any(list(f.glob(f"events.out.tfevents.{int(time.time())}.*")) for f in folders):
        time.sleep(0.05)
    with writing(settings.out_dir):
        logs = Logs(*(SummaryWriter(folder, purge_step=purge_step) for folder in folders))
    loss = "train: what is minimised, with label smoothing; val: plain cross-entropy, without"
    about = {"epoch/loss": loss} | metadata["settings"]
    logs.train.add_text("settings", markdown(["setting", "value"], about.items()), step)
    for summary in hparams(hyperparameters(metadata["settings"]), {"epoch/accuracy": 0.0}):
        logs.val.file_writer.add_summary(summary, step)  # of this run: add_hparams would add one
    logs.train.add_text("layers", layer_table(network, metadata["dataset"]["image_size"]), step)
    return logs, replaced


def hyperparameters(flags: dict) -> dict:
    """What the tab HPARAMS compares: flags that may not change in a run, as simple values."""
    chosen = {key: value for key, value in flags.items() if key not in CHANGEABLE}
    return {k: v if isinstance(v, bool | int | float) else printable(v) for k, v in chosen.items()}


def log_epoch(logs: Logs | None, row: dict, points: list[dict]) -> None:
    """Print a row of the history; add it, and a point for each of its steps, to TensorBoard.

    points: for each step numbers by name. The loss of one is the mean over the processes.
    """
    print(table_row(row), flush=True)
    curves = {name: torch.stack([torch.as_tensor(p[name]) for p in points]) for name in points[0]}
    curves["loss"] = distributed.summed(curves["loss"])[0] / distributed.world_size()
    if logs is None:
        return
    with writing(logs.train.log_dir, needed=False):
        for tag in ("loss", "accuracy"):
            logs.train.add_scalar(f"epoch/{tag}", row[f"train_{tag}"], row["step"])
            if row[f"val_{tag}"] is not None:
                logs.val.add_scalar(f"epoch/{tag}", row[f"val_{tag}"], row["step"])
        logs.train.add_scalar("time/images per second", row["images_per_second"], row["step"])
        first = row["step"] - len(points) + 1
        for name, values in curves.items():
            for step, value in enumerate(values.tolist(), first):
                logs.train.add_scalar(f"step/{name}", value, step)
        logs.train.flush()
        logs.val.flush()


def close_logs(logs: Logs | None) -> None:
    """Write what is left."""
    for log in (logs.train, logs.val) if logs else ():
        with writing(log.log_dir, needed=False):
            log.close()


def remove_files(files: list[Path]) -> None:
    """Remove the files, and empty the list."""
    while files:
        files.pop().unlink(missing_ok=True)


# ---------------------------------------------------------------- text


def markdown(head: list[str], rows) -> str:
    """A table. Values are code: a name such as _draft_ is shown as it is."""
    lines = [f"|{'|'.join(head)}|", "|---" * len(head) + "|"]
    for first, *rest in rows:
        cells = "|".join(f"`{printable(value).replace('`', '')}`" for value in rest)
        lines.append(f"|{first}|{cells}|")
    return "\n".join(lines)


def layer_table(network: nn.Module, image_size: int) -> str:
    """Markdown: for each layer its output's shape, parameters and multiply-adds for one image."""
    copied, outputs, rows = copy.deepcopy(network).cpu().eval(), {}, []
    layers = {name: layer for name, layer in copied.named_modules() if name.count(".") < 2}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *args, name=name: outputs.update({name: args[-1]}))
    with torch.no_grad(), counting_operations() as counter:
        copied(formula_image(image_size))
    for name, output in outputs.items():  # in the order of the forward pass
        output = output[0] if isinstance(output, tuple) else output
        shape = "×".join(map(str, output.shape[1:])) if torch.is_tensor(output) else ""
        operations = counter.flop_counts[f"{type(copied).__name__}.{name}".rstrip(".")]
        numbers = count_parameters(layers[name]), sum(operations.values()) // 2
        kind = type(layers[name]).__name__
        rows.append((name or "**all**", kind, shape, *(f"{n:,}" for n in numbers)))
    return markdown(["layer", "kind", "output", "parameters", "multiply-adds"], rows)


# ---------------------------------------------------------------- pictures


MAX_CLASSES = 25  # with a curve


class Pictures:
    """Pictures for TensorBoard, after epochs 1, 2, 4, 8, ... and the last. `train` calls it.

    The first augmented images; eight validation images, explained, the same each time; the
    confusion matrix of validation and its most confident mistakes. After every epoch also the
    validation accuracy of each class. No random state is changed.

    Args:
        train_batches: as that of `train`; or what has them as `batches`.
        val_batches: `Batches`, or None. Of other iterables only the matrix is drawn.
        metadata: as that of `train`.
        settings: a `TrainingSettings`.
    """

    def __init__(self, train_batches, val_batches, metadata: dict, settings):
        self.train_batches, self.val_batches = train_batches, val_batches
        self.metadata, self.settings = metadata, settings

    def __call__(self, logs: Logs | None, row: dict, network: nn.Module, outputs) -> None:
        """Draw. `row`: of the history; `outputs`: (logits (N, C), labels (N,)) of validation."""
        epoch, step = row["epoch"], row["step"]
        if logs is None:
            return
        if outputs is not None:
            with writing(logs.val.log_dir, needed=False):
                for name, accuracy in self.class_accuracies(*outputs).items():
                    logs.val.add_scalar(f"validation accuracy/{name}", accuracy, step)
        if epoch & (epoch - 1) and epoch != self.settings.epochs:
            return
        with writing(logs.train.log_dir, needed=False):
            pixels = self.augmented(epoch)
            logs.train.add_image("pictures/augmented", pixels, step, dataformats="HWC")
            if outputs is not None:
                from figures import in_our_style  # takes seconds to import: no decorator

                in_our_style(self.add_figures)(logs.val, step, network, *outputs)
            logs.train.flush()
            logs.val.flush()

    def class_accuracies(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """The fraction of images that are right, of each of the first MAX_CLASSES with images."""
        right, labels = (logits.argmax(1) == labels).cpu(), labels.cpu()
        names = enumerate(self.metadata["classes"][:MAX_CLASSES])
        found = {printable(name): right[labels == i] for i, name in names}
        return {name: x.double().mean().item() for name, x in found.items() if len(x)}

    def augmented(self, epoch: int) -> np.ndarray:
        """Up to 16 images of the epoch's first batch, four times as large: uint8 (H, W, 3)."""
        batches = getattr(self.train_batches, "batches", self.train_batches)
        mean, std = (
            255 * torch.tensor(self.metadata[key]).view(3, 1, 1) for key in ("mean", "std")
        )
        with torch.random.fork_rng(devices=[]):  # the same draws as in the loop
            torch.default_generator.manual_seed(mixed_seed(self.settings.seed, epoch))
            images = next(iter(batches))[0][:16].cpu()
        pixels = (images * std + mean).round().clamp(0, 255).byte()
        large = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return make_grid(large, nrow=4, pad_value=255).permute(1, 2, 0).numpy()

    def add_figures(self, log, step: int, network: nn.Module, logits, labels) -> None:
        """Explanations, mistakes and the confusion matrix, from validation's logits and labels."""
        from charts import plot_confusion  # these take seconds to import
        from examples import draw_explained
        from metrics import choose_mistakes, measure, probabilities
        from prepare import TrainedModel

        name, classes = self.metadata["model_name"], self.metadata["classes"]
        logits = logits.cpu().nan_to_num().numpy()  # float16 may have infinite ones
        labels = labels.cpu().numpy()
        if split := getattr(self.val_batches, "split", None):
            found = choose_mistakes([probabilities(logits)], labels)
            rows = {"explained": np.linspace(0, len(labels) - 1, min(8, len(labels))).astype(int)}
            if "mistakes" in found:
                rows["most confident mistakes"] = found["mistakes"]
            model = TrainedModel(name, "", network, self.metadata)
            for title, chosen in rows.items():
                figure = draw_explained([model], split, torch.from_numpy(chosen), classes)
                log.add_figure(f"pictures/{title}", figure, step)
        scores = {f"{name}, validation": measure(logits, labels, classes)}
        log.add_figure("pictures/confusion", plot_confusion(scores, classes), step)
