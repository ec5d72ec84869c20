"""Answers and sources as HTML, all of it escaped.

Nothing that comes from a document, a model or a user is ever markup here: it goes through `escape`,
or it is not shown. There is no image, no script, and no link but to a place on the page itself.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.conversations import ENDED, Turn
from app.texts import InterfaceLanguage, number, text
from rag.answer import Answer, Citation, Disagreement, GenerationStats, Hit
from rag.citations import Marker, find_markers
from rag.filter import Filter
from rag.sentences import one_line

_AT_LINE_END = re.compile(r" *\[(\d{1,3})\]$", re.MULTILINE)
_AROUND = 200  # characters of the document shown before and after a passage
_BEFORE_CITED, _AFTER_CITED = 180, 620  # of a long passage, what is shown around its citations
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")


def escape(value: str) -> str:
    """Text that a browser shows as it is. Signs that turn the writing direction are left out."""
    return html.escape(_CONTROL.sub("", value), quote=True)


def escape_label(value: str) -> str:
    """Text for a widget's label, which Streamlit would otherwise read as Markdown."""
    line = one_line(_CONTROL.sub("", value))
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~:$&^])", r"\\\1", line)


# the question and the answer


def question_html(question: str, language: InterfaceLanguage, turn_id: str) -> str:
    return (
        f'<div class="lr-question" id="question-{turn_id}" role="heading" aria-level="2">'
        f'<span class="lr-hidden">{text(language, "you")}: </span>{escape(question)}</div>'
    )


def answer_html(turn: Turn, language: InterfaceLanguage) -> str:
    """The answer as it stands, with its kind and what to know about it."""
    answer = turn.answer
    if turn.state == "failed":
        message = turn.error or text(language, "unexpected", name=turn.unexpected)
        notice = _notice("failed", text(language, "failed"), escape(message))
        return f'<div class="lr-answer" data-kind="failed">{notice}</div>'
    if answer is None:
        body = f'<div class="lr-text">{_written(turn)}</div>' if turn.text else ""
        if turn.state == "stopped":
            body += _notice("stopped", text(language, "stopped"), text(language, "stopped_note"))
        return f'<div class="lr-answer" data-kind="{turn.state}">{body}</div>'
    notes = []
    if answer.unsupported:
        notes.append(text(language, "unsupported_note"))
    if answer.stats.finish_reason == "length" and answer.kind == "generated":
        notes.append(text(language, "cut_note"))
    doubt = f'<p class="lr-note lr-doubt">{text(language, "doubtful_note")}</p>' if answer.doubtful else ""
    doubt += "".join(_disagreement(each, answer, turn.id, language) for each in answer.disagreements)
    below = "".join(f'<p class="lr-note">{note}</p>' for note in notes)
    return (
        f'<div class="lr-answer" data-kind="{answer.kind}">'
        f'<div class="lr-kind lr-kind-{answer.kind}"><b>{text(language, answer.kind)}</b>'
        f'<span>{text(language, answer.kind + "_note")}</span></div>'
        f'{doubt}<div class="lr-text">{_answer_text(answer, turn.id)}</div>{below}</div>'
    )


def _disagreement(each: Disagreement, answer: Answer, turn_id: str, language: InterfaceLanguage) -> str:
    """What two places say differently, each with its source."""
    quotes = _quotes(answer)
    lines = "".join(
        f"<span>{said} {_chip(citation.marker, quotes, turn_id)}</span>"
        for citation, words in ((each.first, each.first_words), (each.second, each.second_words))
        for said in [text(
            language, "disagree_line", words=escape(one_line(words)), path=escape(citation.path)
        )]
    )
    return f'<div class="lr-notice lr-notice-disagree" role="note"><b>{text(language, "disagree")}</b>{lines}</div>'


def _shown_citations(answer: Answer) -> list[Citation]:
    """What the answer cites, and the places that disagree, each once."""
    both = [citation for each in answer.disagreements for citation in (each.first, each.second)]
    return list(dict.fromkeys((*answer.citations, *both)))


