"""Save, load, check and publish checkpoints: dicts of plain types and tensors.

Loading one executes no code.

`last.pt` holds everything that is needed to resume a run. `best.pt` holds the weights that
scored best on validation. To publish a checkpoint (weights alone, in half precision):

    python checkpoint.py runs/cifar10-cnn/best.pt pretrained/cnn.pt
"""

import copy
import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path

import torch
import torchvision
from torch import nn

import distributed
from cli import Parser, UserError, command, composed, path_type, refuse_inside, run, warn, writing
from models import build_model, check_intermediates

METADATA = {  # known before training starts
    "model_name": str, "model_config": dict, "classes": list, "mean": list, "std": list,
    "dataset": dict, "settings": dict, "versions": dict,
}  # fmt: skip
KEYS = METADATA | {
    "model": dict, "ema": dict | None, "optimizer": dict | list | None, "scaler": dict | None,
    "epoch": int, "step": int, "best": dict, "history": list, "self_test": list,
}  # fmt: skip


# ---------------------------------------------------------------- metadata


def make_metadata(
    model_name: str, model_config: dict, *, classes, mean, std, dataset=None, settings=None
) -> dict:
    """The part of a checkpoint that is known before training starts, in plain types.

    Args:
        model_name: the network's name in `models.MODELS`.
        model_config: its constructor arguments, `classes` (how many) among them.
        classes: their names, in the order of the logits.
        mean: three numbers, for images in [0, 1].
        std: three numbers; images are normalised as (image - mean) / std.
        dataset: which images, and how they were split: see `prepare.py`.
        settings: all flags of the run, for the record and for resuming.
    """
    nowhere = {"name": "", "data_dir": "", "image_size": 32, "val_fraction": 0.0, "sizes": []}
    found = {
        "model_name": model_name, "model_config": model_config,
        "classes": classes, "mean": [*map(float, mean)], "std": [*map(float, std)],
        "dataset": nowhere | (dataset or {}), "settings": settings or {},
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }  # fmt: skip

    def plain(value):  # what JSON lacks: paths; NumPy's numbers; anything else
        value = value.as_posix() if isinstance(value, Path) else value
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return json.loads(json.dumps(found, default=plain))


