"""Train the CNN.

    python train_cnn.py --dataset digits                     40 seconds, 98% test accuracy
    python train_cnn.py                                      CIFAR-10: 30 minutes, 89%
    python train_cnn.py --dataset folder --data-dir photos   photos/train/<class>/*, photos/test

Times on two CPU cores; the 89% on a JPEG copy of CIFAR-10 (see README). Prints a row per epoch;
writes checkpoints and TensorBoard curves to --out-dir: see them by tensorboard --logdir runs
"""

import torch
import torch.nn.functional as F

from cli import command, number, run
from recipe import finish, parse_settings, prepare, recipe_parser
from training import muon_and_adamw, train

RECIPE = {  # --recipe fast; BEST is what --recipe best changes, DIGITS what --dataset digits
    "epochs": 16,
    "batch_size": 128,
    "lr": 5e-3,
    "muon_lr": 0.02,
    "warmup": 0.2,
    "weight_decay": 0.1,
    "label_smoothing": 0.1,
    "clip": 0.0,
    "ema_decay": 0.995,
    "flip": True,
    "shift": 2,
    "erase": 8,
    "auto_augment": False,
    "mix": 0.0,
    "stem": 16,
    "widths": [48, 112],
    "depths": [1, 2],
}
BEST = {"epochs": 100, "auto_augment": True, "erase": 0}
DIGITS = {"epochs": 10, "batch_size": 32, "flip": False, "erase": 0, "ema_decay": 0.98}
MODEL_SETTINGS = "stem widths depths".split()  # passed on to the model


def whiten(model, images: torch.Tensor) -> None:
    """Make the stem's filters the principal directions of a batch's patches, and freeze them.

    The strongest ones, each with both signs; the norm that follows gives all the same variance
    (the whitening layer of Jordan 2024, arXiv 2404.00498, sec. 3.2). images (B, 3, H, W).
    """
    filters = model.stem.weight  # (stem, 3, 3, 3)
    patches = F.unfold(images.contiguous(), filters.shape[2:]).transpose(1, 2).flatten(0, 1)
    _, directions = torch.linalg.eigh((patches.T @ patches).cpu())  # columns, the strongest last
    strongest = directions.T.flip(0)[: (len(filters) + 1) // 2].view(-1, *filters.shape[1:])
    with torch.no_grad():
        filters.copy_(torch.cat([strongest, -strongest])[: len(filters)])
    filters.requires_grad_(False)


def make_optimizer(model, settings):
    """Muon for the stages' filters, AdamW for all the rest."""
    return muon_and_adamw(model, model.stages, settings)


@command
def main(argv=None):
    parser = recipe_parser(__doc__, BEST, DIGITS)
    group = parser.add_argument_group("CNN")
    group.add_argument("--stem", type=number(int, 1, 54), metavar="N",
                       help="channels of the first convolution")  # fmt: skip
    group.add_argument("--widths", type=number(int, 1), nargs="+", metavar="N",
                       help="channels of each stage; a stage halves the image's side")  # fmt: skip
    group.add_argument("--depths", type=number(int, 0, 1000), nargs="+", metavar="N",
                       help="residual blocks of each stage; as many as --widths")  # fmt: skip
    parser.set_defaults(**RECIPE)
    settings, resumed = parse_settings(parser, argv, "cnn", BEST, DIGITS)

    model, train_batches, val_batches, card = prepare(settings, "cnn", MODEL_SETTINGS, resumed)
    whiten(model, next(iter(train_batches))[0])
    optimizer = make_optimizer(model, settings)
    state = train(
        model, optimizer, train_batches, val_batches, settings=settings, card=card, resumed=resumed
    )
    finish(state, settings)


if __name__ == "__main__":
    run(main)
