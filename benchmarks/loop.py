"""What the training loop costs over the bare arithmetic.

    python benchmarks/loop.py --model cnn        the recipe's network and batch size, on noise

Times in one process, in turn, several rounds of the same number of steps: the loop as it is
(batches drawn, augmented and normalised, clipping, averaged weights, sums, bar and log) against
forward, backward and step on one batch that is already in place. Prints the median ratio and
appends it to benchmarks/results/loop.jsonl.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import train_cnn  # noqa: E402
import train_vit  # noqa: E402
import training  # noqa: E402
from batches import Batches  # noqa: E402
from data import Split  # noqa: E402
from models import build_model  # noqa: E402

CARD = "model_name model_config settings classes mean std dataset versions".split()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("cnn", "vit"), default="cnn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    script = train_cnn if args.model == "cnn" else train_vit
    recipe = script.RECIPE | {"epochs": 1, "seed": 0, "amp": "auto", "limit_batches": None}
    config = {key: recipe[key] for key in script.MODEL_SETTINGS}
    amp_dtype = training.choose_amp("auto", device)
    size = recipe["batch_size"]

    def new_model():
        torch.manual_seed(0)
        model = build_model(args.model, config).to(device, memory_format=torch.channels_last)
        return model, script.make_optimizer(model, argparse.Namespace(**recipe))

    images = torch.randint(256, (size * args.steps, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.arange(len(images)) % 10, torch.arange(len(images)))
    batches = Batches(
        split, size, mean=(0.5,) * 3, std=(0.25,) * 3, device=device, train=True,
        flip=recipe["flip"], shift=recipe["shift"], erase=recipe["erase"],
    )  # fmt: skip

    def loop_seconds() -> float:
        model, optimizer = new_model()
        card = dict.fromkeys(CARD)
        with tempfile.TemporaryDirectory() as folder:
            settings = argparse.Namespace(**recipe, out_dir=folder)
            state = training.train(model, optimizer, batches, None, settings=settings, card=card)
        return state["history"][0]["seconds"]

    def bare_seconds() -> float:
        model, optimizer = new_model()
        model.train()
        x, y = next(iter(batches))
        started = time.perf_counter()
        for _ in range(args.steps):
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    loop_seconds(), bare_seconds()  # warm up
    pairs = [(loop_seconds(), bare_seconds()) for _ in range(args.rounds)]
    ratios = [loop / bare for loop, bare in pairs]
    result = {
        "model": args.model,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratios": [round(r, 3) for r in ratios],
        "images_per_second_median": round(
            statistics.median(size * args.steps / loop for loop, _ in pairs)
        ),
        "batch_size": size,
        "steps": args.steps,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": str(datetime.date.today()),
    }
    print(json.dumps(result))
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with (results / "loop.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
