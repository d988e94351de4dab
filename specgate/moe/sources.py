"""Text from a `datasets` name: a data set on the hub, or local JSON, CSV or Parquet files through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from specgate.errors import TextError
from specgate.moe.text import TextDocument, split_of


def dataset_documents(
    name: str,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    domain_column: str | None = None,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
    revision: str | None = None,
    limit: int = 10_000,
    minimum_characters: int = 200,
) -> list[TextDocument]:
    """The first rows of a data set as documents, streamed: nothing but those rows is downloaded.

    Args:
        name: on the hub, or a builder such as ``json`` or ``text`` together with ``data_files``.
        config, split, revision: passed to ``datasets.load_dataset``.
        column: with the text.
        domain_column: with the domain; the data set's name is the domain when None.
        data_files: local files for a builder.
        limit: rows to read at most.
        minimum_characters: shorter rows are left out.

    Raises:
        TextError: if `datasets` is not installed, the data set cannot be read or lacks the column.
    """
    try:
        import datasets
    except ImportError:
        raise TextError("text=datasets needs the package `datasets`; pip install 'specgate[data]'.") from None
    try:
        rows = datasets.load_dataset(
            name, config, split=split, data_files=data_files, revision=revision, streaming=True
        )
        documents = []
        for number, row in enumerate(rows.take(limit)):
            if column not in row:
                raise TextError(
                    f"Data set {name!r} has no column {column!r}; text.column can be {', '.join(row)}."
                )
            text = str(row[column] or "")
            if len(text) < minimum_characters:
                continue
            domain = str(row[domain_column]) if domain_column else name.rpartition("/")[2]
            documents.append(TextDocument(f"{name}/{split}/{number}", domain, split_of(text), text))
    except TextError:
        raise
    except Exception as error:
        # `datasets` raises anything from OSError to pyarrow's own errors, depending on the builder
        reason = " ".join(str(error).split())[:200]
        raise TextError(
            f"Cannot read the data set {name!r} ({type(error).__name__}: {reason}); check name, config and "
            "split, and the network, or give data_files."
        ) from error
    if not documents:
        raise TextError(
            f"Data set {name!r} has no row of {minimum_characters} characters or more in {column!r}; "
            "lower text.minimum_characters or choose another column."
        )
    return documents
