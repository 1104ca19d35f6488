"""The notebook that this repository replaces, against our loop: images per second, an epoch's time.

    pip install -r benchmarks/requirements.txt
    python benchmarks/notebook.py --data-dir data/cifar10-jpeg --epoch

Same machine, images, split and batch size (64, as in the notebook), in turn, several rounds:

- `notebook`: its network in its Lightning pipeline, repaired;
- `dataloader`: its network in our loop, on a plain DataLoader over the same decoded images;
- `loop`: its network in our loop on our batches, with nothing but normalisation, as the notebook;
- `recipe`: our network and recipe, for the whole of what changes.

Each is timed from the beginning of an epoch to its end, without validation. `--epoch` then trains
the notebook's pipeline for one whole epoch, with validation, and extrapolates to its 40 epochs.

Repairs, without which the notebook does not run: an argument that the ViT's constructor lacks, the
undefined names of its callbacks, W&B's logger (TensorBoard's in its place). Left as it is: Adam
1e-3, batch 64, no augmentation, no schedule, DataLoader without workers, uint8 images converted
one by one by torchvision's transforms, ModelCheckpoint on validation accuracy. Its split of
40,000 and 10,000 is made by --val-fraction .2 here. Its ViT: AdamW 5e-4, weight decay .1, clipping
at 1, steps of ×.2 at epochs 10, 20, 30; fp16 on a GPU only.
"""

import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from common import DEVICE, RESULTS, append, run_recipe, train_for  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402
from peers import NotebookCNN, NotebookViT  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

from batches import Batches  # noqa: E402
from cli import Parser, command  # noqa: E402
from data import load_data  # noqa: E402

BATCH = 64


class Images(Dataset):
    """A split, image by image, as torchvision.datasets.CIFAR10 gives it to the notebook."""

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
    """The notebook's module: a network, its optimizer, three numbers logged."""

    def __init__(self, name: str):
        super().__init__()
        self.name, self.model = name, (NotebookCNN if name == "cnn" else NotebookViT)()

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
    """Its Adam for the CNN, its AdamW for the ViT (within one epoch its steps do nothing)."""
    if name == "cnn":
        return torch.optim.Adam(model.parameters(), lr=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)


class Clock(lightning.Callback):
    """Seconds from the beginning of the training epoch to its last step, validation not counted."""

    def on_train_epoch_start(self, *_):
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == trainer.num_training_batches:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started


def in_lightning(name: str, data, steps: int | None) -> tuple[float, int, float | None]:
    """One epoch, or `steps` of it; seconds, images, validation accuracy (whole epochs only)."""
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
        trainer.fit(Notebook(name), *loaders[: 1 if steps else 2])
        accuracy = None if steps else trainer.callback_metrics["val_acc"].item()
    return clock.seconds, trainer.global_step * BATCH, accuracy


def in_our_loop(name: str, batches, steps: int) -> tuple[float, int]:
    """The notebook's network and optimizer in our loop; seconds and images."""
    torch.manual_seed(0)
    model = (NotebookCNN if name == "cnn" else NotebookViT)()
    model = model.to(DEVICE, memory_format=torch.channels_last)
    settings = {"clip": 1.0 if name == "vit" else 0.0, "ema_decay": 0.0, "label_smoothing": 0.0}
    optimizer = notebook_optimizer(name, model)
    history = train_for(model, optimizer, batches, None, settings, limit_batches=steps)
    return history[0]["seconds"], steps * BATCH


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", choices=("cnn", "vit"), default="cnn", help="which network")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR",
                        help="folder of images, such as data/cifar10-jpeg")  # fmt: skip
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="of a timed round")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="repetitions")
    parser.add_argument("--epoch", action="store_true", help="also one whole epoch")
    parser.add_argument("--results", type=Path, default=RESULTS / "notebook.jsonl", metavar="FILE",
                        help="where the rows are appended")  # fmt: skip
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = load_data("folder", args.data_dir, val_fraction=0.2)
    ours = Batches(data.train, BATCH, mean=data.mean, std=data.std, device=DEVICE, train=True)
    plain = DataLoader(Images(data.train, data.mean, data.std), batch_size=BATCH, shuffle=True)
    runs = {
        "notebook": lambda: in_lightning(args.model, data, args.steps)[:2],
        "dataloader": lambda: in_our_loop(args.model, plain, args.steps),
        "loop": lambda: in_our_loop(args.model, ours, args.steps),
        "recipe": lambda: run_recipe(args.model, data, limit_batches=args.steps * BATCH // 128),
    }
    speeds = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, timed in runs.items():
            seconds, images = timed()
            if turn:  # the first one warms up
                speeds[name].append(images / seconds)
    result = {"benchmark": "notebook", "model": args.model, "batch_size": BATCH}
    result |= {"images_per_second": {k: round(statistics.median(v), 1) for k, v in speeds.items()}}
    pairs = {
        k: [a / b for a, b in zip(v, speeds["notebook"], strict=True)] for k, v in speeds.items()
    }
    result["times_the_notebook"] = {k: round(statistics.median(v), 3) for k, v in pairs.items()}
    print(f"{'':12}{'images/s':>10}{'× notebook':>12}  rounds")
    for name, values in speeds.items():
        each = " ".join(f"{v:.2f}" for v in pairs[name])
        ratio = result["times_the_notebook"][name]
        print(f"{name:12}{statistics.median(values):10.1f}{ratio:12.2f}  {each}")
    if args.epoch:
        seconds, images, accuracy = in_lightning(args.model, data, None)
        result["epoch"] = {
            "seconds": round(seconds, 1),
            "images_per_second": round(images / seconds, 1),
            "val_accuracy": round(accuracy, 4),
            "seconds_40_epochs": round(40 * seconds),
        }
        print(json.dumps(result["epoch"]))
    append(args.results, result)


if __name__ == "__main__":
    main()
