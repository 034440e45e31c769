"""The trainers that the README shows, run as they stand: two processes print the losses of one."""

import re
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("fork_ranks.py")
README = Path(__file__).resolve().parents[2] / "README.md"
HEADING = "## Use it in your own trainer\n"
SUM_OF_GRADIENTS = "        dist.all_reduce(parameter.grad)"


def code_blocks():
    """The Python under the heading."""
    text = README.read_text(encoding="utf-8")
    section = text[text.index(HEADING) + len(HEADING) :]
    return re.findall(r"^```python\n(.*?)^```$", re.split(r"^## ", section, flags=re.M)[0], flags=re.M | re.S)


def test_two_processes_train_as_one_does(run_command, tmp_path):
    modules, transformers = code_blocks()
    assert "create_ring_attention(" in modules
    assert "use_in_transformers(" in transformers
    assert SUM_OF_GRADIENTS in modules
    codes = {
        "modules": modules,
        "transformers": transformers,
        "wrong": modules.replace(SUM_OF_GRADIENTS, "        pass"),
    }
    programs = {name: tmp_path / f"train_{name}.py" for name in codes}
    for name, code in codes.items():
        programs[name].write_text(code)
    finished = run_command([sys.executable, str(WORKER), *map(str, programs.values())])
    assert finished.returncode == 0, finished.stderr

    def losses(name, processes):
        printed = Path(f"{programs[name]}.{processes}.txt").read_text()
        return [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)$", printed, flags=re.M)]

    for name in ("modules", "transformers"):
        one = losses(name, 1)
        assert len(one) == 5
        assert losses(name, 2) == pytest.approx(one, rel=1e-5)
    assert losses("wrong", 2)[0] == pytest.approx(losses("modules", 1)[0], rel=1e-5)
    assert losses("wrong", 2)[1:] != pytest.approx(losses("modules", 1)[1:], rel=1e-5)
