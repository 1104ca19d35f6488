"""Save, load and publish checkpoints, dicts of plain types and tensors that run no code.

`last.pt` holds everything that a training needs to go on; `best.pt` the weights that scored best
on validation. To strip a checkpoint to its weights in half precision, small enough to publish:

    python checkpoint.py runs/cifar10-cnn/best.pt pretrained/cnn.pt
"""

import io
import math
import os
import pickle
import zipfile
from pathlib import Path

import torch
from torch import nn

from cli import Parser, UserError, command, run
from models import build_model

KEYS = {  # what a checkpoint holds
    "model_name": str, "model_config": dict, "model": dict, "ema": dict | None,
    "optimizer": dict | list | None, "scaler": dict | None, "epoch": int, "step": int,
    "best": dict, "history": list, "settings": dict, "classes": list, "mean": list, "std": list,
    "dataset": dict, "versions": dict,
}  # fmt: skip


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write the checkpoint so that `path` is at every moment the old file or the new one, whole.

    Raises:
        OSError: the file cannot be written; an old file is left as it was.
    """
    assert checkpoint.keys() == KEYS.keys(), checkpoint.keys() ^ KEYS.keys()
    buffer = io.BytesIO()  # serialised in memory: an error in it touches no file
    torch.save(checkpoint, buffer)
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU; nothing in the file is run (`weights_only=True`).

    Raises:
        UserError: no such file, or damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a checkpoint in it, such as best.pt")
        raise UserError(f"{path}: no such checkpoint; train_cnn.py and train_vit.py write them")
    contents = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(contents) as archive:  # torch.load checks no checksums
            damaged = archive.testzip()
        contents.seek(0)
        checkpoint = (
            None if damaged else torch.load(contents, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: not loaded: it holds Python objects, which could run code"
        ) from None
    except Exception as error:  # zipfile, zlib, pickle and torch raise many kinds
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: incomplete, or not a checkpoint ({line})") from None
    if damaged:
        raise UserError(f"{path}: damaged (checksum of {damaged}); use another copy")
    there = checkpoint if isinstance(checkpoint, dict) else {}
    for key, kind in KEYS.items():
        if not isinstance(there.get(key, ()), kind):  # () is of none of these types
            raise UserError(f"{path}: not a checkpoint of this project (lacks a good {key!r})")
    for key in ("mean", "std", "classes", "dataset", "settings"):
        if not _good(checkpoint[key], key):
            raise UserError(f"{path}: not a checkpoint of this project (lacks a good {key!r})")
    if not checkpoint["history"]:
        raise UserError(f"{path}: its training has no epoch yet")
    return checkpoint


def _good(values, key: str) -> bool:
    """Whether there is in them what others read: `epochs`, distinct names, 3 numbers to use."""
    needed = {"dataset": {"name", "data_dir", "image_size", "val_fraction", "sizes"}}
    needed["settings"] = {"epochs"}
    if key in needed:
        return needed[key] <= values.keys()
    if key == "classes":
        return all(isinstance(v, str) for v in values) and len(set(values)) == len(values)
    numbers = all(isinstance(v, float) and math.isfinite(v) for v in values)
    return len(values) == 3 and numbers and (key == "mean" or min(values) > 0)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict]:
    """Rebuild the model of a checkpoint, in eval mode: averaged weights where there are any.

    Raises:
        UserError: as `load_checkpoint`, or the weights do not fit the model that it describes.
    """
    checkpoint = load_checkpoint(path)
    try:
        if checkpoint["model_config"].get("classes") != len(checkpoint["classes"]):
            raise ValueError(f"it names {len(checkpoint['classes'])} classes")
        model = build_model(checkpoint["model_name"], checkpoint["model_config"])
        model.load_state_dict(checkpoint["ema"] or checkpoint["model"])  # half becomes float32
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        line = " ".join(str(error).split()).split("state_dict for ")[-1][:200]
        raise UserError(f"{path}: its weights do not fit its model ({line})") from None
    if not all(bool(value.isfinite().all()) for value in model.state_dict().values()):
        raise UserError(f"{path}: some of its weights are no finite numbers; use another copy")
    return model.to(device).eval(), checkpoint


def load_models(paths: list[str], device: torch.device) -> dict[str, tuple[nn.Module, dict]]:
    """`load_model` for each path, by a short name: the run's folder, or the file's own name."""
    files = [Path(path) for path in paths]
    names = [file.parent.name if file.stem in ("best", "last") else file.stem for file in files]
    if "" in names or len(set(names)) < len(names):
        names = paths
    return {name: load_model(path, device) for name, path in zip(names, paths, strict=True)}


def plain(value):
    """`value` in plain types only: paths become strings, tuples lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path | str) else value  # TorchVersion is a str


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint, such as best.pt")
    parser.add_argument("target", type=Path, metavar="TARGET", help="file to write")
    args = parser.parse_args(argv)
    checkpoint = load_checkpoint(args.source)
    if args.target.exists():
        raise UserError(f"{args.target} exists already: remove it first, or choose another name")
    if not args.target.parent.is_dir():
        raise UserError(f"{args.target}: there is no folder {args.target.parent}; make it first")
    weights = checkpoint["ema"] or checkpoint["model"]
    checkpoint |= {
        "model": {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        },
        "ema": None,
        "optimizer": None,
        "scaler": None,
    }
    save_checkpoint(args.target, checkpoint)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main)
