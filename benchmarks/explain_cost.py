"""Cost of the attribution methods, as a ratio to a forward pass; beside other packages.

    python benchmarks/explain_cost.py --rounds 9
    python benchmarks/explain_cost.py --calls 1000        memory after so many calls

One process, one thread, the weights in pretrained/ (or --cnn and --vit), random images. Every
method runs once a round, in turn with a forward pass of the same images, without gradients. Prints
the median over rounds of the ratios of CPU times. Our methods take 64 images in the batches of
`explain.py`. captum and pytorch-grad-cam are compared if they are installed
(tests/requirements.txt). With --calls: anonymous memory after a tenth of the calls, and after all.
"""

import copy
import statistics
import time
from pathlib import Path

import torch
from common import in_turn, ratios

from attribution import METHODS, attribute, methods_for
from batches import batch_size_without_training
from cli import Parser, command, integer, path_type, run
from evaluate import table
from prepare import load_models

ROOT = Path(__file__).resolve().parents[1]


def measurements(model, name: str, images: torch.Tensor) -> dict:
    """What is measured for one network, by name: functions without arguments."""
    targets = torch.arange(len(images)) % 10
    parts = batch_size_without_training(32, explain=True)

    def by(method):
        for x, t in zip(images.split(parts), targets.split(parts), strict=True):
            attribute(model, x, t, method)

    found = {"forward": lambda: torch.inference_mode()(model)(images)}
    for method in METHODS:
        if method not in methods_for(model, 32)[1] and method != "occlusion":
            found[method] = lambda method=method: by(method)
    if name == "cnn":
        found |= others(model, images, targets)
    return found


def others(model, images: torch.Tensor, targets: torch.Tensor) -> dict:
    """Grad-CAM of the packages that are installed. They need parameters that are not frozen."""
    found, model = {}, copy.deepcopy(model).requires_grad_()
    try:
        from captum.attr import LayerGradCam

        captum = LayerGradCam(model, model.stages[-1])
        found["captum"] = lambda: captum.attribute(images, target=targets)
    except ImportError:
        print("captum is not installed")
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        classes, cam = (
            [ClassifierOutputTarget(t.item()) for t in targets],
            GradCAM(model, [model.stages[-1]]),
        )
        found["pytorch-grad-cam"] = lambda: cam(images, classes)
    except ImportError:
        print("pytorch-grad-cam is not installed")
    return found


def cpu_seconds(function) -> float:
    """CPU time of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def anonymous_megabytes() -> float:
    """Memory of this process that is not a file's (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def measure_memory(models: list, calls: int) -> None:
    """Print the memory after a tenth of the calls, and after all of them."""
    images, targets = torch.randn(2, 3, 32, 32), torch.arange(2)
    for model in models:
        usable = [m for m in METHODS if m not in methods_for(model.network, 32)[1]]
        for call in range(1, calls + 1):
            attribute(model.network, images, targets, usable[call % len(usable)])
            if call in (calls // 10, calls):
                print(f"{model.name}: {anonymous_megabytes():.0f} MiB after {call} calls")


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    for name in ("cnn", "vit"):
        add(f"--{name}", type=path_type, default=ROOT / "pretrained" / f"{name}.pt", metavar="FILE",
            help="checkpoint")  # fmt: skip
    add("--rounds", type=integer(1), default=9, metavar="N", help="rounds that are counted")
    add("--calls", type=integer(10), metavar="N", help="measure memory instead")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    models = load_models([str(args.cnn), str(args.vit)], torch.device("cpu"))
    if args.calls:
        return measure_memory(models, args.calls)
    rows = [["", "batch", "method", "ratio to a forward pass", "range"]]
    for name, model in zip(("cnn", "vit"), models, strict=True):
        for batch in (64, 1):
            functions = measurements(model.network, name, torch.randn(batch, 3, 32, 32))
            timed = {key: lambda f=f: cpu_seconds(f) for key, f in functions.items()}
            seconds = in_turn(timed, args.rounds)
            for method, times in seconds.items():
                found = ratios(times, seconds["forward"])
                middle = f"{statistics.median(found):.2f}"
                row = [name, str(batch), method, middle, f"{min(found):.2f} to {max(found):.2f}"]
                rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    run(main)
