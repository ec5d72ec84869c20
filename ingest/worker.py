"""The process that parses: `python -m ingest.worker`, started and limited by ingest/parsers.py.

One JSON object a line comes in, one goes out. It reads untrusted files, so it may run out of
memory, crash or be killed; whoever started it then starts another. Where the embedder is a table
it also splits and embeds, so that all cores do that too.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingest.loaders import load_document
from ingest.ocr import limit_time
from rag.document import Chunk, Document, Heading, Page
from rag.errors import RagError

if TYPE_CHECKING:
    from rag.embedder import Embedder


def document_to_dict(document: Document) -> dict[str, Any]:
    return {
        "path": document.path, "text": document.text, "media_type": document.media_type,
        "title": document.title, "warnings": document.warnings,
        "pages": [(page.number, page.start, page.end) for page in document.pages],
        "headings": [(head.level, head.title, head.start) for head in document.headings],
    }


def document_from_dict(fields: dict[str, Any]) -> Document:
    return Document(
        path=fields["path"], text=fields["text"], media_type=fields["media_type"],
        title=fields["title"], warnings=tuple(fields["warnings"]),
        pages=tuple(Page(*page) for page in fields["pages"]),
        headings=tuple(Heading(*heading) for heading in fields["headings"]),
    )


def parse_file(file: Path, path: str) -> Document | str:
    """The document, or in one line why there is none. Whatever a parser raises becomes such a line."""
    try:
        return load_document(file, path)
    except MemoryError:
        return "reading it takes more memory than allowed"
    except RagError as error:
        return " ".join(str(error).split())
    except Exception as error:  # a parser's bug must not stop the files behind this one
        what = " ".join(str(error).split())[:300]
        return f"the parser failed on it ({type(error).__name__}: {what})"


def split_and_embed(document: Document, splitting: dict[str, Any]) -> dict[str, Any]:
    """{"chunks": ..., "vectors": float32 bytes} or {"error": one line}."""
    import numpy as np

    from ingest.splitter import split_document

    embedder = _load_embedder(splitting["embedder"])
    try:
        chunks = split_document(
            document, embedder.count_tokens, chunk_tokens=splitting["chunk_tokens"]
        )
    except Exception as bug:  # must not stop the files behind this one
        return {"error": f"splitting it failed ({type(bug).__name__}: {bug}); please report this"}
    vectors = embedder.embed_passages([chunk.indexed_text for chunk in chunks])
    return {
        "chunks": [
            (chunk.start, chunk.end, chunk.page, chunk.last_page, chunk.headings) for chunk in chunks
        ],
        "vectors": base64.b64encode(np.ascontiguousarray(vectors, dtype="<f4").tobytes()).decode(),
    }


@lru_cache(maxsize=1)
def _load_embedder(name: str) -> Embedder:
    from rag.embedder import load_embedder

    return load_embedder(name)


def chunks_from_list(document: Document, fields: list[Any]) -> list[Chunk]:
    return [
        Chunk(
            path=document.path, text=document.text[start:end], start=start, end=end, page=page,
            last_page=last_page, headings=tuple(headings), title=document.title,
        )
        for start, end, page, last_page, headings in fields
    ]


def _answer(file: Path, path: str, splitting: dict[str, Any] | None) -> dict[str, Any]:
    began = time.perf_counter()
    parsed = parse_file(file, path)
    if isinstance(parsed, str):
        answer: dict[str, Any] = {"error": parsed}
    else:
        answer = {"document": document_to_dict(parsed)}
        if splitting is not None:
            answer |= split_and_embed(parsed, splitting)
    return {**answer, "seconds": time.perf_counter() - began}


def _limit_memory(megabytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the time limit still holds
        return
    if sys.platform == "darwin":
        return  # does not honour it
    limit = megabytes << 20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # A parser that prints must not disturb the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    _limit_memory(int(sys.argv[1]))
    alarm = getattr(signal, "alarm", None)
    for line in sys.stdin:
        request = json.loads(line)
        if alarm is not None:
            # Kills this process should the parent be gone and no longer watch the time.
            alarm(int(request["seconds"]) + 10)
        limit_time(0.8 * request["seconds"], given=request["seconds"])
        found = [
            _answer(Path(file), path, request["splitting"]) for file, path in request["files"]
        ]
        if alarm is not None:
            alarm(0)
        answers.write(json.dumps(found, ensure_ascii=False) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
