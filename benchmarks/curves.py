"""Write the TensorBoard curves of a checkpoint, from the history that it has.

    python benchmarks/curves.py pretrained/cnn.pt pretrained/curves/cnn

Writes epoch/loss and epoch/accuracy into DIR/train and DIR/val, without pictures, paths or the name
of a machine. TensorBoard's horizontal axis "relative" shows training time.
"""

from pathlib import Path

import common  # noqa: F401, finds the scripts
from torch.utils.tensorboard import SummaryWriter

from checkpoint import load_checkpoint
from cli import Parser, UserError, command, path_type, run


def write_curves(history: list[dict], folder: Path) -> None:
    """An event file each for training and validation."""
    for part in ("train", "val") if history[0]["val_loss"] is not None else ("train",):
        writer = SummaryWriter(folder / part)
        for row in history:
            for tag in ("loss", "accuracy"):
                value = row[f"{part}_{tag}"]
                writer.add_scalar(f"epoch/{tag}", value, row["step"], walltime=row["seconds"])
        writer.close()
        (file,) = (folder / part).glob("events.out.tfevents.*")
        file.rename(folder / part / "events.out.tfevents.curves")  # the machine's name was in it


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=path_type, metavar="CHECKPOINT", help="whose history")
    parser.add_argument("folder", type=path_type, metavar="DIR", help="for train/ and val/")
    args = parser.parse_args(argv)
    if args.folder.exists():
        raise UserError(f"{args.folder} exists already: remove it first, or choose another name")
    write_curves(load_checkpoint(args.checkpoint)["history"], args.folder)


if __name__ == "__main__":
    run(main)
