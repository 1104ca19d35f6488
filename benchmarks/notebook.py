"""The notebook that this repository replaces, beside our loop: images per second, an epoch's time.

    pip install -r benchmarks/requirements.txt
    python benchmarks/notebook.py --data-dir data/cifar10-jpeg --epoch

On the same machine, images, split and batch size (64, as in the notebook), in turn, for several
rounds:

- `notebook`: its network in its Lightning pipeline, repaired;
- `dataloader`: its network in our loop, on an ordinary DataLoader over the same decoded images;
- `loop`: its network in our loop on our batches, which only normalise, as the notebook does;
- `recipe`: our network and recipe, so that everything is different.

The time is that of the steps of an epoch, without validation. --epoch then trains the notebook's
pipeline for one whole epoch, with validation, and extrapolates to its 40 epochs.

Repairs, without which the notebook does not run: an argument that the ViT's constructor lacks, the
undefined names of its callbacks, TensorBoard's logger for that of W&B. Kept as they are: Adam
1e-3, batch 64, no augmentation, no schedule, DataLoader without workers, uint8 images converted
one by one by torchvision's transforms, ModelCheckpoint on validation accuracy. Its split of
40,000 and 10,000 is made by a validation fraction of .2 here. Its ViT: AdamW 5e-4, weight decay
.1, clipping at 1, steps of ×.2 at epochs 10, 20, 30; fp16 on a GPU only.
"""

import json
import logging
import statistics
import tempfile
import time
import warnings

import lightning
import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    add_folder_flag,
    add_results_flag,
    append,
    in_turn,
    new_training,
    ratios,
    recipe_settings,
    train_for,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from peers import NotebookCNN, NotebookViT
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from batches import Batches
from cli import Parser, command, integer, run
from data import load_data
from prepare import make_batches

BATCH = 64
NETWORKS = {"cnn": NotebookCNN, "vit": NotebookViT}


class Images(Dataset):
    """A split, image by image, as the notebook reads torchvision.datasets.CIFAR10."""

    def __init__(self, split, mean, std):
        self.split = split
        self.transform = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        )

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        image, label = self.split.rows(i)
        return self.transform(image), int(label)


