import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the scripts lie flat on top

TINY_CNN = ["--stem", "4", "--widths", "8", "8", "--depths", "0", "0"]
TINY_VIT = ["--dim", "16", "--depth", "2", "--heads", "2", "--patch-size", "8"]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def fails(capsys):
    """Call `main(argv)`; it must exit 2 with one `error:` line, which is returned."""

    def call(main, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in argv])
        err = capsys.readouterr().err.strip()
        assert end.value.code == 2
        assert err.startswith("error: "), err
        assert "\n" not in err, err
        return err

    return call


@pytest.fixture
def numbers_only(monkeypatch):
    """Evaluations without figures, which take seconds."""
    import evaluate

    monkeypatch.setattr(evaluate, "draw", lambda *_: {})


@pytest.fixture
def interrupted(monkeypatch):
    """Call `main(argv)`; Ctrl-C comes before its second epoch is saved."""
    import training

    def call(main, *argv):
        real = training.log_epoch

        def stop_in_the_second_epoch(logs, row, points):
            if row["epoch"] == 2:
                raise KeyboardInterrupt
            real(logs, row, points)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(training, "log_epoch", stop_in_the_second_epoch)
            main([str(a) for a in argv])
        assert end.value.code == 130

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A small CNN and a small ViT, trained for a moment on digits: {"cnn": best.pt, "vit": ...}."""
    import train_cnn
    import train_vit

    folder = tmp_path_factory.mktemp("trained")
    common = ["--dataset", "digits", "--recipe", "fast", "--amp", "off"]
    common += ["--epochs", "2", "--device", "cpu", "--pictures", "off"]
    train_cnn.main([*common, *TINY_CNN, "--out-dir", str(folder / "digits-cnn")])
    train_vit.main([*common, *TINY_VIT, "--out-dir", str(folder / "digits-vit")])
    return {name: folder / f"digits-{name}" / "best.pt" for name in ("cnn", "vit")}


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of images: two classes of noise, dark and bright, 12 train and 4 test each."""
    import numpy as np
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name, low in (("bright", 128), ("dark", 0)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i:02}.png")
    (root / "train" / "dark" / "Thumbs.db").write_bytes(b"?")
    return root
