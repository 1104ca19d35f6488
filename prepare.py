"""Set up a training run from its flags. Load networks, data and images for the other scripts."""

import argparse
import dataclasses
import glob
import re
import shlex
from pathlib import Path

import numpy as np
import torch
from torch import nn

import distributed
from batches import Batches, batch_size_without_training, predict
from checkpoint import load_model, make_metadata
from cli import UserError, naming, printable, quoted, use_device, warn
from data import Data, Split, load_data
from models import build_model, count_parameters, model_arguments
from settings import AMP_TYPES, WITHOUT_WEIGHTS, as_flags, choose_amp

# ---------------------------------------------------------------- before training


def prepare(flags: argparse.Namespace, model_name: str, checkpoint: dict | None):
    """Load the data, build the network; print in one line what will be trained.

    Args:
        flags: all flags of a training script.
        model_name: the network's name in `models.MODELS`. Its constructor gets `classes` and those
            of the flags that it takes.
        checkpoint: the checkpoint to resume from, or None.

    Returns:
        (model on its device, training batches, validation batches or None, metadata).

    Raises UserError: no such device, no data, a network that cannot be built, or other images than
    those of the run to resume.
    """
    distributed.check_divides(flags.batch_size)
    device = distributed.start(use_device(flags))
    flags.amp = choose_amp(flags.amp, device)  # from here on no longer "auto"; kept on resuming
    if flags.dataset != "folder" and flags.image_size != 32:
        advice = "use other weights" if flags.init else "omit it"
        raise UserError(f"--image-size {flags.image_size} is for --dataset folder alone: {advice}")
    # Wrong flags and files are refused before images are read.
    config, source = model_arguments(model_name, vars(flags) | {"classes": 2}), None
    if flags.init is not None and checkpoint is None:
        with naming("--init"):
            source = load_model(flags.init)
        kept = {key: config[key] for key in WITHOUT_WEIGHTS & set(config)}
        config = source[1]["model_config"] | kept
    _build(model_name, config)
    torch.manual_seed(flags.seed)
    choices = {key: getattr(flags, key) for key in ("image_size", "val_fraction", "batch_size")}
    data = load_data(flags.dataset, flags.data_dir, **choices)
    config["classes"] = len(data.classes)
    model = _build(model_name, config).to(device, memory_format=torch.channels_last)
    if flags.compile:
        model.compile()
    metadata = describe_run(data, flags, model_name, config)
    if checkpoint is not None:
        refuse_other_images(checkpoint, data)
        metadata["dataset"] = checkpoint["dataset"] | metadata["dataset"]
    notes = [data.note] if data.note else []
    slow = flags.amp != "off" and choose_amp("auto", device) == "off"
    if checkpoint is not None and slow:
        notes.append(f"{flags.amp} as before, but slow on this device: --amp off is faster")
    if source is not None:
        remember_start(metadata, source[1], f"--init {flags.init}", data)
        head = start_from(model, *source, config, data.classes)
        notes.append(f"starting from the weights of {flags.init}{head}")
    train_batches, val_batches = make_batches(data, flags, device)
    print(
        description(data, flags, model_name, config, model, device)
        + "".join(f"; {printable(note)}" for note in notes)
    )
    return model, train_batches, val_batches, metadata


def description(data: Data, flags, model_name: str, config: dict, model, device) -> str:
    """In one line, what will be trained, on what and how."""
    choices = {key: config[key] for key in config if key not in ("classes", "image_size")}
    threads = f" (threads: {torch.get_num_threads()})" if device.type == "cpu" else ""
    number = distributed.world_size()
    processes = f"{number} processes, each on " if number > 1 else ""
    precision = str(AMP_TYPES[flags.amp]).removeprefix("torch.")
    return (
        f"{data.name}: {len(data.classes)} classes ({quoted(data.classes)}); "
        f"{len(data.train):,} training, {len(data.val):,} validation, "
        f"{len(data.test):,} test images; {model_name} of {count_parameters(model):,} parameters; "
        f"{flags.epochs} epochs, batch {flags.batch_size}, on {processes}{device.type}{threads}, "
        + precision
        + (f"; {as_flags(choices | {'flip': flags.flip})}" if data.name == "digits" else "")
    )


