"""Train the Vision Transformer.

    python train_vit.py --dataset digits                     100 seconds, 99% test accuracy
    python train_vit.py                                      CIFAR-10: 75 minutes, 79%
    python train_vit.py --dataset folder --data-dir photos   photos/train/<class>/*, photos/test

Times on two CPU cores; the 79% on a JPEG copy of CIFAR-10 (see README). Prints a row per epoch;
writes checkpoints and TensorBoard curves to --out-dir: see them by tensorboard --logdir runs
"""

from cli import command, number, path_type, run
from recipe import finish, parse_settings, prepare, recipe_parser
from training import muon_and_adamw, train

RECIPE = {  # --recipe fast; BEST is what --recipe best changes, DIGITS what --dataset digits
    "epochs": 12,
    "batch_size": 128,
    "lr": 1e-3,
    "muon_lr": 0.02,
    "warmup": 0.1,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "clip": 1.0,
    "ema_decay": 0.998,
    "flip": True,
    "shift": 2,
    "erase": 0,
    "auto_augment": False,
    "mix": 0.0,
    "patch_size": 4,
    "dim": 192,
    "depth": 6,
    "heads": 6,
    "mlp_ratio": 2.0,
    "drop_path": 0.0,
}
BEST = {"epochs": 100, "auto_augment": True, "mix": 0.5, "drop_path": 0.1}
DIGITS = {"epochs": 30, "batch_size": 64, "flip": False, "patch_size": 8, "ema_decay": 0.98}
MODEL_SETTINGS = "patch_size dim depth heads mlp_ratio drop_path".split()  # passed on to the model


def make_optimizer(model, settings):
    """Muon for the blocks' matrices, AdamW for all the rest."""
    return muon_and_adamw(model, model.blocks, settings)


@command
def main(argv=None):
    parser = recipe_parser(__doc__, BEST, DIGITS)
    group = parser.add_argument_group("ViT")
    group.add_argument("--patch-size", type=number(int, 1), metavar="N",
                       help="side of a patch in pixels; must divide the image's side")  # fmt: skip
    group.add_argument("--dim", type=number(int, 1), metavar="N", help="embedding dimension")
    group.add_argument("--depth", type=number(int, 1, 1000), metavar="N", help="number of blocks")
    group.add_argument("--heads", type=number(int, 1), metavar="N",
                       help="attention heads of a block; must divide --dim")  # fmt: skip
    group.add_argument("--mlp-ratio", type=number(float, 0, above=True), metavar="X",
                       help="hidden width of the MLPs, as a multiple of --dim")  # fmt: skip
    group.add_argument("--drop-path", type=number(float, 0, 0.9), metavar="X",
                       help="stochastic depth: probability in the last block")  # fmt: skip
    group.add_argument("--teacher", type=path_type, metavar="FILE",
                       help="distillation: checkpoint to learn from, such as a CNN's")  # fmt: skip
    parser.set_defaults(**RECIPE)
    settings, resumed = parse_settings(parser, argv, "vit", BEST, DIGITS)

    model, train_batches, val_batches, card = prepare(settings, "vit", MODEL_SETTINGS, resumed)
    optimizer = make_optimizer(model, settings)
    state = train(
        model, optimizer, train_batches, val_batches, settings=settings, card=card, resumed=resumed
    )
    finish(state, settings)


if __name__ == "__main__":
    run(main)