class Notebook(lightning.LightningModule):
    """The notebook's module: a network and its optimizer; loss and accuracy are logged."""

    def __init__(self, name: str, classes: int):
        super().__init__()
        self.name, self.model = name, NETWORKS[name](classes)

    def training_step(self, batch, batch_idx):
        loss, accuracy = self.score(batch)
        self.log_dict({"train_loss": loss, "train_acc": accuracy}, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, accuracy = self.score(batch)
        self.log_dict({"val_loss": loss, "val_acc": accuracy}, on_epoch=True)

    def score(self, batch):
        logits = self.model(batch[0])
        return F.cross_entropy(logits, batch[1]), (logits.argmax(1) == batch[1]).float().mean()

    def configure_optimizers(self):
        return notebook_optimizer(self.name, self.model)


def notebook_optimizer(name: str, model) -> torch.optim.Optimizer:
    """Adam for the CNN, AdamW for the ViT. (Its schedule starts after the first epoch.)"""
    if name == "cnn":
        return torch.optim.Adam(model.parameters(), lr=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)


class Clock(lightning.Callback):
    """Seconds from the start of the training epoch to its last step, without validation."""

    def on_train_epoch_start(self, *_):
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == trainer.num_training_batches:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started


def in_lightning(name: str, data, steps: int | None = None) -> dict:
    """Train for `steps`, or for a whole epoch, which is then validated; return its measures."""
    loaders = [
        DataLoader(Images(split, data.mean, data.std), batch_size=BATCH, shuffle=i == 0)
        for i, split in enumerate((data.train, data.val))
    ]
    lightning.seed_everything(0, verbose=False)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=1,
            limit_train_batches=steps or 1.0,
            limit_val_batches=0 if steps else 1.0,
            num_sanity_val_steps=0,
            precision="16-mixed" if name == "vit" and DEVICE.type == "cuda" else "32-true",
            gradient_clip_val=1.0 if name == "vit" else None,
            accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
            devices=1,
            logger=TensorBoardLogger(folder),
            callbacks=[clock, ModelCheckpoint(folder, monitor=None if steps else "val_acc")],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Notebook(name, len(data.classes))
        trainer.fit(module, *loaders[: 1 if steps else 2])
    images = min(trainer.global_step * BATCH, len(data.train))
    result = {"seconds": clock.seconds, "images_per_second": images / clock.seconds}
    return result | {k: v.item() for k, v in trainer.callback_metrics.items() if k == "val_acc"}


def in_our_loop(name: str, data, batches, steps: int) -> float:
    """Images per second of the notebook's network and optimizer in our loop."""
    torch.manual_seed(0)
    classes = len(data.classes)
    model = NETWORKS[name](classes).to(DEVICE, memory_format=torch.channels_last)
    settings = {"clip": 1.0 if name == "vit" else 0.0, "limit_batches": steps, "classes": classes}
    settings["amp"] = "off"  # as the notebook
    optimizer = notebook_optimizer(name, model)
    return train_for(model, optimizer, batches, None, **settings)[0]["images_per_second"]


def our_recipe(name: str, data, images: int) -> float:
    """Images per second of our network and recipe, for about as many images."""
    settings = recipe_settings(name, epochs=1, classes=len(data.classes), amp="off")
    settings.limit_batches = max(1, images // settings.batch_size)
    batches, _ = make_batches(data, settings, DEVICE)
    model, optimizer = new_training(name, settings, next(iter(batches))[0])
    return train_for(model, optimizer, batches, None, **vars(settings))[0]["images_per_second"]


def compare(name: str, data, steps: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of each way, in each round."""
    ours = Batches(data.train, BATCH, mean=data.mean, std=data.std, device=DEVICE, train=True)
    plain = DataLoader(Images(data.train, data.mean, data.std), batch_size=BATCH, shuffle=True)
    ways = {
        "notebook": lambda: in_lightning(name, data, steps)["images_per_second"],
        "dataloader": lambda: in_our_loop(name, data, plain, steps),
        "loop": lambda: in_our_loop(name, data, ours, steps),
        "recipe": lambda: our_recipe(name, data, steps * BATCH),
    }
    return in_turn(ways, rounds)


def summarise(speeds: dict[str, list[float]]) -> dict:
    """Print medians and ratios to `notebook`; return them."""
    result = {"images_per_second": {}, "times_the_notebook": {}}
    print(f"{'':12}{'images/s':>10}{'× notebook':>12}  rounds")
    for way, values in speeds.items():
        pairs = ratios(values, speeds["notebook"])
        speed, ratio = statistics.median(values), statistics.median(pairs)
        each = " ".join(f"{pair:.2f}" for pair in pairs)
        print(f"{way:12}{speed:10.1f}{ratio:12.2f}  {each}")
        result["images_per_second"][way] = round(speed, 1)
        result["times_the_notebook"][way] = round(ratio, 3)
    return result


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", choices=NETWORKS, default="cnn", help="which network")
    add_folder_flag(parser)
    add("--steps", type=integer(1), default=60, metavar="N", help="steps per round")
    add("--rounds", type=integer(1), default=3, metavar="N", help="repetitions")
    add("--epoch", action="store_true", help="also train a whole epoch")
    add_results_flag(parser, "notebook.jsonl")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = load_data("folder", args.data_dir, val_fraction=0.2)
    speeds = compare(args.model, data, args.steps, args.rounds)
    result = {"benchmark": "notebook", "model": args.model, "batch_size": BATCH}
    result |= summarise(speeds)
    if args.epoch:
        epoch = in_lightning(args.model, data)
        result["epoch"] = {
            "seconds": round(epoch["seconds"], 1),
            "images_per_second": round(epoch["images_per_second"], 1),
            "val_accuracy": round(epoch["val_acc"], 4),
            "seconds_40_epochs": round(40 * epoch["seconds"]),
        }
        print(json.dumps(result["epoch"]))
    append(args.results, result)


if __name__ == "__main__":
    run(main)
