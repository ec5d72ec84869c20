"""The page "Look inside": tokens, attention, next-token probabilities, cache, parameters, positions."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from app import session
from app.inside import (
    Architecture,
    Inspection,
    Inspector,
    probabilities,
    weight_bytes,
)
from app.markup import escape, notice_html, overlap_html, share_bars_html, size_text
from app.session import say
from app.texts import number
from rag.errors import RagError
from rag.generator import Generator, find_model
from rag.prompt import Prompt, build_prompt
from rag.settings import Settings

_ASK_FIRST = 3 * 2**30  # bytes of weights from which a second copy is not loaded unasked
_SHOWN_CANDIDATES = 15
_MODULES_ZH = {
    "embedding": "词嵌入", "output": "输出层", "query": "查询", "key": "键", "value": "值",
    "attention output": "注意力输出", "query, key, value": "查询、键、值", "feed-forward": "前馈层",
    "norms": "归一化", "other": "其他",
}
_COLOURS = ("#3f9583", "#c08a3a", "#7a93b5", "#b5597a", "#8f74c9", "#6fa350", "#9a958c")
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Look:
    """What the last run of the page found."""

    question: str
    question_tokens: list[tuple[int, str]]
    prompt: str
    files: tuple[str, ...]  # of the passages, in their order
    inspection: Inspection


def show() -> None:
    settings = session.settings()
    st.html(f'<h1 class="lr-title">{say("inside")}</h1><p class="lr-muted">{say("inside_note")}</p>')
    turns = session.conversation().turns
    asked = turns[-1].question if turns else ""
    with st.form("inside", border=False):
        question = st.text_input(
            say("inside_question"), asked, placeholder=say("ask_placeholder"), max_chars=2000,
            label_visibility="collapsed",
        )
        is_sent = st.form_submit_button(say("inside_run"), type="primary")
    try:
        size = weight_bytes(find_model(settings.generator))
        if size > _ASK_FIRST and not st.checkbox(say("inside_large", size=size_text(size))):
            return
        if is_sent and question.strip():
            with st.spinner(say("loading")):
                inspector = session.inspector(settings.generator)
                st.session_state["look"] = _look(question.strip(), settings, inspector)
        look: _Look | None = st.session_state.get("look")
        if look is not None:
            _show_tokens(look)
            _show_written(look)
            _show_attention(look)
            _show_next_token(look.inspection, session.inspector(settings.generator))
            _show_shared(look, settings, session.inspector(settings.generator).architecture)
        if look is not None or size <= _ASK_FIRST:
            with st.spinner(say("loading")):
                inspector = session.inspector(settings.generator)
            _show_cache(inspector.architecture)
            _show_parameters(inspector.parameters())
            _show_weights(inspector)
            _show_rope(inspector.architecture)
    except RagError as error:
        st.html(notice_html(say("failed"), str(error)))


def _prompt(question: str, settings: Settings) -> tuple[Generator, Prompt] | None:
    """Search and build the prompt as an answer would get it; None where nothing is found."""
    rag = session.model_store().rag(settings)
    hits = rag.retrieve(question)
    if not hits:
        st.html(notice_html(say("inside"), say("inside_nothing"), kind="info"))
        return None
    generator = rag.generator
    prompt = build_prompt(
        question, hits, layout="reader" if generator.layout == "reader" else "chat",
        budget=min(settings.max_prompt_tokens, generator.context_length - settings.max_new_tokens),
        count_tokens=generator.count_tokens,
    )
    return generator, prompt


def _look(question: str, settings: Settings, inspector: Inspector) -> _Look | None:
    """Read the prompt with the second copy of the model."""
    found = _prompt(question, settings)
    if found is None:
        return None
    generator, prompt = found
    with _ONE_AT_A_TIME:
        inspection = inspector.inspect(
            generator.encode(prompt), prompt, stop_ids=generator.stop_ids
        )
    files = tuple(hit.chunk.path for hit in prompt.hits)
    return _Look(
        question, inspector.tokenize(question), generator.prompt_text(prompt), files, inspection
    )


def _heading(key: str, note: str) -> None:
    st.html(f'<div class="lr-section"><h2>{say(key)}</h2><p>{escape(note)}</p></div>')


def _token_boxes(tokens: list[tuple[int, str]]) -> str:
    boxes = "".join(
        f'<span class="lr-token">{escape(_visible(token))}<small>{id_}</small></span>'
        for id_, token in tokens
    )
    return f'<div class="lr-tokens">{boxes}</div>'


def _visible(token: str) -> str:
    """A token with its white space to be seen."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"


def _show_tokens(look: _Look) -> None:
    _heading("tokens", say("tokens_note"))
    st.html(_token_boxes(look.question_tokens))


def _show_written(look: _Look) -> None:
    found = look.inspection
    with st.expander(say("exact_prompt")):
        st.code(look.prompt, language=None, wrap_lines=True)
    note = say("inside_written_note", prompt=number(len(found.prompt_ids)), new=number(len(found.steps)))
    _heading("inside_written", note)
    st.html(_token_boxes([(step.token_id, step.token) for step in found.steps]))


