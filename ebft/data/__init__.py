"""Data: text documents, and their packing into rows of tokens."""

from ebft.data.documents import Document, load_documents, split_documents
from ebft.data.packing import batches, pack

__all__ = ["Document", "batches", "load_documents", "pack", "split_documents"]
