"""Text sources for collection (see :mod:`specgate.moe.text`)."""

from specgate.moe.text import TextDocument, bundled_documents, bundled_domains, load_documents

__all__ = ["TextDocument", "bundled_documents", "bundled_domains", "load_documents"]
