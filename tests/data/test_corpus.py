import sysconfig
from pathlib import Path

import pytest

from hydra_dist.data.corpus import stdlib_files
from hydra_dist.errors import ConfigError


def test_the_standard_library_is_there_without_installed_packages():
    files = stdlib_files()
    names = [file.name for file in files]
    assert "stdlib/email/message.py" in names
    assert names == sorted(names, key=str.encode)
    assert len(set(names)) == len(names) > 500
    assert not any({"site-packages", "dist-packages", "__pycache__"} & set(name.split("/")) for name in names)
    assert 5e6 < sum(file.size for file in files) < 2e8
    assert all(file.path.is_relative_to(sysconfig.get_path("stdlib")) for file in files)


def test_what_is_left_out(tmp_path: Path):
    for name in ("a.py", "b.txt", "pkg/c.py", "site-packages/d.py", "pkg/__pycache__/e.py", "dist-packages/f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [file.name for file in stdlib_files(tmp_path)] == ["stdlib/a.py", "stdlib/pkg/c.py"]


def test_an_interpreter_without_source_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="no library source"):
        stdlib_files(tmp_path)