def _build(model_name: str, config: dict) -> nn.Module:
    """`build_model`, with errors that name flags."""
    sizes = {key: config[key] for key in config if key not in ("classes", "image_size")}
    try:
        return build_model(model_name, config)
    except ValueError as error:
        message = str(error)  # names arguments
        for key in sizes:
            message = re.sub(rf"\b{key}\b", "--" + key.replace("_", "-"), message)
        raise UserError(message) from None
    except (RuntimeError, TypeError, OverflowError) as error:
        if not re.search("allocate|overflow|infinity", str(error), re.IGNORECASE):
            raise  # a mistake in the network's code
        message = f"a network with {as_flags(sizes)} is too large: use smaller numbers"
        raise UserError(message) from None


def start_from(network, source, checkpoint: dict, config: dict, classes: list[str]) -> str:
    """Give `network` the weights of `source`, and return what to say of its last layer.

    Parameters whose shape depends on the number of classes follow the classes, or stay new if the
    checkpoint has others.
    """
    weights, own = source.state_dict(), network.state_dict()
    if checkpoint["classes"] == classes:
        network.load_state_dict(weights)
        return ""
    more = build_model(checkpoint["model_name"], config | {"classes": len(classes) + 1})
    head = [key for key, value in more.state_dict().items() if value.shape != own[key].shape]
    if set(classes) == set(checkpoint["classes"]):
        order = [checkpoint["classes"].index(name) for name in classes]
        network.load_state_dict(weights | {key: weights[key][order] for key in head})
        return ""
    network.load_state_dict(weights | {key: own[key] for key in head})
    return ", with a new head for other classes"


def make_batches(data: Data, flags, device) -> tuple[Batches, Batches | None]:
    """Augmented batches for training and, if there is a validation split, unchanged ones for it."""
    common = {"mean": data.mean, "std": data.std, "device": device}
    keys = ("flip", "shift", "erase", "trivial_augment", "mix", "balance")
    augmentation = {key: getattr(flags, key) for key in keys}
    augmentation["classes"] = len(data.classes)
    train_batches = Batches(data.train, flags.batch_size, train=True, **augmentation, **common)
    size = batch_size_without_training(data.val.images.shape[-1])
    return train_batches, Batches(data.val, size, **common) if len(data.val) else None


def describe_run(data: Data, flags, model_name: str, model_config: dict) -> dict:
    """The metadata of a run of the training scripts."""
    dataset = {
        "name": data.name, "data_dir": flags.data_dir, "image_size": flags.image_size,
        "val_fraction": flags.val_fraction, "sizes": data.sizes, "content": data.content,
        "drawn": list(data.drawn),
    }  # fmt: skip
    return make_metadata(
        model_name, model_config, classes=data.classes, mean=data.mean, std=data.std,
        dataset=dataset, settings=vars(flags),
    )  # fmt: skip


def same_images(trained_on: dict, data: Data) -> bool:
    """Whether `data` are a checkpoint's images, split alike. (Older ones have no `content`.)"""
    known = trained_on["name"], trained_on["sizes"], trained_on.get("content", data.content)
    return known == (data.name, data.sizes, data.content)


def trained_before(name: str, trained_on: dict, data: Data, split: str) -> str:
    """A caveat if `name` may have been trained on images of a drawn split; "" if it was not.

    trained_on: the data set of its checkpoint; its "before" has those of the weights of --init.
    """
    for images in (trained_on, *trained_on.get("before", ())):
        if split == "val":
            differ = not same_images(images, data)
        elif images["name"] == data.name:
            differ = images.get("content") not in (None, data.content)
        else:
            differ = not images["name"]
        if differ and split in {*data.drawn, *images.get("drawn", ())}:
            known = "was trained on other images" if images["name"] else "does not know its images"
            return (
                f"{name} {known}. If some of them are in this {split} split, accuracy on it is too "
                "high"
            )
    return ""


def remember_start(metadata: dict, start: dict, name: str, data: Data) -> None:
    """Keep in `metadata` what the weights to start from were trained on; warn if it may matter."""
    if set(start["classes"]) != set(data.classes):  # so these are other images
        return
    last = start["dataset"]
    metadata["dataset"]["before"] = [last | {"before": []}, *last.get("before", ())]
    for split in ("val", "test"):
        if caveat := trained_before(name, last, data, split):
            warn(f"{caveat}: use other weights")


