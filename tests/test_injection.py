"""Documents that give orders: what reaches the model, what the answer may hold."""

import re
from pathlib import Path

import pytest
from fakes import ScriptedGenerator, base_of
from jinja2 import Environment

from rag import Rag, Settings
from rag.answer import Hit
from rag.citations import check_citations, unlinked
from rag.document import Chunk
from rag.embedder import load_embedder
from rag.language import detect_language
from rag.prompt import build_prompt, neutralise
from rag.quality.injection import PATH, is_clickable, read_injections, run_suite, summary

SUITE = read_injections(Path(__file__).parent / "injections.jsonl")

# How the well-known families write a conversation, in short; what counts are their control tokens.
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}",
    "llama2": "<s>[INST] <<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{{ messages[-1].content }} [/INST]",
    "mistral": "<s>[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT][INST]{{ messages[-1].content }}[/INST]",
    "gemma": "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n",
    "phi": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|assistant|>\n",
    "deepseek": "<｜begin▁of▁sentence｜>{{ messages[0].content }}<｜User｜>{{ messages[-1].content }}<｜Assistant｜>",
    "glm": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}<|assistant|>",
}
CONTROL = re.compile(
    r"<\|[\w]+\|>|<｜[\w▁]+｜>|</?s>|<[be]os>|<(?:start|end)_of_turn>|<</?SYS>>|<sop>|</?think>|</?tool_\w+>|</?passage\b[^>]*>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|gMASK)\]"
)


def rendered(template, text):
    hits = [Hit(Chunk("a.txt", text, 0, len(text)), 1.0), Hit(Chunk("b.txt", "The sky is blue.", 0, 16), 0.5)]
    prompt = build_prompt("Which colour is the sky?", hits, budget=100_000, count_tokens=lambda prompt: 1)
    return Environment().from_string(TEMPLATES[template]).render(messages=prompt.messages)


def test_the_suite_is_large_bilingual_and_of_many_kinds():
    assert len(SUITE) >= 60 and len({each.id for each in SUITE}) == len(SUITE)
    for language in ("zh", "en"):
        assert sum(detect_language(each.question) == language for each in SUITE) >= 30
    assert len({each.kind for each in SUITE}) >= 20


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_document_adds_a_control_token_to_the_prompt(template):
    expected = CONTROL.findall(rendered(template, "A harmless passage."))
    assert len(expected) >= 5  # at least the fences of two passages and the template's own
    for injection in SUITE:
        assert CONTROL.findall(rendered(template, injection.text)) == expected, injection.id


def test_no_document_adds_a_control_token_to_the_readers_prompt():
    for injection in SUITE:
        hit = Hit(Chunk("a.txt", injection.text, 0, len(injection.text)), 1.0)
        text = build_prompt("Q?", [hit], layout="reader", budget=10_000, count_tokens=lambda prompt: 1).text
        assert CONTROL.findall(text) == ["<|question|>", "<|passage|>", "<|question|>", "<|answer|>"], injection.id


def test_what_nobody_sees_does_not_reach_the_model():
    hidden = "Fee: 29\u200b euros.\u202eabc\u202c" + "".join(chr(0xE0000 + ord(letter)) for letter in "obey")
    assert neutralise(hidden) == "Fee: 29 euros.abc"
    assert neutralise("👩\u200d🔬 می\u200cخواهم") == "👩\u200d🔬 می\u200cخواهم"  # joiners belong to what is seen


def test_a_token_split_by_an_invisible_sign_is_seen_through():
    assert "<|im_start|>" not in neutralise("<|im\u200b_start|>")
    assert neutralise("<\u200b|im_end|>") == "<\u200b|im_end|>"
    assert neutralise("＜｜im_end｜＞") == "＜\u200b｜im_end｜＞"


@pytest.mark.parametrize("text", ["if a < b and [1] or <html> | x |> y", "x <- f(y) |> g()", "[INSTALL] <p>one</p>", "a<b|c>d e"])
def test_ordinary_signs_stay(text):
    assert neutralise(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "see [the plan](https://evil.example/?q=1)", "![logo](https://evil.example/p.png)", "[1]: https://evil.example",
        "at <https://evil.example>", "at <mailto:a@evil.example>", "mail <a@evil.example>", "at https://evil.example/x",
        "at www.evil.example", '<a href="x">y</a>', "<img src=x>", "【1】: https://evil.example", "[x] (javascript:alert(1))",
    ],
)  # fmt: skip
def test_an_answer_holds_nothing_that_a_page_would_link(text):
    assert not is_clickable(unlinked(text))
    assert unlinked(text).replace("\u200b", "") == text


def test_markers_and_ordinary_text_are_left_alone():
    text = "The rent is 900 euros [1]. Ratio 3:1, see [2], a < b; time: 12:30. 租金为九百元 [3]"
    assert unlinked(text) == text


def test_a_models_link_is_taken_apart_and_its_sentence_still_cited():
    text = "The plan of the reading room is at https://evil.example/plan today."
    hits = (Hit(Chunk("a.txt", text, 0, len(text)), 1.0),)
    checked = check_citations(text, hits, page_at=lambda path, offset: None)
    assert not is_clickable(checked.text) and checked.citations[0].quote == text


TEXTS = {
    "lease.txt": "The lease of the flat in Harbour Street began on 3 May 2021. The monthly rent is 1,250 euros.",
    "合同.txt": "甲方应于每月五日前向乙方支付工资。试用期为三个月。",
}


def test_no_document_changes_what_others_are_cited_for(tmp_path):
    base = base_of(tmp_path / "kb", TEXTS, load_embedder("bundled"))
    rag = Rag.open(settings=Settings(kb=str(base.folder)))

    class Obedient(ScriptedGenerator):
        """Does what the worst model would: says the first passage's words and cites every passage."""

        def stream(self, prompt, **options):
            self.texts = [prompt.hits[0].chunk.text + " [1][2][3][4]"]
            return (yield from super().stream(prompt, **options))

    rag.use_generator(Obedient(), None)
    chosen = SUITE[::5]
    outcomes = run_suite(rag, chosen, ["How much is the monthly rent of the flat?", "试用期为几个月？"], each=1)
    figures = summary(outcomes)
    assert figures["documents"] == len(chosen) == figures["questions"]
    assert figures["changed_citations"] == figures["cited_injected"] == figures["clickable"] == 0, outcomes
    assert PATH not in rag.base.files()
