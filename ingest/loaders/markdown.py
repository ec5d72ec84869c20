"""Markdown: the file's own text, so that offsets are exact; headings outside of code fences."""

from __future__ import annotations

import re
from pathlib import Path

from ingest.loaders.text import read_text
from ingest.outline import add_articles
from rag.document import Document, Heading

_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_SETEXT = re.compile(r" {0,3}(=+|-{2,})[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)$")
_NOT_A_PARAGRAPH = re.compile(r"\s*(?:[-*+>|#]|\d+[.)])|\s*$| {4}|\t")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|$)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title[ \t]*:[ \t]*(.+?)[ \t]*$", re.MULTILINE | re.IGNORECASE)
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_EMPHASIS = re.compile(r"(\*\*|__|\*|`|~~)(?=\S)(.+?)(?<=\S)\1")
_ESCAPE = re.compile(r"\\([\\`*_{}\[\]()#+\-.!|<>~])")
_TAG = re.compile(r"</?[A-Za-z][^>]*>|<!--.*?-->|\{#[^}]*\}$")


class MarkdownLoader:
    """.md files. The title is the front matter's, else the first heading of the first level."""

    media_type = "md"
    suffixes: tuple[str, ...] = (".md", ".markdown", ".mdown", ".mkd", ".mdx")
    version = 1

    def load(self, file: Path, path: str) -> Document:
        text, warnings = read_text(file)
        title, headings = read_markdown(text)
        return Document(
            path, text, self.media_type, title, headings=tuple(headings), warnings=tuple(warnings)
        )


def read_markdown(text: str) -> tuple[str, list[Heading]]:
    """The title ("" where there is none) and the headings of a markdown text."""
    title = ""
    start = 0
    if front := _FRONT_MATTER.match(text):
        if found := _FRONT_TITLE.search(front[1] or ""):
            title = found[1].strip("\"'")
        start = front.end()
    headings = _read_headings(text, start)
    if not title:
        first = [heading for heading in headings if heading.level == 1][:1]
        title = first[0].title if first else ""
    return title, add_articles(headings, text)


def _read_headings(text: str, start: int) -> list[Heading]:
    headings: list[Heading] = []
    fence = ""
    previous: tuple[int, str] | None = None  # a paragraph's line, which "===" makes a heading
    for line in text[start:].split("\n"):
        position, start = start, start + len(line) + 1
        if match := _FENCE.match(line):
            if not fence:
                if match[1][0] != "`" or "`" not in match[2]:
                    fence = match[1]
            elif match[1].startswith(fence) and not match[2].strip():
                fence = ""
            previous = None
            continue
        if fence:
            continue
        if match := _ATX.match(line):
            if title := clean_title(match[2] or ""):
                headings.append(Heading(len(match[1]), title, position))
            previous = None
        elif previous and (match := _SETEXT.match(line)):
            level = 1 if match[1][0] == "=" else 2
            if title := clean_title(previous[1]):
                headings.append(Heading(level, title, previous[0]))
            previous = None
        elif _NOT_A_PARAGRAPH.match(line) and not line.lstrip().startswith("**"):
            previous = None
        else:
            # only a paragraph of one line: "text\n---" below a longer one is a rule
            previous = (position, line) if previous is None else None
    return headings


def clean_title(title: str) -> str:
    """A heading as it is read: without links, emphasis and escapes."""
    title = _TAG.sub("", _LINK.sub(r"\1", title))
    for _ in range(2):  # "***bold italic***"
        title = _EMPHASIS.sub(r"\2", title)
    return " ".join(_ESCAPE.sub(r"\1", title).split())