def refuse_other_images(checkpoint: dict, data: Data) -> None:
    """Raise UserError if the images are not those that the run to resume was trained on."""
    old = checkpoint["dataset"]
    if not same_images(old, data) or data.classes != checkpoint["classes"]:
        raise UserError(
            "--resume: the images in --data-dir are not those of the run, which had "
            f"{sum(old['sizes'])} of {len(checkpoint['classes'])} classes; now there are "
            f"{sum(data.sizes)} of {len(data.classes)}, or other files: restore them, or "
            "start again in another --out-dir"
        )


def load_teacher(path: Path, out_dir: Path, metadata: dict, model: nn.Module) -> nn.Module:
    """The network of a checkpoint, to learn from, on the device of `model`.

    Raises UserError: it cannot be read, was trained on other images, would be overwritten, or has
    changed since the run to resume was started.
    """
    if path.resolve().parent == out_dir.resolve():
        raise UserError(
            f"--teacher {path} is in --out-dir, where it would be overwritten: choose another"
        )
    with naming("--teacher"):
        teacher, checkpoint = load_model(path, next(model.parameters()).device)
    same = metadata["classes"] == checkpoint["classes"]
    same &= metadata["dataset"]["image_size"] == checkpoint["dataset"]["image_size"]
    statistics = [each["mean"] + each["std"] for each in (metadata, checkpoint)]
    if not same or not np.allclose(*statistics, rtol=0, atol=0.02):
        raise UserError(
            f"--teacher {path}: it was trained on other images, sizes or classes "
            f"({checkpoint['dataset']['name']}, {len(checkpoint['classes'])} classes): use a "
            "checkpoint trained on the same data set"
        )
    known = metadata["dataset"].setdefault("teacher", checkpoint["self_test"])
    if known != checkpoint["self_test"]:
        raise UserError(
            f"--teacher {path}: it has changed since this run was started: put it back, or start "
            "again (--overwrite)"
        )
    return teacher


def print_next_steps(last: dict, out_dir: Path) -> None:
    """Print the best validation accuracy, and the commands to run next."""
    best = last["best"]
    if best["val_accuracy"] is not None:
        print(f"best validation accuracy {best['val_accuracy']:.2%} after epoch {best['epoch']}")
    print("next:")
    for script in ("evaluate.py", "explain.py"):
        print(f"  python {script} {shlex.quote(str(out_dir / 'best.pt'))}")
    print(f"  tensorboard --logdir {shlex.quote(str(out_dir))}")


# ---------------------------------------------------------------- from checkpoints


@dataclasses.dataclass
class TrainedModel:
    """A network rebuilt from a checkpoint, in eval mode."""

    name: str  # in tables and figures: the run's folder, or the file's own name
    path: str  # as typed
    network: nn.Module
    checkpoint: dict

    def output_indices(self, classes: list[str]) -> torch.Tensor:
        """The network's outputs that stand for `classes`, (C,). Classes match by name."""
        return torch.tensor([self.checkpoint["classes"].index(name) for name in classes])

    def batches(self, split: Split, *, explain: bool = False) -> Batches:
        """A split's images as the network takes them; `explain`: fewer at a time."""
        count = batch_size_without_training(split.images.shape[-1], explain=explain)
        device = next(self.network.parameters()).device
        mean, std = self.checkpoint["mean"], self.checkpoint["std"]
        return Batches(split, count, mean=mean, std=std, device=device)

    def logits(self, split: Split, classes: list[str]) -> torch.Tensor:
        """Logits (N, C) of a split's images, in the order of `classes`, on the CPU."""
        logits, _ = predict(self.network, self.batches(split))
        return logits[:, self.output_indices(classes)]


def expand_patterns(names: list[str]) -> list[str]:
    """Patterns such as photos/*.jpg as the files that they match, where no shell has done it."""
    found = {n: [] if Path(n).exists() else sorted(glob.glob(n)) for n in names}  # noqa: PTH207
    return [path for name in names for path in found[name] or [name]]


