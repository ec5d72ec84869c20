"""A saved evaluation as one HTML file: figures with intervals, plots, the worst cases with their passages.

Everything is in the file, no script runs in it and nothing is fetched. Plots are drawn by
matplotlib (`pip install local-rag[report]`) as SVG; their words stay words, set by the browser.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rag.errors import InputError
from rag.quality.evaluation import FIGURES
from rag.quality.run import Comparison, Run

_WORST = 30
_PASSAGES = 4
_LONGEST_PASSAGE = 900  # characters shown of one; the page says where it was cut
_COLUMNS = ("n", "hit@1", "hit@5", "mrr", "f1", "answer_in_text", "citation_precision",
            "balanced_refusal_accuracy", "refusal_accuracy")
_BLUE, _RED, _GREY = "#2b6cb0", "#c53030", "#a0aec0"


def check_plots() -> None:
    """Raises InputError where matplotlib is missing; asked before an evaluation that takes minutes."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("an HTML report needs matplotlib. Install it: pip install 'matplotlib>=3.8'") from error


def write_report(run: Run, path: Path, comparison: Comparison | None = None) -> None:
    """Write the report of `run`; with a comparison, of `run` against an earlier one."""
    check_plots()
    try:
        path.write_text(report(run, comparison), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} can't be written: {error}") from error


def report(run: Run, comparison: Comparison | None = None) -> str:
    """The page as text."""
    from jinja2 import Environment
    from markupsafe import Markup

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    worst = worst_cases(run, set(comparison.worse) if comparison else set())
    by_type = run.summary["by_type"]
    return page.render(
        run=run, comparison=comparison, figures=FIGURES, columns=_COLUMNS, by_type=by_type, worst=worst,
        cut=_LONGEST_PASSAGE, passages=_PASSAGES, show=_show, reason=_reason, mark=_marked,
        plots=[
            (title, Markup(svg)) for title, svg in (
                ("Figures with their 95% intervals", _intervals_plot(run.summary)),
                ("Risk against coverage", _risk_plot(run.summary["risk_coverage"])),
                ("hit@5 by type", _type_plot(by_type)),
                ("Place of the right passage", _rank_plot(run.questions)),
                ("b - a with its 95% interval", _difference_plot(comparison) if comparison else ""),
            ) if svg
        ],
    )


def worst_cases(run: Run, became_worse: set[str]) -> list[dict[str, Any]]:
    """The questions to look at first: what became worse, then wrong answers given with most confidence."""
    wrong = [row for row in run.questions if _reason(row) or str(row["id"]) in became_worse]
    wrong.sort(key=lambda row: (str(row["id"]) not in became_worse, row["refused"], -row["confidence"]))
    return wrong[:_WORST]


def _reason(row: Mapping[str, Any]) -> str:
    """What went wrong, in words; empty where nothing did."""
    gold = row["gold"]
    if gold["unanswerable"]:
        return "" if row["refused"] else "answered, though the documents hold no answer"
    reasons = []
    if gold["path"] is not None and row["rank"] is None:
        reasons.append("the right passage was not found")
    if row["refused"]:
        reasons.append("refused, though there is an answer")
    elif row["right"] is False:
        reasons.append("the wanted words are not in the answer")
    return "; ".join(reasons)


def _show(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _marked(text: str, gold: Mapping[str, Any]) -> Any:
    """A passage as it is shown: cut where it is long, with the wanted words marked."""
    from markupsafe import Markup, escape

    wanted = [part for part in (*gold["answers"], gold["quote"] or "") if part.strip()]
    shown = text if len(text) <= _LONGEST_PASSAGE else f"{text[:_LONGEST_PASSAGE]} … ({len(text)} characters)"
    pattern = "|".join(re.escape(part) for part in sorted(wanted, key=len, reverse=True))
    if not pattern:
        return escape(shown)
    pieces = re.split(f"({pattern})", shown, flags=re.IGNORECASE)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(piece) if at % 2 else escape(piece) for at, piece in enumerate(pieces)
    )


