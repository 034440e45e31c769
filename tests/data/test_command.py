import io
import subprocess
import sys

from rich.console import Console

from hydra_dist.data import prepare_command


def shown(*args, **settings):
    console = Console(file=io.StringIO(), width=400)
    prepare_command(*args, **settings, console=console)
    return console.file.getvalue()


def test_the_display_says_what_was_done_and_what_was_left_out(tree, tmp_path):
    root = tree(30)
    (root / "bad.txt").write_bytes(b"\xff")
    (root / "empty.txt").write_bytes(b"")
    (root / "image.png").write_bytes(b"\0")
    settings = {"skip_undecodable": True, "eval_fraction": 0.2}
    text = shown([root], tmp_path / "[bold]", "train:100000", **settings)
    assert f"prepared {tmp_path / '[bold]'}" in text  # brackets in a path are no markup
    assert "train: " in text
    assert "eval: " in text
    assert "instead of 100000" in text
    assert "left out: 1 files that are not text" in text
    assert "left out: 1 empty documents" in text
    assert "skipped as undecodable: 1" in text
    assert "corpus/bad.txt: not UTF-8 at byte 0" in text
    assert "nothing to do" in shown([root], tmp_path / "[bold]", "train:100000", **settings)


def test_preparing_needs_no_torch():
    code = "import sys, hydra_dist.data as data; assert 'torch' not in sys.modules; data.Sampler; import torch"
    subprocess.run([sys.executable, "-c", code], check=True)