def _quotes(answer: Answer) -> dict[int, list[Citation]]:
    found: dict[int, list[Citation]] = {}
    for citation in _shown_citations(answer):
        found.setdefault(citation.marker, []).append(citation)
    return found


def scope_text(where: Filter, language: InterfaceLanguage) -> str:
    """One line that says which files are asked, escaped."""
    parts = [*(f"{folder}/" for folder in where.under), *where.file, *where.type]
    parts += [text(language, "scope_from_day", day=where.since)] * bool(where.since)
    parts += [text(language, "scope_to_day", day=where.until)] * bool(where.until)
    return escape(text(language, "scope_line", parts=" · ".join(parts)))


def progress_html(
    done: int, total: int, last: Sequence[str], seconds: float, language: InterfaceLanguage
) -> str:
    """How far an ingest is, and the files it went through last, the newest first."""
    share = done / total if total else 0.0
    counted = text(language, "files_done", done=number(done), total=number(total)) if total else "…"
    so_far = text(language, "running_for", seconds=f"{seconds:.0f}")
    files = "".join(f"<li>{escape(path)}</li>" for path in reversed(last))
    return (
        f'<div class="lr-progress" role="status"><div class="lr-head"><b>{text(language, "building")}</b>'
        f'<span>{counted} · {so_far}</span></div>'
        f'<div class="lr-track"><i class="lr-bar" style="width:{100 * min(1.0, share):.1f}%"></i></div>'
        f"<ul>{files}</ul></div>"
    )


def share_bars_html(bars: Sequence[tuple[str, float]]) -> str:
    """A bar for each (name, share of the whole)."""
    rows = "".join(
        f'<div class="lr-share"><span>{escape(name)}</span><span class="lr-track">'
        f'<i class="lr-bar" style="width:{100 * share:.1f}%"></i></span>'
        f'<span class="lr-seconds">{share:.0%}</span></div>'
        for name, share in bars
    )
    return f"<div>{rows}</div>"


def overlap_html(bars: Sequence[tuple[str, float, float]]) -> str:
    """A bar for each (name, where its shared part ends, where it ends), shares of the longest."""
    rows = "".join(
        f'<div class="lr-share"><span>{escape(name)}</span><span class="lr-track">'
        f'<i class="lr-bar" style="width:{100 * shared:.1f}%"></i>'
        f'<i class="lr-bar lr-bar-prefill" style="width:{100 * (whole - shared):.1f}%"></i></span></div>'
        for name, shared, whole in bars
    )
    return f"<div>{rows}</div>"


def copy_html(answer_text: str, language: InterfaceLanguage) -> str:
    """A button that puts the text on the clipboard; the page's script listens for it."""
    return (
        f'<button type="button" class="lr-copy" data-text="{escape(answer_text)}">'
        f'<span class="lr-now">{text(language, "copy")}</span>'
        f'<span class="lr-then">{text(language, "copied")}</span></button>'
    )


def live_html(turn: Turn, language: InterfaceLanguage, *, num_before: int) -> str:
    """An answer that is being made: the stage it is in, then the text so far.

    The turn may end in its own thread at any moment, this one included: it is then shown as still
    being written, and the page, which looks again, shows what became of it.
    """
    state = turn.state
    if state == "queued":
        stage = (
            text(language, "queued", count=num_before) if num_before else text(language, "next")
        )
    else:
        stage = text(language, "writing" if state in ENDED else state, count=len(turn.hits))
    body = ""
    if turn.text:
        body = f'<div class="lr-text">{_written(turn)}<span class="lr-caret"></span></div>'
    return (
        f'<div class="lr-answer" data-kind="live" aria-live="polite">'
        f'<div class="lr-stage"><span class="lr-pulse"></span>{stage}</div>{body}</div>'
    )


def _notice(kind: str, title: str, body: str) -> str:
    return f'<div class="lr-notice lr-notice-{kind}" role="status"><b>{title}</b><span>{body}</span></div>'


def notice_html(title: str, body: str, *, kind: str = "failed") -> str:
    """A message to the user; both parts are escaped here."""
    return _notice(kind, escape(title), escape(body))