# plots


def _svg(height: float, draw: Any) -> str:
    """What `draw(axes)` draws, as an <svg> element to stand in a page."""
    import matplotlib
    from matplotlib.figure import Figure

    # Words stay text, so that the reader's browser sets Chinese with a font of its own; the salt
    # makes the same figures the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eval", "font.size": 9}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        text = io.StringIO()
        with warnings.catch_warnings():
            # matplotlib measures with its own font, which has no Han; the browser's has.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def _intervals_plot(summary: Mapping[str, Any]) -> str:
    rows = [(name, summary[name], summary["intervals"][name]) for name in reversed(FIGURES)
            if summary[name] is not None and summary["intervals"][name] is not None]

    def draw(axes: Any) -> None:
        for at, (_, value, (low, high)) in enumerate(rows):
            axes.plot([low, high], [at, at], color=_BLUE, linewidth=2)
            axes.plot([value], [at], "o", color=_BLUE)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.set_xlim(-0.02, 1.02)
        axes.grid(axis="x", alpha=0.3)

    return _svg(0.5 + 0.28 * len(rows), draw) if rows else ""


def _risk_plot(curve: Sequence[Sequence[float]]) -> str:
    def draw(axes: Any) -> None:
        axes.step([point[1] for point in curve], [point[2] for point in curve], where="post", color=_RED)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("coverage: share of the questions that are answered")
        axes.set_ylabel("risk: share of the answers that are wrong")
        axes.grid(alpha=0.3)

    return _svg(3.2, draw) if curve else ""


def _type_plot(by_type: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(name, part["hit@5"], part["n"]) for name, part in reversed(list(by_type.items())) if part["hit@5"] is not None]

    def draw(axes: Any) -> None:
        axes.barh(range(len(rows)), [value for _, value, _ in rows], color=_BLUE)
        axes.set_yticks(range(len(rows)), [f"{name} ({count})" for name, _, count in rows])
        axes.set_xlim(0, 1)

    return _svg(0.6 + 0.26 * len(rows), draw) if rows else ""


def _rank_plot(questions: Sequence[Mapping[str, Any]]) -> str:
    ranks = [row["rank"] for row in questions if row["measures"]["mrr"][1]]
    if not ranks:
        return ""
    found = [rank for rank in ranks if rank is not None]
    places = list(range(max(found, default=0) + 1))
    counts = [sum(rank == place for rank in found) for place in places]

    def draw(axes: Any) -> None:
        axes.bar([str(place + 1) for place in places], counts, color=_BLUE)
        axes.bar(["none"], [len(ranks) - len(found)], color=_GREY)
        axes.set_xlabel("place among the hits")
        axes.set_ylabel("questions")

    return _svg(2.6, draw)


