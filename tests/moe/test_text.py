"""Text that another trace must be told from, or must not be learned from."""

from __future__ import annotations

from pathlib import Path

import pytest

from specgate.errors import TextError
from specgate.moe.text import SEPARATOR, bundled_documents, load_documents


def test_a_prefix_tells_documents_from_those_of_the_same_name_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "code_go.txt").write_text(SEPARATOR.join(["one line", "another"]))
    plain, named = load_documents(tmp_path), load_documents(tmp_path, split="train", prefix="mine_")
    assert [d.name for d in plain] == ["code_go/0", "code_go/1"]
    assert [(d.name, d.domain, d.split, d.text) for d in named] == [
        (f"mine_{d.name}", "mine_code_go", "train", d.text) for d in plain
    ]


def test_what_stands_in_the_bundled_text_is_left_out_when_asked_for(tmp_path: Path) -> None:
    copied = bundled_documents("docs_python")[0].text
    own = "\n".join(f"Line {i} stands in no text that was ever bundled with this package." for i in range(20))
    (tmp_path / "mine.txt").write_text(SEPARATOR.join([copied, own]))
    assert [d.text for d in load_documents(tmp_path, exclude_bundled=True)] == [own]
    assert len(load_documents(tmp_path)) == 2
    (tmp_path / "mine.txt").write_text(copied)
    with pytest.raises(TextError, match=r"All the text in .* also stands in the bundled text"):
        load_documents(tmp_path, exclude_bundled=True)