def _answer_text(answer: Answer, turn_id: str) -> str:
    """The answer with unsupported sentences marked and `[n]` leading to its source."""
    markers = _markers(answer.text, answer.hits, is_quoted=answer.kind == "quoted")
    quotes = _quotes(answer)
    spans: list[tuple[int, int]] = []
    for sentence in answer.unsupported:
        start = answer.text.find(sentence)
        if start >= 0:
            spans.append((start, start + len(sentence)))
    pieces: list[str] = []
    last = 0
    for start, end in sorted(spans):
        if start < last:
            continue
        pieces.append(_with_markers(answer.text, markers, quotes, turn_id, last, start))
        inner = _with_markers(answer.text, markers, quotes, turn_id, start, end)
        pieces.append(f'<span class="lr-unsupported">{inner}</span>')
        last = end
    pieces.append(_with_markers(answer.text, markers, quotes, turn_id, last))
    return "".join(pieces)


def _written(turn: Turn) -> str:
    """What a model has written so far, its markers leading nowhere yet."""
    return _with_markers(turn.text, _markers(turn.text, turn.hits, is_quoted=False), {}, "")


def _markers(value: str, hits: Sequence[Hit], *, is_quoted: bool) -> list[Marker]:
    """The markers of an answer. A quotation has one at the end of each line; what else it has in brackets
    is its source's."""
    if is_quoted:
        return [Marker(match.start(), match.end(), (int(match[1]),)) for match in _AT_LINE_END.finditer(value)]
    return find_markers(value, len(hits), [hit.chunk.text for hit in hits])


def _with_markers(
    value: str, markers: Sequence[Marker], quotes: dict[int, list[Citation]], turn_id: str, begin: int = 0,
    end: int | None = None,
) -> str:
    """Text [begin, end) escaped, with its markers as chips."""
    end = len(value) if end is None else end
    pieces: list[str] = []
    for marker in markers:
        if begin <= marker.start and marker.end <= end:
            pieces.append(escape(value[begin : marker.start]))
            pieces += [_chip(number, quotes, turn_id) for number in marker.numbers]
            begin = marker.end
    pieces.append(escape(value[begin:end]))
    return "".join(pieces)


def _chip(marker: int, quotes: dict[int, list[Citation]], turn_id: str) -> str:
    """The number of a passage; it leads to the source where it is a citation."""
    if marker not in quotes:
        return f'<span class="lr-chip lr-chip-plain">{marker}</span>'
    tip = "\n".join(one_line(citation.quote) for citation in quotes[marker])
    return (
        f'<a class="lr-chip" href="#{source_id(turn_id, marker)}" '
        f'title="{escape(tip[:600])}">{marker}</a>'
    )


def source_id(turn_id: str, marker: int) -> str:
    return f"source-{turn_id}-{marker}"


