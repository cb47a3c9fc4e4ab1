"""``prefixstore doctor`` as a user runs it."""

from pathlib import Path

from tests.cli.conftest import Run


def test_the_verb_prints_a_table_or_a_document(run: Run, tmp_path: Path) -> None:
    """Both on a directory that is a store and on one that is not yet."""
    root = tmp_path / "root"
    assert run("init", str(root)).code == 0
    shown = run("doctor", str(root), "--size", "0")
    assert (shown.code, "hard links" in shown.out, "is fit for a store" in shown.out) == (
        0,
        True,
        True,
    )
    document = run("doctor", str(tmp_path), "--size", "0", "--json").json
    assert (document["is_root"], document["filesystem"] != "") == (False, True)
    assert run("doctor", str(tmp_path / "none")).code == 2
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["root"]
