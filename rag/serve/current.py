"""The knowledge base as it stands when a request comes: one made anew in the same place is opened anew."""

from __future__ import annotations

import threading

from rag.pipeline import Rag
from rag.store import open_store, store_identity


class CurrentRag:
    """Answers from the base that is there now, with the models that are loaded. Safe to use from every thread."""

    def __init__(self, rag: Rag) -> None:
        self._rag = rag  # its open connection keeps the file's number from going to another file
        self._identity = store_identity(rag.settings)
        self._opening = threading.Lock()

    def get(self) -> Rag:
        """Raises KnowledgeBaseError where the base is gone, or can't be used."""
        settings = self._rag.settings
        with self._opening:
            identity = store_identity(settings)
            if identity != self._identity:
                self._rag, self._identity = self._rag.over(open_store(settings)), identity
            return self._rag