# sources


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a document: "around" the passage, in the "passage", or "cited"."""

    text: str
    kind: str


def segments(
    document_text: str, start: int, end: int, cited: Sequence[tuple[int, int]]
) -> list[Segment]:
    """The passage [start, end) in its surroundings, cut where the cited spans begin and end.

    Together the segments are one slice of the document, which holds every cited span and as much
    of the passage as fits around them. `cited` are offsets into the document.
    """
    first, last = max(0, start - _AROUND), min(len(document_text), end + _AROUND)
    inner_first, inner_last = start, end
    if cited:
        # The reader should see the citation at once, without scrolling through a long passage.
        inner_first, inner_last = min(a for a, _ in cited), max(b for _, b in cited)
        first = max(first, inner_first - _BEFORE_CITED)
        last = min(last, inner_last + _AFTER_CITED)
    first = _word_start(document_text, min(first, inner_first), inner_first)
    last = _word_end(document_text, max(last, inner_last), inner_last)
    cuts = {first, last} | {edge for edge in (start, end) if first < edge < last}
    for span in cited:
        cuts.update(span)
    result: list[Segment] = []
    edges = sorted(cuts)
    for low, high in zip(edges, edges[1:], strict=False):
        if any(a <= low and high <= b for a, b in cited):
            kind = "cited"
        elif start <= low and high <= end:
            kind = "passage"
        else:
            kind = "around"
        result.append(Segment(document_text[low:high], kind))
    return result


def _word_start(value: str, position: int, end: int) -> int:
    """The first line or word that begins at or after `position`."""
    if position == 0:
        return 0
    for sign in ("\n", " "):
        found = value.find(sign, position, end)
        if found >= 0:
            return found + 1
    return position


def _word_end(value: str, position: int, start: int) -> int:
    if position == len(value):
        return position
    for sign in ("\n", " "):
        found = value.rfind(sign, start, position)
        if found > start:
            return found
    return position


def sources_html(
    answer: Answer, turn_id: str, documents: dict[str, str], language: InterfaceLanguage
) -> str:
    """Every passage of an answer: those it cites first. `documents` holds the files' texts now."""
    cited_numbers = sorted({citation.marker for citation in _shown_citations(answer)})
    cited = [_source(answer, n, turn_id, documents, language) for n in cited_numbers]
    rest = [
        _source(answer, n, turn_id, documents, language)
        for n in range(1, len(answer.hits) + 1)
        if n not in cited_numbers
    ]
    parts: list[str] = []
    if cited:
        parts.append(f'<h3 class="lr-heading">{text(language, "sources")}</h3>{"".join(cited)}')
    if rest and cited:
        parts.append(
            f'<details class="lr-more"><summary>{text(language, "also_found")} '
            f'<span class="lr-count">{len(rest)}</span></summary>{"".join(rest)}</details>'
        )
    elif rest:
        parts.append(f'<h3 class="lr-heading">{text(language, "nearest")}</h3>{"".join(rest)}')
    return f'<div class="lr-sources">{"".join(parts)}</div>' if parts else ""


def _source(
    answer: Answer, marker: int, turn_id: str, documents: dict[str, str], language: InterfaceLanguage
) -> str:
    hit = answer.hits[marker - 1]
    citations = [citation for citation in _shown_citations(answer) if citation.marker == marker]
    page = citations[0].page if citations else hit.page
    start, end = (citations[0].start, citations[0].end) if citations else (hit.chunk.start, hit.chunk.end)
    return _card(
        hit, language, marker=marker, anchor=source_id(turn_id, marker),
        cited=[(citation.start, citation.end, citation.quote) for citation in citations],
        document_text=documents.get(hit.chunk.path), page=page, start=start, end=end,
    )


def hit_html(hit: Hit, marker: int, language: InterfaceLanguage) -> str:
    """A passage of a bare search, without an answer."""
    return _card(
        hit, language, marker=marker, anchor="", cited=[], document_text=None, page=hit.page,
        start=hit.chunk.start, end=hit.chunk.end, is_search=True,
    )


def _card(
    hit: Hit, language: InterfaceLanguage, *, marker: int, anchor: str,
    cited: list[tuple[int, int, str]], document_text: str | None, page: int | None, start: int,
    end: int, is_search: bool = False,
) -> str:
    chunk = hit.chunk
    is_current = document_text is not None and document_text[chunk.start : chunk.end] == chunk.text
    if is_current and document_text is not None:
        shown = segments(document_text, chunk.start, chunk.end, [(a, b) for a, b, _ in cited])
    else:
        # The passage as it was found, with the citations moved to its own offsets.
        inside = [
            (a - chunk.start, b - chunk.start) for a, b, quote in cited
            if chunk.text[a - chunk.start : b - chunk.start] == quote and a >= chunk.start
        ]
        shown = segments(chunk.text, 0, len(chunk.text), inside)
    preview = one_line(cited[0][2] if cited else chunk.text)
    place = [escape(part) for part in dict.fromkeys((chunk.title, *chunk.headings)) if part]
    where = f'<span class="lr-page">{text(language, "page", number=page)}</span>' if page else ""
    body = _segments_html(shown, anchor)
    found = note = ""
    if is_search:
        found = f'<span class="lr-found" title="{text(language, "score")}">{number(hit.score, 1)}</span>'
    if not is_current and not is_search:
        note = f'<p class="lr-note">{text(language, "changed_since")}</p>'
    return (
        f'<details class="lr-source{" lr-cited" if cited else ""}"><summary>'
        f'<span class="lr-number">{marker}</span>'
        f'<span class="lr-what"><span class="lr-file">{escape(chunk.path)}</span>{where}'
        f'<span class="lr-preview">{escape(preview[:240])}</span></span>{found}</summary>'
        f'<div class="lr-inside">'
        f'<div class="lr-place">{" <i>›</i> ".join(place)}</div>'
        f'<div class="lr-passage" tabindex="0">{body}</div>{note}'
        f'<div class="lr-facts">{_facts(hit, language, start, end)}</div></div></details>'
    )


