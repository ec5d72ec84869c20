"""Ask your own documents, on your own machine.

    from rag import Rag
    rag = Rag.open(".kb")
    print(rag.ask("What does the contract say about notice?").text)

Importing this package loads no model.
"""

from rag.answer import Answer, Citation, Disagreement, GenerationStats, Hit
from rag.document import Chunk, Document
from rag.errors import RagError
from rag.filter import Filter
from rag.settings import Settings

__all__ = [
    "Answer", "Chunk", "Citation", "Disagreement", "Document", "Filter", "GenerationStats", "Hit", "Rag", "RagError",
    "Settings",
]


def __getattr__(name: str) -> object:
    # Rag brings faiss and numpy with it; `python -m rag --help` shouldn't wait for them.
    if name == "Rag":
        from rag.pipeline import Rag

        return Rag
    raise AttributeError(f"module 'rag' has no attribute {name!r}")