def _difference_plot(comparison: Comparison) -> str:
    rows = list(reversed(comparison.differences))

    def draw(axes: Any) -> None:
        for at, each in enumerate(rows):
            colour = _GREY if not each.significant else _BLUE if each.b > each.a else _RED
            axes.plot([each.low, each.high], [at, at], color=colour, linewidth=2)
            axes.plot([each.b - each.a], [at], "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [each.name for each in rows])
        axes.grid(axis="x", alpha=0.3)

    return _svg(0.5 + 0.28 * len(rows), draw) if rows else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of {{ run.source }}</title>
<style>
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1a202c; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid #e2e8f0; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
details { border: 1px solid #e2e8f0; border-radius: .4rem; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } mark { background: #fefcbf; } .small { color: #4a5568; font-size: .87em; }
.passage { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #cbd5e0; padding-left: .7rem; margin: .5rem 0; }
.sure { font-weight: 600; }
</style></head><body>
<h1>Evaluation</h1>
<p>{{ run.summary.n }} questions of {{ run.source }}, {{ run.created }}.
Generator {{ run.settings.generator }}, embedder {{ run.settings.embedder }}, knowledge base {{ run.settings.kb }}.</p>
<h2>Figures</h2>
<table><tr><th>figure</th><th>value</th><th>95% interval</th>
{% for language in run.summary.by_language %}<th>{{ language }}</th>{% endfor %}</tr>
{% for name in figures %}
<tr><td>{{ name }}</td><td>{{ show(run.summary[name]) }}</td>
<td>{% if run.summary.intervals[name] %}{{ show(run.summary.intervals[name][0]) }} to {{ show(run.summary.intervals[name][1]) }}{% else %}–{% endif %}</td>
{% for part in run.summary.by_language.values() %}<td>{{ show(part[name]) }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p class="small">Bootstrap over the questions, 2,000 samples. {{ show(run.summary.seconds_per_question) }} s a question,
{{ run.summary.prompt_tokens }} prompt tokens ({{ run.summary.reused_tokens }} reused), {{ run.summary.new_tokens }} new.</p>
{% if comparison %}
<h2>Against the earlier run</h2>
<p>{{ comparison.questions }} questions in both; {{ comparison.better|length }} went better, {{ comparison.worse|length }} worse.
{% if comparison.only_a or comparison.only_b %}Left out: {{ comparison.only_a }} only in a, {{ comparison.only_b }} only in b.{% endif %}</p>
<table><tr><th>figure</th><th>a</th><th>b</th><th>b - a</th><th>95% interval</th><th>p</th><th>p, Holm</th></tr>
{% for each in comparison.differences %}
<tr{% if each.significant %} class="sure"{% endif %}><td>{{ each.name }}</td><td>{{ show(each.a) }}</td><td>{{ show(each.b) }}</td>
<td>{{ '%+.3f' % (each.b - each.a) }}</td><td>{{ '%+.3f' % each.low }} to {{ '%+.3f' % each.high }}</td><td>{{ show(each.p) }}</td><td>{{ show(each.p_holm) }}</td></tr>
{% endfor %}</table>
<p class="small">Paired on the questions: bootstrap interval of the difference, permutation test, corrected for the number of figures (Holm). Bold: below 0.05.</p>
{% endif %}
{% for title, svg in plots %}<h3>{{ title }}</h3>{{ svg }}{% endfor %}
<h2>By type</h2>
<table><tr><th>type</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for type, part in by_type.items() %}
<tr><td>{{ type }}</td>{% for name in columns %}<td>{{ show(part[name]) }}</td>{% endfor %}</tr>
{% endfor %}</table>
<h2>Worst cases</h2>
<p class="small">{% if worst %}Wrong answers given with the most confidence first.{% else %}None.{% endif %}</p>
{% for row in worst %}
<details><summary><b>{{ row.gold.question }}</b> <span class="small">({{ row.id }}, {{ row.type }}) {{ reason(row) or 'worse than in the earlier run' }}</span></summary>
<p>Wanted: {% if row.gold.unanswerable %}a refusal{% else %}{{ row.gold.answers|join(' / ') or row.gold.quote or '' }}
<span class="small">{{ row.gold.path or '' }}{% if row.gold.page %}, page {{ row.gold.page }}{% endif %}</span>{% endif %}</p>
<p>Given ({{ row.kind }}, confidence {{ show(row.confidence) }}): {{ row.answer }}</p>
<p class="small">Right passage: {% if row.rank is none %}not found{% else %}place {{ row.rank + 1 }}{% endif %}</p>
{% for hit in row.hits[:passages] %}
<div class="passage"><span class="small">[{{ loop.index }}] {{ hit.path }}{% if hit.page %}, page {{ hit.page }}{% endif %}, score {{ show(hit.score) }}</span>
{{ mark(hit.text, row.gold) }}</div>
{% endfor %}</details>
{% endfor %}
</body></html>
"""