def _part_name(part: int, inspection: Inspection) -> str:
    if part == 0:
        return say("part_rest")
    if part <= inspection.num_passages:
        return say("part_passage", number=part)
    return say("part_written")


def _shades() -> list[str]:
    """From nearly the background to the accent, so that more stands out more in both schemes."""
    is_dark = st.context.theme.type == "dark"
    return ["#202827", "#3d7a6d", "#8fdcc9"] if is_dark else ["#f0f5f3", "#74b3a4", "#1f5549"]


def _show_attention(look: _Look) -> None:
    inspection = look.inspection
    _heading("attention", say("attention_note"))
    num_layers, num_heads = inspection.steps[0].attention.shape[:2]
    average = say("average")
    left, right = st.columns(2)
    layer = left.select_slider(say("layer"), [average, *range(1, num_layers + 1)], key="inside-layer")
    head = right.select_slider(say("head"), [average, *range(1, num_heads + 1)], key="inside-head")
    shares = inspection.attention(
        None if layer == average else int(layer) - 1, None if head == average else int(head) - 1
    )
    rows = [
        {
            "step": f"{n + 1:02} {_visible(step.token)}", "part": _part_name(part, inspection),
            "order": part, "share": float(shares[n, part]),
        }
        for n, step in enumerate(inspection.steps)
        for part in range(inspection.num_parts)
    ]
    names = [_part_name(part, inspection) for part in range(inspection.num_parts)]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_rect(cornerRadius=2)
        .encode(
            x=alt.X(
                "part:N", sort=names, title=None,
                axis=alt.Axis(labelAngle=0, orient="top", labelOverlap=False, labelLimit=90),
            ),
            y=alt.Y("step:N", sort=None, title=None, axis=alt.Axis(labelOverlap=False)),
            color=alt.Color("share:Q", scale=alt.Scale(range=_shades()), title=say("share")),
            tooltip=[
                alt.Tooltip("step:N", title=say("token")), alt.Tooltip("part:N", title=say("part")),
                alt.Tooltip("share:Q", title=say("share"), format=".1%"),
            ],
        )
        .properties(height=22 * len(inspection.steps) + 60)
    )
    st.altair_chart(chart, width="stretch")
    by_passage = shares[:, 1 : inspection.num_passages + 1].sum(axis=0)
    if by_passage.sum() > 0:
        best = int(by_passage.argmax())
        by_passage = by_passage / by_passage.sum()
        st.html(f'<p class="lr-note">{say("leaned_on", passage=best + 1, share=f"{by_passage[best]:.0%}")}</p>')
        bars = [
            (f"[{n}] {file}", float(share)) for n, (file, share) in enumerate(zip(look.files, by_passage), 1)
        ]
        st.html(share_bars_html(bars))


def _show_next_token(inspection: Inspection, inspector: Inspector) -> None:
    _heading("next_token", say("next_token_note"))
    columns = st.columns(4)
    step = 1
    if len(inspection.steps) > 1:
        step = columns[0].slider(say("step"), 1, len(inspection.steps), 1, key="inside-step")
    temperature = columns[1].slider(say("temperature_short"), 0.0, 2.0, 1.0, step=0.1, key="inside-temperature")
    top_k = columns[2].slider("Top-k", 0, 50, 0, key="inside-top-k")
    top_p = columns[3].slider(say("top_p"), 0.05, 1.0, 1.0, step=0.05, key="inside-top-p")
    chosen = inspection.steps[step - 1]
    found = probabilities(chosen.candidates, temperature=temperature, top_k=top_k, top_p=top_p)
    rows = [
        {
            "token": f"{_visible(inspector.token_text(id_))}  ({id_})", "probability": probability,
            "state": say("can_be_drawn") if can_be_drawn else say("cut_off"),
        }
        for id_, probability, can_be_drawn in found[:_SHOWN_CANDIDATES]
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(cornerRadius=3)
        .encode(
            x=alt.X("probability:Q", title=say("probability"), axis=alt.Axis(format="%")),
            y=alt.Y("token:N", sort=None, title=None, axis=alt.Axis(labelOverlap=False, labelLimit=160)),
            color=alt.Color(
                "state:N", title=None, legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=[say("can_be_drawn"), say("cut_off")], range=["#3f9583", "#b9b2a7"]),
            ),
            tooltip=["token:N", alt.Tooltip("probability:Q", format=".2%", title=say("probability"))],
        )
        .properties(height=24 * len(rows) + 90)
    )
    st.altair_chart(chart, width="stretch")