def _segments_html(shown: Sequence[Segment], anchor: str) -> str:
    pieces: list[str] = []
    for at, segment in enumerate(shown):
        value = segment.text.lstrip("\n") if at == 0 else segment.text
        value = value.rstrip() if at == len(shown) - 1 else value
        if segment.kind == "cited":
            # The first one carries the id that the chip leads to; the browser opens the card for it.
            pieces.append(mark_html(value, anchor))
            anchor = ""
        elif segment.kind == "around":
            pieces.append(f'<span class="lr-around">{escape(value)}</span>')
        else:
            pieces.append(escape(value))
    return "".join(pieces)


def mark_html(value: str, id: str = "") -> str:
    """Text as marked, line by line: an empty line between would show as a coloured sliver."""
    pieces: list[str] = []
    for part in re.split(r"(\s*\n\s*)", value):
        if not part.strip():
            pieces.append(escape(part))
            continue
        name = f' id="{id}"' if id else ""
        id = ""
        pieces.append(f"<mark{name}>{escape(part)}</mark>")
    return "".join(pieces)


def _facts(hit: Hit, language: InterfaceLanguage, start: int, end: int) -> str:
    figures = [
        (text(language, "score"), number(hit.score, 2)),
        (text(language, "dense"), number(hit.dense_score, 2)),
        (text(language, "bm25"), number(hit.bm25_score, 2)),
    ]
    shown = "".join(f"<span>{name} <b>{value}</b></span>" for name, value in figures)
    return shown + f'<span>{text(language, "characters", start=f"{start:,}", end=f"{end:,}")}</span>'


# what it cost


def cost_html(turn: Turn, language: InterfaceLanguage) -> str:
    """How the answer came about: a waterfall of its seconds, its figures, its passages, its prompt."""
    answer = turn.answer
    if answer is None:
        return ""
    steps = _steps(turn, answer.stats)
    total = max(sum(seconds for _, seconds in steps), 1e-6)
    summary = [_seconds(total, language)]
    if answer.stats.generator:
        tokens = text(language, "brief_tokens", count=_count(answer.stats, answer.stats.new_tokens, language))
        summary += [tokens, escape(answer.stats.device)]
    note = "" if answer.stats.generator else f'<p class="lr-note">{text(language, "no_model")}</p>'
    figures = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _figures(turn, answer, language)
    )
    return (
        f'<details class="lr-cost"><summary>{text(language, "what_happened")}'
        f'<span class="lr-brief">{" · ".join(summary)}</span></summary>'
        f'<div class="lr-inside">{_waterfall(steps, total, language)}<dl>{figures}</dl>{note}'
        f"{_passages_table(answer, language)}{_prompt_html(answer, language)}</div></details>"
    )


def _steps(turn: Turn, stats: GenerationStats) -> list[tuple[str, float]]:
    """The answer's time in order; together all of it."""
    search = turn.seconds_search + stats.seconds_retrieval
    if not stats.generator:
        return [("retrieval", search)]
    decode = (stats.new_tokens - 1) / stats.tokens_per_second if stats.tokens_per_second else 0.0
    prefill = stats.seconds_to_first_token
    check = max(0.0, stats.seconds_total - stats.seconds_retrieval - prefill - decode)
    return [("retrieval", search), ("prefill", prefill), ("decode", decode), ("check", check)]


