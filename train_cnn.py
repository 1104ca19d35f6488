"""Train the CNN.

    python train_cnn.py --dataset digits                     one to two minutes, 99 to 100%
    python train_cnn.py                                      CIFAR-10: 75 minutes or less, 89%
    python train_cnn.py --dataset folder --data-dir photos   photos/train/<class>/*, photos/test

Test accuracies; times on two CPU cores without AVX-512. The 89% is for a JPEG copy of CIFAR-10
(see README). Prints a row per epoch. Writes checkpoints and curves to --out-dir; see the curves
with tensorboard --logdir runs
"""

import argparse

import torch
import torch.nn.functional as F

from cli import command, integer, run
from logs import Pictures
from optimizers import muon_and_adamw, parameter_groups
from prepare import prepare, print_next_steps
from settings import parse_flags, training_parser
from training import TrainingSettings, train

RECIPE = {  # --recipe fast
    "epochs": 24,
    "batch_size": 128,
    "lr": 5e-3,
    "muon_lr": 0.02,
    "warmup": 0.2,
    "weight_decay": 0.1,
    "label_smoothing": 0.1,
    "clip": 0.0,
    "ema_decay": 0.995,
    "flip": True,
    "shift": 4,
    "erase": 8,
    "trivial_augment": 0.0,
    "mix": 0.0,
    "whiten": True,
    "stem": 16,
    "widths": [48, 112],
    "depths": [1, 2],
}
CHANGES = {
    "best": {
        "epochs": 54,
        "ema_decay": 0.998,
        "erase": 0,
        "mix": 0.5,
        "widths": [64, 96],
        "depths": [2, 2],
    },
    "plain": {  # SGD, flips and shifts
        "lr": 0.1,
        "weight_decay": 5e-4,
        "label_smoothing": 0.0,
        "ema_decay": 0.0,
        "erase": 0,
        "whiten": False,
    },
    "digits": {
        "recipe": "plain",
        "epochs": 10,
        "batch_size": 32,
        "flip": False,
        "shift": 2,
        "erase": 0,
    },
}


def whiten(model, images: torch.Tensor) -> None:
    """Set the stem's filters to the strongest eigenvectors of the images' patches; freeze them.

    Each eigenvector of the patches' second moments is used with both signs. This follows the
    whitening layer of Jordan 2024 (arXiv 2404.00498, sec. 3.2); batch norm replaces its division by
    the roots of the eigenvalues. images (B, 3, H, W): one batch for training, normalised.
    """
    filters = model.stem.weight  # (stem, 3, 3, 3)
    patches = F.unfold(images.contiguous(), filters.shape[2:]).transpose(1, 2).flatten(0, 1)
    _, directions = torch.linalg.eigh((patches.T @ patches).cpu())  # columns, the strongest last
    strongest = directions.T.flip(0)[: (len(filters) + 1) // 2].view(-1, *filters.shape[1:])
    with torch.no_grad():
        filters.copy_(torch.cat([strongest, -strongest])[: len(filters)])
    filters.requires_grad_(False)


def make_optimizer(model, flags):
    """SGD with momentum if the recipe is plain; else Muon for filters, AdamW for the rest."""
    if flags.recipe == "plain":
        groups = parameter_groups(model.named_parameters(), flags.weight_decay)
        return torch.optim.SGD(groups, flags.lr, momentum=0.9, nesterov=True)
    return muon_and_adamw(model, model.stages, flags)


@command
def main(argv=None):
    parser = training_parser(__doc__, RECIPE, CHANGES)
    add = parser.add_argument_group("CNN").add_argument
    add(
        "--whiten",
        action=argparse.BooleanOptionalAction,
        help="first filters: eigenvectors of the images' patches, frozen (not with --init)",
    )
    most = 2 * 3 * 3 * 3  # both signs of all eigenvectors
    add("--stem", type=integer(1, most), metavar="N", help="channels of the first convolution")
    add("--widths", type=integer(1), nargs="+", metavar="N", help="channels of each stage")
    add("--depths", type=integer(0, 1000), nargs="+", metavar="N", help="blocks of each stage")
    flags, checkpoint = parse_flags(parser, argv, "cnn", CHANGES)

    model, train_batches, val_batches, metadata = prepare(flags, "cnn", checkpoint)
    if flags.whiten and flags.init is None:
        whiten(model, next(iter(train_batches))[0])
    optimizer = make_optimizer(model, flags)
    settings = TrainingSettings.from_flags(flags)
    pictures = None
    if flags.pictures == "on":
        pictures = Pictures(train_batches, val_batches, metadata, settings)
    last = train(
        model, optimizer, train_batches, val_batches, settings, metadata, checkpoint, pictures
    )
    print_next_steps(last, flags.out_dir)


if __name__ == "__main__":
    run(main)
