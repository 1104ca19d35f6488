"""Train the Vision Transformer.

    python train_vit.py --dataset digits                     1 to 3 minutes, 99 to 100%
    python train_vit.py                                      CIFAR-10: 40 minutes, 82%
    python train_vit.py --dataset folder --data-dir photos   photos/train/<class>/*, photos/test

Test accuracies; times on two CPU cores, the 40 minutes in bfloat16. The 82% is for a JPEG copy of
CIFAR-10 (see README). Prints a row per epoch. Writes checkpoints and curves to --out-dir; see the
curves with tensorboard --logdir runs
"""

import torch

from batches import DistillationBatches
from cli import command, integer, path_type, positive, real, run
from logs import Pictures
from optimizers import muon_and_adamw, parameter_groups
from prepare import load_teacher, prepare, print_next_steps
from settings import parse_flags, training_parser
from training import TrainingSettings, train

RECIPE = {  # --recipe fast
    "epochs": 24,
    "batch_size": 128,
    "lr": 1e-3,
    "muon_lr": 0.01,
    "warmup": 0.1,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "clip": 1.0,
    "ema_decay": 0.998,
    "flip": True,
    "shift": 2,
    "erase": 0,
    "trivial_augment": 0.0,
    "mix": 0.0,
    "patch_size": 4,
    "dim": 192,
    "depth": 6,
    "heads": 6,
    "mlp_ratio": 2.0,
    "drop_path": 0.0,
    "patch_dropout": 0.5,
}
CHANGES = {
    "best": {"epochs": 48, "trivial_augment": 0.5, "mix": 0.25},
    "plain": {  # AdamW, flips and shifts. Epochs with all patches take twice as long.
        "epochs": 12,
        "label_smoothing": 0.0,
        "clip": 0.0,
        "ema_decay": 0.0,
        "patch_dropout": 0.0,
    },
    "digits": {"recipe": "plain", "epochs": 30, "batch_size": 32, "flip": False, "patch_size": 8},
}


def make_optimizer(model, flags):
    """AdamW in the plain recipe; else Muon for the blocks' matrices, AdamW for all the rest."""
    if flags.recipe == "plain":
        groups = parameter_groups(model.named_parameters(), flags.weight_decay)
        return torch.optim.AdamW(groups, flags.lr)
    return muon_and_adamw(model, model.blocks, flags)


@command
def main(argv=None):
    parser = training_parser(__doc__, RECIPE, CHANGES)
    add = parser.add_argument_group("ViT").add_argument
    add("--patch-size", type=integer(1), metavar="N", help="side of a patch in pixels")
    add("--dim", type=integer(1), metavar="N", help="width of a token")
    add("--depth", type=integer(1, 1000), metavar="N", help="number of blocks")
    add("--heads", type=integer(1), metavar="N", help="attention heads; must divide --dim")
    add("--mlp-ratio", type=positive, metavar="X", help="width of the MLPs, in widths of a token")
    add("--drop-path", type=real(0, 0.9), metavar="X", help="stochastic depth of the last block")
    add("--patch-dropout", type=real(0, 0.9), metavar="X", help="fraction of patches left out")
    add(
        "--teacher",
        type=path_type,
        metavar="FILE",
        help="checkpoint whose probabilities are learned too (distillation)",
    )
    flags, checkpoint = parse_flags(parser, argv, "vit", CHANGES)

    model, train_batches, val_batches, metadata = prepare(flags, "vit", checkpoint)
    if flags.teacher is not None:
        teacher = load_teacher(flags.teacher, flags.out_dir, metadata, model)
        train_batches = DistillationBatches(train_batches, teacher)
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
