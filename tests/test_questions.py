import json

import pytest
from fakes import base_of

from rag.document import Document, Heading, Page
from rag.errors import InputError
from rag.quality.evaluation import EvalQuestion
from rag.quality.question_templates import drafts
from rag.quality.questions import make_questions, questions_of


def asked(sentence, **keywords):
    return {draft.question: sentence[draft.start : draft.end] for draft in drafts(sentence, **keywords)}


@pytest.mark.parametrize(
    ("sentence", "question", "answer"),
    [
        ("静态嵌入是一种不经过注意力的句向量。", "静态嵌入是什么？", "一种不经过注意力的句向量"),
        ("租赁期限不得超过二十年。", "租赁期限不得超过几年？", "二十年"),
        ("每层注意力共有 32 个查询头，参数更多。", "每层注意力共有多少个查询头？", "32 个"),
        ("民法典自 2021 年 1 月 1 日起施行。", "民法典自哪一天起施行？", "2021 年 1 月 1 日"),
        ("第六十二条 法定代表人造成他人损害的，由法人承担责任。", "法定代表人造成他人损害的，由谁承担责任？", "法人"),
        ("查询不必缓存，因为每个位置的查询只用一次。", "为什么查询不必缓存？", "每个位置的查询只用一次"),
        ("服务器的端口号取决于配置文件。", "服务器的端口号取决于什么？", "配置文件"),
        ("The monthly rent is 1,250 euros.", "What is the monthly rent?", "1,250 euros"),
        ("A gated block has three matrices.", "How many matrices does a gated block have?", "three matrices"),
        ("Cropping is safe because no entry depends on a later one.", "Why is cropping safe?", "no entry depends on a later one"),
        ("The old bridge was rebuilt after the flood in 1954.", "When was the old bridge rebuilt after the flood?", "in 1954"),
        ("RMSNorm stands for root mean square normalisation.", "What does RMSNorm stand for?", "root mean square normalisation"),
        ("- An encoder layer consists of two sublayers.", "What does an encoder layer consist of?", "two sublayers"),
    ],
)  # fmt: skip
def test_a_sentence_is_turned_into_the_question_it_answers(sentence, question, answer):
    assert asked(sentence)[question] == answer


@pytest.mark.parametrize(
    "sentence",
    [
        "本合同自 2021 年 1 月 1 日起施行。",  # which one?
        "它是一种很常见的方法，用在各处。",  # it
        "但是结果是不一样的，要看情况。",
        "第一百七十六条是关于担保的规定。",  # no number of an article
        "如果显存只有 8 GB，就要量化模型。",  # a condition is no statement
        "万一失败了，一个一个地重试。",  # no figures
        "主管机关可以指定有关人员组成清算组。",  # 指定, not 指
        "It is a large dog that barks.",
        "This means that the cache is full.",
        "Say the expected answer is \"the KV cache\".",
        "There are three matrices in it.",
        "The way is to wait for the server.",  # which way?
        "| Name | The price is 3 euros. |",
        "See the table below, the price is 30 euros.",
        "Overview of the second part",  # a heading
    ],
)
def test_a_sentence_that_says_too_little_by_itself_gives_none(sentence):
    assert asked(sentence) == {}


def test_a_heading_stands_for_the_pronoun_that_follows_it():
    assert asked("It is a bilingual encoder of two layers.", heading="Twinbert") == {
        "What is Twinbert?": "a bilingual encoder of two layers"
    }
    text = "孪生编码\n\n它是一种双塔结构的模型。\n\n它是一种别的什么东西。"
    document = Document("a.md", text, "md", headings=(Heading(1, "孪生编码", 0),))
    (made,) = questions_of(document)  # only directly below the heading
    assert (made.question, made.answer) == ("孪生编码是什么？", "一种双塔结构的模型")


def test_names_keep_their_capital_and_other_words_lose_it():
    assert "What is cropping?" in asked("Cropping is a way to shorten it.")
    assert "What is Berlin?" in asked("Berlin is a large city on the Spree.", names={"Berlin"})
    assert "How many layers does Llama 2 have?" in asked("Llama 2 has 32 layers.")


TEXT_EN = "The monthly rent is 1,250 euros. A gated block has three matrices. The Kelvin bridge was rebuilt in 1954."
TEXT_ZH = "租赁期限不得超过二十年。静态嵌入是一种不经过注意力的句向量。Qwen3 模型的词表共有 151936 项。"


def test_every_question_keeps_the_place_it_came_from():
    document = Document("b.pdf", TEXT_EN, "pdf", pages=(Page(1, 0, 33), Page(2, 33, len(TEXT_EN))))
    made = list(questions_of(document))
    assert [each.page for each in made] == [1, 2, 2]
    for each in made:
        assert document.text[each.start : each.end] == each.quote
        assert each.answer in each.quote and each.path == "b.pdf"
        assert EvalQuestion.parse(each.to_dict(1), 1).quote == each.quote


def test_a_question_that_two_sentences_answer_is_left_out(tmp_path):
    base = base_of(tmp_path / "kb", {"a.txt": TEXT_EN, "b.txt": "The monthly rent is 900 euros.", "zh.txt": TEXT_ZH})
    found = [each.question for each in make_questions(base, count=50, unanswerable=0)]
    assert "What is the monthly rent?" not in found and "租赁期限不得超过几年？" in found


def test_questions_without_an_answer_name_what_stands_nowhere(tmp_path):
    base = base_of(tmp_path / "kb", {"en.txt": TEXT_EN, "zh.txt": TEXT_ZH + "青穗是一个人名。"})
    made = make_questions(base, count=8, unanswerable=0.5)
    without = [each for each in made if each.unanswerable]
    assert without and len(made) <= 8
    for each in without:
        assert each.swapped not in each.question and each.answer == ""
        assert "青穗" not in each.question  # that one the documents do hold
        row = json.loads(json.dumps(each.to_dict(3)))
        assert row["unanswerable"] is True and "path" not in row and EvalQuestion.parse(row, 1).type


def test_the_same_seed_makes_the_same_questions_and_files_take_turns(tmp_path):
    base = base_of(tmp_path / "kb", {"en.txt": TEXT_EN, "zh.txt": TEXT_ZH})
    assert make_questions(base, seed=3) == make_questions(base, seed=3)
    assert {each.path for each in make_questions(base, count=2, unanswerable=0)} == {"en.txt", "zh.txt"}


def test_numbers_and_documents_that_give_nothing_are_told(tmp_path):
    base = base_of(tmp_path / "kb", {"a.txt": "Hello there, good to see you."})
    with pytest.raises(InputError, match="no sentence of the 1 documents fits"):
        make_questions(base)
    with pytest.raises(InputError, match="count must be at least 1"):
        make_questions(base, count=0)
