"""The process that parses: `python -m ingest.worker`, started and limited by ingest/parsers.py.

One JSON object a line comes in, one goes out. It reads untrusted files, so it may run out of
memory, crash or be killed; whoever started it then starts another.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ingest.loaders import load_document
from ingest.ocr import limit_time
from rag.document import Document, Heading, Page
from rag.errors import RagError


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


def parse_file(file: Path, path: str) -> dict[str, Any]:
    """{"document": ...} or {"error": one line}. Whatever a parser raises becomes an error."""
    try:
        return {"document": document_to_dict(load_document(file, path))}
    except MemoryError:
        return {"error": "reading it takes more memory than allowed"}
    except RagError as error:
        return {"error": " ".join(str(error).split())}
    except Exception as error:  # a parser's bug must not stop the files behind this one
        what = " ".join(str(error).split())[:300]
        return {"error": f"the parser failed on it ({type(error).__name__}: {what})"}


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
    answers = os.fdopen(os.dup(1), "w", encoding="ascii", newline="\n")
    os.dup2(2, 1)
    _limit_memory(int(sys.argv[1]))
    alarm = getattr(signal, "alarm", None)
    for line in sys.stdin:
        request = json.loads(line)
        if alarm is not None:
            # Kills this process should the parent be gone and no longer watch the time.
            alarm(int(request["seconds"]) + 10)
        limit_time(0.6 * request["seconds"])
        answer = parse_file(Path(request["file"]), request["path"])
        if alarm is not None:
            alarm(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
