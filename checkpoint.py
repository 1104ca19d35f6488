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

from cli import Parser, UserError, command, run, some
from data import Data, load_data
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
        value = there.get(key, ())  # () is of none of these types
        if not isinstance(value, kind) or not _complete(key, value):
            raise UserError(f"{path}: not a checkpoint of this project (lacks a good {key!r})")
    if not checkpoint["history"]:
        raise UserError(f"{path}: its training has no epoch yet")
    return checkpoint


def _complete(key: str, value) -> bool:
    """Whether there is in `value` what readers of a checkpoint's `key` rely on."""
    match key:
        case "mean" | "std":
            finite = all(isinstance(v, float) and math.isfinite(v) for v in value)
            return len(value) == 3 and finite and (key == "mean" or min(value) > 0)
        case "classes":
            return all(isinstance(v, str) for v in value) and len(set(value)) == len(value)
        case "dataset":
            return {"name", "data_dir", "image_size", "val_fraction", "sizes"} <= value.keys()
        case "settings":
            return "epochs" in value
    return True


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


def load_data_of(
    checkpoints: dict[str, dict], name: str | None, data_dir: Path | None, split: str = "test"
) -> Data:
    """The data set that named checkpoints were trained on, unless `name` or `data_dir` differ.

    The validation split is made if it is asked for, or if the data are the checkpoints' own.

    Raises:
        UserError: the checkpoints were trained on different data, or know other classes than it
            has.
    """
    cards = {label: checkpoint["dataset"] for label, checkpoint in checkpoints.items()}
    first = next(iter(cards.values()))
    unknown = [key for key, typed in (("name", name), ("data_dir", data_dir)) if typed is None]
    for key in [*unknown, "image_size"] + ["val_fraction"] * (split == "val"):
        if any(card[key] != first[key] for card in cards.values()):
            said = ", ".join(f"{label}: {card[key]}" for label, card in cards.items())
            cure = "give --dataset and --data-dir" if key in unknown else "take one at a time"
            what = key.replace("name", "data set").replace("_", " ")
            raise UserError(f"the checkpoints differ in their {what} ({said}): {cure}")
    root = Path(data_dir or first["data_dir"]).resolve()
    if data_dir is None and (name or first["name"]) == "folder" and not root.is_dir():
        raise UserError(
            f"{next(iter(cards))} was trained on the folder {first['data_dir']}, which is not "
            "here: say where its images are (--data-dir), or take others (--dataset)"
        )
    elsewhere = first["name"] == "folder" and root != Path(first["data_dir"]).resolve()
    own = name in (None, first["name"]) and not elsewhere
    data = load_data(
        name or first["name"],
        data_dir or first["data_dir"],
        image_size=first["image_size"],
        val_fraction=first["val_fraction"] if own or split == "val" else 0,
        test_alone=split == "test",
    )
    if data.test.images.shape[-1] != first["image_size"]:
        size = first["image_size"]
        raise UserError(f"the checkpoints take images of {size}×{size}; {data.name} has 32×32")
    # A test split taken from one folder, and a validation split, are others when files change.
    drawn = data.name == "folder" and (split == "val" or not any(root.glob("test/*/")))
    for label, checkpoint in checkpoints.items():
        if own and drawn and cards[label].get("files", data.files) != data.files:
            raise UserError(
                f"files have come, gone or changed since {label} was trained, and its {split} "
                "split, drawn from them, is another now: train again, or make train/ and test/"
            )
        known, there = set(checkpoint["classes"]), set(data.classes)
        if known != there:
            raise UserError(
                f"checkpoint {label} has {len(known)} classes, the data set {len(there)}; only the "
                f"checkpoint has {some(known - there)}; only the data set has "
                f"{some(there - known)}: choose its own data (--dataset, --data-dir)"
            )
    return data


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
