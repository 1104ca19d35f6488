"""Every command in README, EXERCISES and benchmarks/README is understood by its script."""

import importlib
import inspect
import re
import shlex
import shutil
import sys
import types

import pytest
import torch
from conftest import ROOT

import evaluate
import explain
import faithfulness
import models
import training
from checkpoint import load_checkpoint, make_metadata

PAGES = ("README.md", "EXERCISES.md", "benchmarks/README.md", "pretrained/README.md")


def commands():
    """(page, script, argv) of each `python script.py ...` in a code block or in backticks."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        blocks = re.findall(r"```\n(.*?)```", text, re.S)
        lines = [line for block in blocks for line in block.splitlines()]
        inline = [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", text)]
        for line in lines + inline:
            if re.match(r"\s*python \S+\.py", line) and "..." not in line:
                _, script, *argv = shlex.split(line, comments=True)
                yield page, script, argv


class ParsedError(Exception):
    """Raised where a script would start to work."""


def stop(*args, **kwargs):
    raise ParsedError


def only_parse(parser, argv, *_):
    parser.parse_args(argv)
    raise ParsedError


@pytest.mark.parametrize(("page", "script", "argv"), list(commands()))
def test_command(page, script, argv, monkeypatch):
    name = script.removesuffix(".py")
    if script == "train_mixer.py":  # made by exercise 11
        name = "train_cnn"
    if script.startswith("benchmarks/"):
        name = name.removeprefix("benchmarks/")
        assert (ROOT / script).exists()
        source = (ROOT / script).read_text()
        for flag in [word for word in argv[: [*argv, "--"].index("--")] if word[:2] == "--"]:
            assert flag in source or flag in (ROOT / "benchmarks" / "common.py").read_text(), flag
        return
    module = importlib.import_module(name)
    if hasattr(module, "parse_flags"):
        monkeypatch.setattr(module, "parse_flags", only_parse)
    monkeypatch.setattr(evaluate, "load_models", stop)
    monkeypatch.setattr(explain, "load_models", stop)
    monkeypatch.setattr(faithfulness, "load_models", stop)
    if name == "checkpoint":
        monkeypatch.setattr(module, "load_model", stop)
    with pytest.raises(ParsedError):
        module.main(argv)


def test_there_are_commands():
    scripts = {script for _, script, _ in commands()}
    assert {
        "train_cnn.py",
        "train_vit.py",
        "evaluate.py",
        "explain.py",
        "faithfulness.py",
    } < scripts
    assert len(list(commands())) > 25


def test_readme_is_short():
    """At most 1,000 words, tables and code not counted."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    prose = [line for line in text.splitlines() if line[:1] not in ("|", "#", "!")]
    assert len(" ".join(prose).split()) <= 1000


def test_the_loop_has_the_lines_that_readme_says():
    lines = len(inspect.getsource(training.train).splitlines())
    assert lines <= 120 and f"`train` has {lines} lines" in (ROOT / "README.md").read_text()


def by_hand(number: int) -> dict:
    """Names for README's call of `train`: ten classes, `number` batches of four small images."""
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4) + i) for i in range(number)]
    names = {"names": list("abcdefghij"), "mean": [0.5] * 3, "std": [0.25] * 3}
    return names | {"train_batches": batches, "val_batches": batches}


def test_python_in_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "pretrained", "pretrained")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    loader, by_hand_block, load = blocks
    images = torch.randn(200, 3, 32, 32)
    found = {"torch": torch, "my_dataset": torch.utils.data.TensorDataset(images), "images": images}
    for block in (loader, load):
        exec(block, found)
    assert len(found["train_batches"]) == 2 and found["logits"].shape == (200, 10)
    exec(by_hand_block, by_hand(2))
    assert load_checkpoint("runs/mine/last.pt")["epoch"] == 5


class Small(torch.nn.Sequential):
    """A network of one layer."""

    def __init__(self, classes: int):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, classes))


@pytest.mark.parametrize("row", ["early stopping", "a checkpoint every 5 epochs"])
def test_edits_of_the_loop_in_readme_work(row, tmp_path, monkeypatch):
    (line,) = re.findall(rf"^\| {row} \| end of phase 9: `(.*?)`", (ROOT / "README.md").read_text(),
                         re.M)  # fmt: skip
    end = "        remove_files(replaced)\n"
    source = (ROOT / "training.py").read_text()
    assert source.count(end) == 1
    edited = types.ModuleType("edited_training")
    monkeypatch.setitem(sys.modules, "edited_training", edited)
    imports = "\nfrom checkpoint import save_checkpoint, without_training_state\n"
    exec(source.replace(end, f"{end}        {line}\n") + imports, vars(edited))
    accuracies = iter([0.3, 0.5, *[0.4] * 20])
    edited.validate = lambda *_: ({"val_loss": 1.0, "val_accuracy": next(accuracies)}, None)
    monkeypatch.setitem(models.MODELS, "small", Small)
    given, model = by_hand(1), Small(10)
    metadata = make_metadata(
        "small", {"classes": 10}, classes=given["names"], mean=given["mean"], std=given["std"]
    )
    settings = training.TrainingSettings(out_dir=tmp_path, epochs=11)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    last = edited.train(model, optimizer, given["train_batches"], None, settings, metadata)
    written = sorted(path.name for path in tmp_path.glob("epoch-*.pt"))
    if row == "early stopping":
        assert last["epoch"] == 7 and not written  # five epochs after the best
    else:
        assert last["epoch"] == 11 and written == ["epoch-10.pt", "epoch-5.pt"]
        assert load_checkpoint(tmp_path / "epoch-5.pt")["epoch"] == 5


def anchors_of(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in PAGES:
        folder, text = (ROOT / page).parent, (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", text):
            path, anchor = target
            assert not path or "//" in path or (folder / path).exists(), (page, path)
            if anchor and "//" not in path:
                assert anchor in anchors_of((folder / path if path else ROOT / page).read_text())