def _name(path: str) -> str:
    """What a checkpoint is called in tables and figures: its run's folder, or its own name."""
    file = Path(path)
    if file.stem not in ("best", "last"):
        return file.stem
    nameless = file.parent.name.strip(".") == ""  # "", . or ..
    return (file.parent.resolve() if nameless else file.parent).name


def load_models(paths: list[str], device: torch.device) -> list[TrainedModel]:
    """The networks of all checkpoints. Raises UserError: one cannot be read, or is named twice."""
    paths = expand_patterns(paths)
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{path} is named twice: name it once")
    names = list(map(_name, paths))
    if "" in names or len(set(names)) < len(names):
        names = paths
    models = []
    for name, path in zip(names, paths, strict=True):
        network, checkpoint = load_model(path, device)
        network.requires_grad_(False)
        network.to(memory_format=torch.channels_last)  # nearly twice as fast for the CNN
        models.append(TrainedModel(printable(name), path, network, checkpoint))
    return models


def load_data_for(
    models: list[TrainedModel], name: str | None, data_dir: Path | None, split: str = "test"
) -> Data:
    """The data set that the models were trained on, unless `name` or `data_dir` differ.

    The validation split is made for `split="val"`, or if the models were trained on these data.

    Raises UserError: the models were trained on different data, or have other classes than it.
    """
    keys = [key for key, typed in (("name", name), ("data_dir", data_dir)) if typed is None]
    refuse_different(models, [*keys, "image_size"] + ["val_fraction"] * (split == "val"), keys)
    trained_on = models[0].checkpoint["dataset"]
    name = name or trained_on["name"]
    data_dir = data_folder(data_dir, name, trained_on)
    if not name:
        raise UserError(f"{models[0].name} does not know its data: name them (--dataset)")
    same = name == trained_on["name"]
    if name == "folder":
        same = same and data_dir.resolve() == Path(trained_on["data_dir"]).resolve()
    data = load_data(
        name,
        data_dir,
        image_size=trained_on["image_size"],
        val_fraction=trained_on["val_fraction"] if same or split == "val" else 0,
        classes=models[0].checkpoint["classes"],
    )
    if not len(getattr(data, split)):
        raise UserError(f"--split {split}: there are no such images; use the other split")
    if data.test.images.shape[-1] != trained_on["image_size"]:
        size = trained_on["image_size"]
        raise UserError(f"the checkpoints take images of {size}×{size}; {data.name} has 32×32")
    for model in models:
        known, present = set(model.checkpoint["classes"]), set(data.classes)
        if known != present:
            raise UserError(
                f"checkpoint {model.name} has {len(known)} classes, the data set {len(present)}; "
                f"only the checkpoint has {quoted(known - present)}; only the data set has "
                f"{quoted(present - known)}: choose its own data (--dataset, --data-dir)"
            )
        trained_on = model.checkpoint["dataset"]
        moved = name != "folder" or data_dir.resolve() != Path(trained_on["data_dir"]).resolve()
        changed = trained_on.get("content") not in (None, "", data.content)
        if split in data.drawn and changed and not moved:
            raise UserError(
                f"files were added, removed or changed since {model.name} was trained, so the "
                f"{split} split has changed: train again (a folder {split}/ would not change)"
            )
        if caveat := trained_before(model.name, trained_on, data, split):
            data.caveats.append(caveat)
            warn(f"{caveat}: train again on these, or use images that it cannot have seen")
        caveat = "these images chose the epoch, so the accuracy on them is a little too high"
        if split == "val" and same_images(trained_on, data) and caveat not in data.caveats:
            data.caveats.append(caveat)
    return data


def data_folder(typed: Path | None, name: str, trained_on: dict) -> Path:
    """Where the data set `name` is: as typed, else where it was in training, else in data/."""
    usual = trained_on["data_dir"] if name == trained_on["name"] else ""
    return Path(typed or usual or "data")


def refuse_different(models: list[TrainedModel], keys: list[str], flags: list[str]) -> None:
    """Raise UserError if the models' data sets differ in a key; `flags` are keys with a flag."""
    for key in keys:
        values = {model.name: model.checkpoint["dataset"][key] for model in models}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            advice = "give --dataset and --data-dir" if key in flags else "use one at a time"
            what = key.replace("name", "data set").replace("_", " ")
            raise UserError(f"the checkpoints differ in their {what} ({listed}): {advice}")
