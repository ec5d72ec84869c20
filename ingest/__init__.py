"""Load -> split -> embed -> store: `sync` keeps a knowledge base in step with folders of files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingest.parsers import Limits
    from ingest.report import FileResult, SyncReport
    from ingest.synchronizer import Progress, sync

__all__ = ["FileResult", "Limits", "Progress", "SyncReport", "sync"]

_PLACES = {
    "FileResult": "ingest.report", "Limits": "ingest.parsers", "Progress": "ingest.synchronizer",
    "SyncReport": "ingest.report", "sync": "ingest.synchronizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: the parsing workers need none of them."""
    if name not in _PLACES:
        raise AttributeError(f"module 'ingest' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