def _waterfall(
    steps: Sequence[tuple[str, float]], total: float, language: InterfaceLanguage
) -> str:
    rows: list[str] = []
    before = 0.0
    for name, seconds in steps:
        width = max(0.8, 100 * seconds / total)
        left = min(100 * before / total, 100 - width)
        rows.append(
            f'<div class="lr-step"><span>{text(language, name)}</span><span class="lr-track">'
            f'<i class="lr-bar lr-bar-{name}" style="margin-left:{left:.1f}%;width:{width:.1f}%"></i>'
            f'</span><span class="lr-seconds">{_seconds(seconds, language)}</span></div>'
        )
        before += seconds
    return "".join(rows)


def _figures(turn: Turn, answer: Answer, language: InterfaceLanguage) -> list[tuple[str, str]]:
    """(name, value) of what the model did and took; the values are escaped."""
    stats = answer.stats
    figures: list[tuple[str, str]] = []
    if stats.generator:
        reused = number(stats.reused_tokens)
        if stats.prompt_tokens:
            reused += f" ({stats.reused_tokens / stats.prompt_tokens:.0%})"
        first = turn.seconds_search + stats.seconds_retrieval + stats.seconds_to_first_token
        figures = [
            (text(language, "prompt_tokens"), _count(stats, stats.prompt_tokens, language)),
            (text(language, "reused_tokens"), reused),
            (text(language, "first_token"), _seconds(first, language)),
            (text(language, "new_tokens"), _count(stats, stats.new_tokens, language)),
            (text(language, "tokens_per_second"), _count(stats, stats.tokens_per_second, language)),
            (text(language, "model"), escape(stats.generator)),
            (text(language, "device"), escape(f"{stats.device} · {stats.dtype}")),
        ]
    if stats.model_bytes:
        cache = text(
            language, "of", part=size_text(stats.cached_bytes), whole=size_text(stats.cache_bytes)
        )
        figures += [
            (text(language, "model_memory"), size_text(stats.model_bytes)),
            (text(language, "cache_memory"), cache),
        ]
    if answer.kind != "refused" or stats.generator:
        figures.append((text(language, "confidence"), f"{answer.confidence:.0%}"))
    return figures


def _count(stats: GenerationStats, value: float, language: InterfaceLanguage) -> str:
    """A number of tokens, which some generators elsewhere don't tell: then it was reckoned from the text."""
    return text(language, "about", value=number(value)) if stats.counts_estimated else number(value)


def _passages_table(answer: Answer, language: InterfaceLanguage) -> str:
    """The passages in the order they were ranked, with their scores."""
    if not answer.hits:
        return ""
    rows: list[str] = []
    for at, hit in enumerate(answer.hits, 1):
        page = hit.page if hit.page is not None else hit.chunk.page
        where = f' <span class="lr-page">{text(language, "page", number=page)}</span>' if page else ""
        rows.append(
            f"<tr><td>{at}</td><td>{escape(hit.chunk.path)}{where}</td>"
            f"<td>{number(hit.dense_score, 2)}</td><td>{number(hit.bm25_score, 2)}</td>"
            f"<td>{number(hit.score, 2)}</td></tr>"
        )
    names = ("", text(language, "passage"), text(language, "dense"), text(language, "bm25"),
             text(language, "score"))
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<table class="lr-table"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'<p class="lr-note">{text(language, "scores_note")}</p>'
    )


def _prompt_html(answer: Answer, language: InterfaceLanguage) -> str:
    if not answer.prompt:
        return ""
    return (
        f'<details class="lr-more"><summary>{text(language, "exact_prompt")}</summary>'
        f'<pre class="lr-prompt" tabindex="0">{escape(answer.prompt)}</pre></details>'
    )


def size_text(count: float) -> str:
    """Bytes for people: 512 B, 4.9 kB, 1.5 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1024:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GB"


def _seconds(seconds: float, language: InterfaceLanguage) -> str:
    return text(language, "seconds", seconds=f"{seconds:.3f}" if seconds < 1 else f"{seconds:.1f}")
