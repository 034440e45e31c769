"""The README's numbers are those of the result files."""

import shutil

from benchmarks import readme


def test_the_readme_shows_the_result_files():
    assert readme.current() == readme.render(), "python -m benchmarks --readme writes them"


def test_update_changes_what_is_between_the_marks_and_nothing_else(tmp_path):
    copy = tmp_path / "README.md"
    text = readme.README.read_text()
    start, end = text.index(readme.START) + len(readme.START), text.index(readme.END)
    copy.write_text(text[:start] + "old numbers" + text[end:])
    assert readme.current(copy) != readme.render()
    readme.update(copy)
    assert copy.read_text() == text[:start] + readme.render() + text[end:]


def test_results_that_change_are_noticed(tmp_path):
    results = tmp_path / "results"
    shutil.copytree(readme.RESULTS, results)
    for path in results.glob("*.json"):
        if path.name != "pending.json":
            path.unlink()
            break
    else:
        (results / "pending.json").write_text("[]")
    assert readme.render(results) != readme.render()
