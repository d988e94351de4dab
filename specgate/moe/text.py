"""Text to trace or to train on: named documents with a domain and a split.

A text file holds documents separated by a line with a form feed (``\\n\\f\\n``); ``.xz`` files are unpacked
on the fly.
The bundled text lives beside this module in ``reference/text``: one file per domain, licences in ``NOTICE``.
"""

from __future__ import annotations

import hashlib
import lzma
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from specgate.errors import TextError

SEPARATOR = "\n\f\n"
SPLITS = ("train", "validation", "test")
#: Bundled domains in scripts that the reference MoEs have never read. They are traced only when named: on
#: them the expert load collapses (see docs/LOG.md), which a study of domain shift wants and a first trace
#: does not.
UNSEEN_SCRIPTS = ("help_chinese", "help_japanese", "help_russian")
#: Turns the circle of hashes, so that the test split holds documents that no tuning has looked at.
_TURN = 0.65
LINE = 50  # characters from which on a line is long enough to tell a copy from a coincidence
BUNDLED_TEXT = Path(__file__).parent / "reference" / "text"


@dataclass(frozen=True)
class TextDocument:
    """One document. ``split`` is fixed by the document's own text, so that copies never straddle two
    splits.
    """

    name: str
    domain: str
    split: str
    text: str


def split_of(text: str, validation: float = 0.15, test: float = 0.2) -> str:
    """The split of a document, decided by the SHA-256 of its text alone.

    Args:
        text: the document.
        validation: share of documents for validation.
        test: share of documents for the locked test split.
    """
    draw = (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 + _TURN) % 1.0
    return "test" if draw < test else "validation" if draw < test + validation else "train"


def read_text(path: Path) -> str:
    """The text of a plain or ``.xz`` file.

    Raises:
        TextError: if the file is missing, truncated or not UTF-8.
    """
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except FileNotFoundError:
        raise TextError(
            f"Text file {path} does not exist; name a file, a directory or a glob of text files."
        ) from None
    except (lzma.LZMAError, EOFError) as err:
        raise TextError(
            f"Text file {path} is not a whole .xz file ({err}); unpack or copy it again."
        ) from None
    except UnicodeDecodeError as err:
        raise TextError(f"Text file {path} is not UTF-8 at byte {err.start}; convert it first.") from None


def documents_of(path: Path, domain: str | None = None) -> Iterator[TextDocument]:
    """The documents of one text file, in file order; empty ones are left out."""
    domain = domain or path.name.split(".")[0]
    for number, text in enumerate(read_text(path).split(SEPARATOR)):
        if text.strip():
            yield TextDocument(f"{domain}/{number}", domain, split_of(text), text)


def text_files(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """The text files that ``sources`` (files or directories) name, sorted.

    Raises:
        TextError: if a source does not exist or a directory holds no text file.
    """
    files: list[Path] = []
    for source in [sources] if isinstance(sources, str | Path) else list(sources):
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.is_file() and p.name.endswith((".txt", ".txt.xz", ".md"))
            )
            if not found:
                raise TextError(
                    f"Directory {path} holds no .txt, .txt.xz or .md file; point to one that does."
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise TextError(
                f"Text source {path} does not exist; name a text file or a directory of text files."
            )
    return files


def load_documents(
    sources: str | Path | Iterable[str | Path],
    split: str | None = None,
    prefix: str = "",
    exclude_bundled: bool = False,
) -> list[TextDocument]:
    """Every document of the named files and directories.

    Args:
        split: put all of them into this split; None decides by each document's text.
        prefix: put before the name of every domain and document, to tell them from those of another trace.
        exclude_bundled: leave out documents of which a twentieth of the long lines also stands in the bundled
            text, so that a predictor that learns from them has not seen what it is scored on.

    Raises:
        TextError: if a source is missing, unreadable, or no document has any text.
    """
    if split not in (None, *SPLITS):
        raise TextError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    documents = [document for path in text_files(sources) for document in documents_of(path)]
    if split is not None:
        documents = [replace(document, split=split) for document in documents]
    if prefix:
        documents = [replace(d, name=prefix + d.name, domain=prefix + d.domain) for d in documents]
    if not documents:
        raise TextError(f"The text in {sources} is empty; give at least one document.")
    if exclude_bundled:
        documents = without_copies(documents, bundled_documents("all"))
        if not documents:
            raise TextError(f"All the text in {sources} also stands in the bundled text; give other text.")
    return documents


def without_copies(
    documents: list[TextDocument], traced: list[TextDocument], share: float = 0.05
) -> list[TextDocument]:
    """Leaves out the documents of which more than ``share`` of the long lines also stand in ``traced``.

    So that what is traced was never seen in training, be it a model's or a predictor's. Lines that more than
    eight documents have in common (licence headers) tell nothing and do not count.
    """
    seen: Counter[int] = Counter()
    lines_of = []
    for d in documents:
        lines = {hash(line) for s in d.text.split("\n") if len(line := s.strip()) >= LINE}
        lines_of.append(lines)
        seen.update(lines)
    theirs = {hash(line) for d in traced for s in d.text.split("\n") if len(line := s.strip()) >= LINE}
    theirs = {h for h in theirs if 0 < seen[h] <= 8}
    return [
        d for d, lines in zip(documents, lines_of, strict=True) if len(lines & theirs) <= share * len(lines)
    ]


def bundled_domains() -> list[str]:
    """Names of the domains whose text ships with the package."""
    return sorted(p.name.removesuffix(".txt.xz") for p in BUNDLED_TEXT.glob("*.txt.xz"))


def bundled_documents(domains: str | Iterable[str] | None = None) -> list[TextDocument]:
    """The bundled text, split by document into train, validation and locked test.

    Args:
        domains: which domains; ``"all"`` of them, or when None all but those of :data:`UNSEEN_SCRIPTS`.

    Raises:
        TextError: if a domain is unknown.
    """
    known = bundled_domains()
    if domains is None:
        wanted = [d for d in known if d not in UNSEEN_SCRIPTS]
    elif domains == "all":
        wanted = known
    else:
        wanted = [domains] if isinstance(domains, str) else list(domains)
    if unknown := [d for d in wanted if d not in known]:
        raise TextError(f"Unknown text domain {unknown[0]!r}; the bundled ones are {', '.join(known)}.")
    return [document for d in wanted for document in documents_of(BUNDLED_TEXT / f"{d}.txt.xz", d)]
