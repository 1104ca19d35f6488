"""Every command in README, EXERCISES and benchmarks/README is understood by its script."""

import importlib
import inspect
import re
import shlex

import pytest
from conftest import ROOT

import evaluate
import explain
import faithfulness
import training

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


def test_links_lead_somewhere():
    for page in PAGES:
        folder, text = (ROOT / page).parent, (ROOT / page).read_text()
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                   for h in re.findall(r"^#+ (.*)$", text, re.M)}  # fmt: skip
        for target in re.findall(r"\]\(([^)#\s]*)(?:#([\w-]+))?\)", text):
            path, anchor = target
            assert not path or "//" in path or (folder / path).exists(), (page, path)
            assert path or anchor in anchors, (page, anchor)
