"""Messages of bad input: one printable line, whatever the value holds."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rwopt.cli import main
from rwopt.errors import UserError


def test_what_is_not_printable_is_shown_as_its_escape() -> None:
    error = UserError("a\nb\tc\x1b[1m\udc80\u2028: grün, 日本")
    assert str(error) == r"a\nb\tc\x1b[1m\udc80\u2028: grün, 日本"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("name", ["two\nlines.json", "half \udc80.json", "bell\a.json"])
def test_a_path_of_any_name_is_named_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["show", str(tmp_path / name)], ["export", str(tmp_path / name), "to=csv", f"out={tmp_path / 'x'}"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert ascii(name)[1:-1] in said
