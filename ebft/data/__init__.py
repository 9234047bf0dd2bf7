"""Data: text documents, examples with answers, and their packing into rows of tokens."""

from ebft.data.documents import Document, load_documents, split_documents
from ebft.data.example_rows import pack_examples, prompt_rows
from ebft.data.examples import Example, Fields, load_examples, split_examples
from ebft.data.packing import batches, pack

__all__ = [
    "Document",
    "Example",
    "Fields",
    "batches",
    "load_documents",
    "load_examples",
    "pack",
    "pack_examples",
    "prompt_rows",
    "split_documents",
    "split_examples",
]
