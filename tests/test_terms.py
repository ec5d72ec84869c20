from rag.terms import passage_terms, question_terms


def test_english_words_are_stemmed_and_chinese_becomes_bigrams():
    assert passage_terms("Caches were cached") == ["cach", "were", "cach"]
    assert passage_terms("知识库") == ["知识", "识库"]
    assert passage_terms("用GPU算") == ["用", "gpu", "算"]


def test_full_width_and_half_width_meet():
    assert passage_terms("ＫＶ缓存１２") == passage_terms("KV缓存12")


def test_traditional_and_simplified_characters_meet():
    assert passage_terms("記憶體與資料庫") == passage_terms("记忆体与资料库")


def test_words_that_only_ask_are_not_searched_for():
    assert question_terms("What is the size of a page?") == ["size", "page"]
    assert question_terms("什么是缓存？") == ["缓存"]


def test_a_question_word_inside_another_word_does_not_cut_it():
    assert "国人" in question_terms("中国人口是多少？")


def test_a_question_of_stop_words_alone_is_still_searched():
    assert question_terms("what is it?") == ["what", "is", "it"]


def test_each_term_of_a_question_comes_once_in_order():
    assert question_terms("page size and page count") == ["page", "size", "count"]
