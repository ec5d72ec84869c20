"""What is loaded, once for the whole process: embedders, language models, knowledge bases.

Sessions differ in their settings and share all of this.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rag.confidence import Calibration
from rag.embedder import Embedder, load_embedder
from rag.pipeline import Rag
from rag.settings import Settings
from rag.store import Store, open_store, store_identity

if TYPE_CHECKING:
    from rag.generator import Generator

_KEPT_GENERATORS = 2  # the one in use and the one before it
_KEPT_RAGS = 16  # combinations of settings; each holds only references


@dataclass(frozen=True, slots=True)
class LoadedGenerator:
    """A language model and what is known of its confidence."""

    generator: Generator
    calibration: Calibration | None


class ModelStore:
    """Safe to use from every thread. A model is loaded by one of them, the others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loading = threading.Lock()
        self._embedders: dict[tuple[str, str], Embedder] = {}
        self._generators: OrderedDict[tuple[str, str, str, str], LoadedGenerator] = OrderedDict()
        self._bases: dict[tuple[str, int], Store] = {}
        self._rags: OrderedDict[tuple[Settings, int], Rag] = OrderedDict()
        self._warming: set[Settings] = set()

    def base(self, settings: Settings) -> Store:
        """The knowledge base that the settings name. Raises KnowledgeBaseError where there is none."""
        key = store_identity(settings)
        with self._lock:
            if key not in self._bases:
                self._bases[key] = open_store(settings)
                Path(settings.kb).mkdir(parents=True, exist_ok=True)  # of conversations and uploads
            return self._bases[key]

    def embedder(self, settings: Settings) -> Embedder:
        key = (settings.embedder, settings.device)
        with self._lock:
            if key not in self._embedders:
                self._embedders[key] = load_embedder(settings.embedder, device=settings.device)
            return self._embedders[key]

    def searcher(self, settings: Settings) -> Rag:
        """For retrieval: no language model is loaded for it."""
        key = (settings, store_identity(settings)[1])
        with self._lock:
            if key not in self._rags:
                base = self.base(settings)
                self._rags[key] = Rag(base, self.embedder(settings), settings)
                while len(self._rags) > _KEPT_RAGS:
                    self._rags.popitem(last=False)
            return self._rags[key]

    def rag(self, settings: Settings) -> Rag:
        """Ready to answer: the language model is loaded before this returns."""
        rag = self.searcher(settings)
        loaded = self.load_generator(settings)
        rag.use_generator(loaded.generator, loaded.calibration)
        return rag

    def load_generator(self, settings: Settings) -> LoadedGenerator:
        """Raises GeneratorError where the model can't be loaded; those loaded before stay."""
        key = _generator_key(settings)
        with self._loading:
            loaded = self._generators.get(key)
            if loaded is None:
                from rag.generator import load_generator  # imports torch, which takes seconds

                loaded = LoadedGenerator(
                    load_generator(settings), Calibration.read(settings.generator, settings.adapter)
                )
            with self._lock:
                self._generators[key] = loaded
                self._generators.move_to_end(key)
                if len(self._generators) > _KEPT_GENERATORS:
                    self._generators.popitem(last=False)
                    self._rags.clear()  # they hold it too, and its memory is wanted back
            return loaded

    def loaded(self, settings: Settings) -> Generator | None:
        """The language model where it is loaded already. Never waits."""
        with self._lock:
            found = self._generators.get(_generator_key(settings))
            return found.generator if found else None

    def warm(self, settings: Settings) -> None:
        """Begin to load the models, so that the first question need not wait for all of it.

        An error is not lost: the first question meets it again and shows it.
        """
        with self._lock:
            if settings in self._warming or self.loaded(settings) is not None:
                return
            self._warming.add(settings)
        threading.Thread(target=self._warm, args=(settings,), name="loading", daemon=True).start()

    def _warm(self, settings: Settings) -> None:
        from rag.errors import RagError

        try:
            self.load_generator(settings)
        except RagError:
            return


def _generator_key(settings: Settings) -> tuple[str, str, str, str]:
    return (settings.generator, settings.adapter, settings.device, settings.dtype)
