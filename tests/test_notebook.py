"""quickstart.ipynb, executed by a Jupyter kernel at the smallest settings."""

import json
import shutil

import pytest
from conftest import ROOT, TINY_CNN

manager = pytest.importorskip("jupyter_client.manager", reason="needs ipykernel")
pytest.importorskip("ipykernel")
NOTEBOOK = json.loads((ROOT / "quickstart.ipynb").read_text())


def test_it_is_short_and_stores_no_outputs():
    cells = NOTEBOOK["cells"]
    assert len(cells) <= 8 and max(len(cell["source"]) for cell in cells) <= 6
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_every_cell_runs(tmp_path):
    """In a copy, so that runs/ stays as it is. The server of TensorBoard is not started."""
    for path in (*ROOT.glob("*.py"), ROOT / "report.html"):
        shutil.copy(path, tmp_path)
    for folder in ("pretrained", "pictures"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    printed = []

    def collect(message):
        content = message["content"]
        printed.append(content.get("text") or content.get("data", {}).get("text/plain", ""))

    try:
        for cell in NOTEBOOK["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and not source.startswith("%pip"):
                small = f"digits --epochs 1 --limit-batches 2 {' '.join(TINY_CNN)}"
                source = source.replace("--dataset digits", f"--dataset {small}")
                source = source.replace("%tensorboard --logdir", "# %tensorboard --logdir")
                reply = client.execute_interactive(source, timeout=120, output_hook=collect)
                assert reply["content"]["status"] == "ok", "\n".join(
                    printed[-3:] + reply["content"].get("traceback", [])
                )
        reply = client.execute_interactive(
            "import signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)",
            timeout=60, output_hook=collect,
        )  # fmt: skip
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    text = "".join(printed)
    assert "best validation accuracy" in text and "chelsea.png" in text
    assert text.count("<IPython.core.display.Image object>") == 3
    assert text.rstrip().endswith("True")