def check_metadata(metadata: dict, network: nn.Module) -> None:
    """Check before training that its checkpoints will load, as the network that is trained.

    Raises UserError: a key is missing or wrong, or the metadata do not rebuild `network`, or its
    intermediates are not as `models.py` describes them.
    """
    if wrong := wrong_key(metadata, METADATA):
        raise UserError(f"metadata[{wrong!r}] is missing or wrong: use checkpoint.make_metadata")
    try:
        rebuilt = rebuild(metadata, network.state_dict())
        if type(rebuilt).__module__ == "__main__":
            raise ValueError("its class is in the script, where evaluate.py does not find it")
        trained = self_test(copy.deepcopy(network).cpu().eval(), metadata)
        if len(trained) != len(metadata["classes"]):
            raise ValueError(f"{len(trained)} outputs, {len(metadata['classes'])} classes")
        if reason := difference(trained, self_test(rebuilt, metadata)):
            raise ValueError(f"the rebuilt network computes {reason}")
        check_intermediates(rebuilt, formula_image(metadata["dataset"]["image_size"]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"model {metadata['model_name']!r} cannot be rebuilt from its checkpoint "
            f"({_one_line(error)}): change models.py or the metadata"
        ) from None


def wrong_key(entries: dict, kinds: dict) -> str:
    """The first of the keys `kinds` that is missing from `entries` or has a wrong value, or ""."""
    for key, kind in kinds.items():
        value = entries.get(key, ())  # () is of none of these types
        if not isinstance(value, kind) or not _is_valid(key, value):
            return key
    return ""


def _is_valid(key: str, value) -> bool:
    """Whether `value` is valid for `key`, as far as other code relies on it."""
    match key:
        case "mean" | "std":
            finite = all(isinstance(v, float) and math.isfinite(v) for v in value)
            return len(value) == 3 and finite and (key == "mean" or min(value) > 0)
        case "classes":
            return all(isinstance(v, str) for v in value) and len(set(value)) == len(value)
        case "dataset":
            return {"name", "data_dir", "image_size", "val_fraction", "sizes"} <= value.keys()
        case "self_test":
            return bool(value) and all(isinstance(v, float) for v in value)
    return True


def rebuild(metadata: dict, weights: dict) -> nn.Module:
    """The network that `metadata` describe, with these weights, on the CPU, in eval mode.

    No random state is changed. Weights in half precision become float32.

    Raises:
        ValueError, TypeError, RuntimeError: no such network, or other weights.
    """
    number = len(metadata["classes"])
    if metadata["model_config"].get("classes") != number:
        raise ValueError(f"it names {number} classes; its constructor argument `classes` differs")
    with torch.random.fork_rng(devices=[]):
        network = build_model(metadata["model_name"], metadata["model_config"])
    network.load_state_dict(weights)
    return network.eval()


# ---------------------------------------------------------------- self-test


def formula_image(size: int) -> torch.Tensor:
    """A synthetic image (1, 3, size, size) of waves, the same on every machine."""
    c, y, x = torch.meshgrid(*map(torch.arange, (3, size, size)), indexing="ij")
    return torch.sin(0.9 * y + 1.7 * c).add(torch.cos(0.4 * x - 0.8 * c))[None]


@torch.no_grad()
def self_test(network: nn.Module, metadata: dict) -> list[float]:
    """The logits of `formula_image`. `network`: float32, on the CPU, in eval mode."""
    return network(formula_image(metadata["dataset"]["image_size"]))[0].tolist()


def difference(computed: list[float], saved: list[float]) -> str:
    """How two lists of logits differ by more than 1% of the largest saved one; "" if they do not.

    Raises ValueError: they are of different lengths.
    """
    if len(computed) != len(saved):
        raise ValueError(f"{len(saved)} logits in its self-test, {len(computed)} of its network")
    apart = (torch.tensor(computed) - torch.tensor(saved)).abs().max()
    largest = torch.tensor(saved).abs().max()
    if apart <= 0.01 * largest:
        return ""
    return f"other logits (they differ by up to {apart:.2g}; the largest is {largest:.2g})"


def changed_network(network: nn.Module, checkpoint: dict) -> str:
    """What to say if `network` is no longer the one that was saved; "" if it is."""
    reason = difference(self_test(network, checkpoint), checkpoint["self_test"])
    return reason and (
        f"its network computes {reason} than when it was saved: models.py has changed since. Use "
        "the version that it was trained with, or train again"
    )


# ---------------------------------------------------------------- save


def save_checkpoint(path: str | Path, checkpoint: dict, *, remove: Path | None = None) -> None:
    """Write the checkpoint. At every moment `path` is the whole old file or the whole new one.

    `remove` is deleted just before. UserError: no file can be written; the old one is left.
    """
    assert checkpoint.keys() == KEYS.keys(), checkpoint.keys() ^ KEYS.keys()
    buffer = io.BytesIO()  # serialised first, so that an error leaves no partial file
    torch.save(checkpoint, buffer)
    path = Path(path)
    partial = path.with_name(f".{os.getpid()}.tmp")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            if remove:
                remove.unlink(missing_ok=True)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def without_training_state(checkpoint: dict, dtype: torch.dtype | None = None) -> dict:
    """The checkpoint with weights alone, averaged ones if there are any, and their self-test.

    `dtype`: convert floating-point weights to it.
    """
    weights = checkpoint["ema"] or checkpoint["model"]
    if dtype is not None:
        weights = {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()}
    changes = {"model": weights, "ema": None, "optimizer": None, "scaler": None}
    return checkpoint | changes | {"self_test": self_test(rebuild(checkpoint, weights), checkpoint)}


def save_epoch(out_dir: str | Path, checkpoint: dict) -> None:
    """Write last.pt, and best.pt with the weights of the best epoch and the whole history.

    The self-test is added to `checkpoint`.
    """
    best = without_training_state(checkpoint)
    checkpoint["self_test"] = best["self_test"]
    if distributed.rank():  # the first process writes
        return
    out_dir = Path(out_dir)
    if checkpoint["best"]["epoch"] < checkpoint["epoch"]:
        best = load_checkpoint(out_dir / "best.pt") | {"history": checkpoint["history"]}
    last = out_dir / "last.pt"
    # best.pt first: if the second file is not written, resuming repeats the epoch. The last.pt of a
    # run that is replaced goes: it must not be resumed with the new best.pt.
    save_checkpoint(out_dir / "best.pt", best, remove=last if checkpoint["epoch"] == 1 else None)
    save_checkpoint(last, checkpoint)
    for partial in out_dir.glob(".*.tmp"):  # of a process that was killed
        partial.unlink(missing_ok=True)


def check_finite(network: nn.Module, row: dict, settings) -> None:
    """Refuse to save an epoch whose loss or weights are no longer finite.

    Raises UserError: they are not; the checkpoints of the epoch before are kept.
    """
    losses = [row["train_loss"], row["val_loss"] or 0.0]
    weights = network.state_dict().values()  # as `load_model` checks them
    if all(map(math.isfinite, losses)) and all(bool(x.isfinite().all()) for x in weights):
        return
    epoch = row["epoch"]
    kept = f"; {settings.out_dir} keeps epoch {epoch - 1}, the last good one" if epoch > 1 else ""
    raise UserError(
        f"the loss or the weights are no longer finite in epoch {epoch} (by step {row['step']}): "
        "start again with a lower --lr, --muon-lr or --weight-decay" + kept
    )


# ---------------------------------------------------------------- load


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. Nothing in the file is run (`weights_only=True`).

    Raises UserError: no such file, damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give a checkpoint in it, such as best.pt")
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; train_cnn.py and train_vit.py write them")
    checkpoint = _read(path)
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    if wrong := wrong_key(entries, KEYS):
        raise UserError(f"{path}: not a checkpoint of this project ({wrong!r} missing or wrong)")
    checkpoint["classes"] = list(map(composed, checkpoint["classes"]))
    if not checkpoint["history"]:
        raise UserError(f"{path}: its training has not finished an epoch")
    return checkpoint


def _read(path: Path):
    contents = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(contents) as archive:  # torch.load checks no checksums
            damaged = archive.testzip()
        contents.seek(0)
        if not damaged:
            return torch.load(contents, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not loaded: it holds Python objects, which could run code; use another file"
        ) from None
    except Exception as error:  # fourteen kinds were raised for 85,000 damaged files
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: incomplete, or not a checkpoint ({line})") from None
    raise UserError(f"{path}: damaged (checksum of {damaged}); use another copy")


def load_model(
    path: str | Path, device: torch.device | str = "cpu", *, strict: bool = False
) -> tuple[nn.Module, dict]:
    """Rebuild the network of a checkpoint, in eval mode: averaged weights if there are any.

    Warns on stderr if the network computes other logits than when it was saved.

    `strict`: raise an error in place of the warning.

    Raises UserError: as `load_checkpoint`, or the weights do not fit the network.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = rebuild(checkpoint, checkpoint["ema"] or checkpoint["model"])
        if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
            raise UserError(f"{path}: some of its weights are not finite; use another copy")
        changed = changed_network(model, checkpoint)
    except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        line = _one_line(error).split("state_dict for ")[-1]
        raise UserError(f"{path}: its weights do not fit its model ({line})") from None
    if changed and strict:
        raise UserError(f"{path}: {changed}")
    if changed:
        warn(f"{path}: {changed}")
    return model.to(device), checkpoint


def training_state(network, optimizer, scaler, ema) -> dict:
    """The state dicts of network, averaged weights, optimizer and gradient scaler."""
    return {
        "model": network.state_dict(),
        "ema": None if ema is None else ema.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }


def restore(checkpoint: dict, network, optimizer, scaler, ema, out_dir) -> tuple[int, dict, list]:
    """Load the training state of out_dir/last.pt; return its step, best epoch and history.

    Raises UserError: it does not fit, as after a change of models.py or of the optimizer.
    """
    path, groups = Path(out_dir) / "last.pt", optimizer.param_groups
    try:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for own, saved in zip(groups, optimizer.param_groups, strict=True):
            refuse_other_optimizer(own, saved)
        if checkpoint["scaler"]:  # empty where float16 was not used
            scaler.load_state_dict(checkpoint["scaler"])
        if ema is not None:
            ema.load_state_dict(checkpoint["ema"])
        changed = changed_network(
            rebuild(checkpoint, checkpoint["ema"] or checkpoint["model"]), checkpoint
        )
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--resume: {path} does not fit models.py or the optimizer ({_one_line(error)}): take "
            "the change back, or start again (--overwrite)"
        ) from None
    if changed:
        raise UserError(f"--resume: {path}: {changed} (--overwrite)")
    best = Path(out_dir) / "best.pt"  # later than last.pt, if a crash came between the two files
    best = load_checkpoint(best)["best"] if best.exists() else checkpoint["best"]
    return checkpoint["step"], best, checkpoint["history"]


def refuse_other_optimizer(own: dict, saved: dict) -> None:
    """Raise ValueError if a group of the optimizer and of the checkpoint have other arguments."""
    if differ := sorted(own.keys() ^ saved.keys()):
        raise ValueError(f"another optimizer, or an older version: {', '.join(differ)}")
    for key in own.keys() - {"params", "lr", "fused", "foreach"}:
        if own[key] != saved[key]:
            raise ValueError(f"the optimizer's {key} was {saved[key]} and is {own[key]}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------- command line: publish


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=path_type, metavar="SOURCE", help="checkpoint, such as best.pt")
    add("target", type=path_type, metavar="TARGET", help="file to write")
    args = parser.parse_args(argv)
    _, checkpoint = load_model(args.source, strict=True)
    refuse_inside(args.target.parent)
    if args.target.exists():
        raise UserError(f"{args.target} exists already: remove it first, or choose another name")
    save_checkpoint(args.target, without_training_state(checkpoint, torch.float16))
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