def _show_shared(look: _Look, settings: Settings, architecture: Architecture) -> None:
    """How far the prompts of two questions are the same, so that the cache serves both."""
    _heading("shared", say("shared_note"))
    second = st.text_input(
        say("shared_question"), placeholder=say("shared_question"), key="inside-second",
        label_visibility="collapsed", max_chars=2000,
    )
    if not second.strip():
        return
    found = _prompt(second.strip(), settings)
    if found is None:
        return
    generator, prompt = found
    first, other = look.inspection.prompt_ids, generator.encode(prompt)
    num_shared = next(
        (n for n, (a, b) in enumerate(zip(first, other)) if a != b), min(len(first), len(other))
    )
    bars = [
        (f"{question[:28]} ({number(len(ids))})", num_shared / max(len(first), len(other)),
         len(ids) / max(len(first), len(other)))
        for question, ids in ((look.question, first), (second.strip(), other))
    ]
    st.html(overlap_html(bars))
    saved = size_text(architecture.cache_bytes(num_shared))
    line = say("shared_found", count=number(num_shared), total=number(len(other)), saved=saved)
    st.html(f'<p class="lr-note">{escape(line)}</p>')


def _show_cache(architecture: Architecture) -> None:
    _heading(
        "cache",
        say(
            "cache_note", each=size_text(architecture.cache_bytes(1)), layers=architecture.num_layers,
            kv_heads=architecture.num_kv_heads, dim=architecture.head_dim,
        ),
    )
    kinds = {
        say("this_model"): architecture.num_kv_heads, "MHA": architecture.num_heads, "MQA": 1,
    }
    rows = [
        {"tokens": tokens, "kind": name, "megabytes": architecture.cache_bytes(tokens, num_kv_heads=heads) / 2**20}
        for name, heads in kinds.items()
        for tokens in range(0, 8193, 512)
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(strokeWidth=2.5)
        .encode(
            x=alt.X("tokens:Q", title=say("tokens_axis")),
            y=alt.Y("megabytes:Q", title="MB"),
            color=alt.Color(
                "kind:N", title=None, sort=list(kinds), legend=alt.Legend(orient="top"),
                scale=alt.Scale(domain=list(kinds), range=["#3f9583", "#c08a3a", "#7a93b5"]),
            ),
            strokeDash=alt.StrokeDash("kind:N", legend=None, sort=list(kinds)),
            tooltip=["kind:N", "tokens:Q", alt.Tooltip("megabytes:Q", format=",.1f")],
        )
        .properties(height=240)
    )
    st.altair_chart(chart, width="stretch")


def _show_parameters(counts: dict[str, int]) -> None:
    _heading("parameters", say("parameters_note", total=number(sum(counts.values()))))
    is_chinese = session.language() == "zh"
    rows = [
        {"module": _MODULES_ZH.get(kind, kind) if is_chinese else kind, "count": count}
        for kind, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar(cornerRadius=3, color="#3f9583")
        .encode(
            x=alt.X("count:Q", title=None, axis=alt.Axis(format="~s")),
            y=alt.Y("module:N", sort=None, title=None),
            tooltip=["module:N", alt.Tooltip("count:Q", format=",")],
        )
        .properties(height=26 * len(rows) + 20)
    )
    st.altair_chart(chart, width="stretch")


def _show_weights(inspector: Inspector) -> None:
    """How the numbers of each kind of module are spread."""
    _heading("weights", say("weights_note"))
    is_chinese = session.language() == "zh"
    middles, spread = inspector.weight_histograms()
    rows = [
        {"module": _MODULES_ZH.get(kind, kind) if is_chinese else kind, "value": float(middle),
         "density": float(density)}
        for kind, densities in spread.items()
        for middle, density in zip(middles, densities)
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(strokeWidth=2, interpolate="monotone")
        .encode(
            x=alt.X("value:Q", title=say("weight_value")),
            y=alt.Y("density:Q", title=None, axis=alt.Axis(format=".0%")),
            color=alt.Color(
                "module:N", title=None, sort=None, legend=alt.Legend(orient="top", columns=4),
                scale=alt.Scale(range=list(_COLOURS)),
            ),
            tooltip=["module:N", alt.Tooltip("value:Q", format=".3f"), alt.Tooltip("density:Q", format=".1%")],
        )
        .properties(height=260)
    )
    st.altair_chart(chart, width="stretch")


def _show_rope(architecture: Architecture) -> None:
    if architecture.rope_theta is None:
        _heading("rope", say("rope_missing"))
        return
    _heading("rope", say("rope_note", theta=number(architecture.rope_theta)))
    positions = list(range(0, 256, 4))
    cosines = architecture.rope_cosines(positions)
    pairs = range(0, cosines.shape[1], max(1, cosines.shape[1] // 32))
    rows: list[dict[str, Any]] = [
        {"position": position, "pair": pair, "cosine": round(float(cosines[n, pair]), 3)}
        for n, position in enumerate(positions)
        for pair in pairs
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_rect()
        .encode(
            x=alt.X("position:O", title=say("position"), axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("pair:O", title=say("dimension"), axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("cosine:Q", title="cos", scale=alt.Scale(scheme="blueorange", domain=[-1, 1])),
            tooltip=["position:O", "pair:O", "cosine:Q"],
        )
        .properties(height=300)
    )
    st.altair_chart(chart, width="stretch")
