from rag.term_weights import background, term_weights


def test_a_common_word_weighs_little_even_in_a_base_of_three_passages():
    weights = term_weights(["the", "mitochondria"], {"the": 1, "mitochondria": 1}, 3)
    assert weights["the"] < 0.2 * weights["mitochondria"]


def test_a_word_that_is_everywhere_in_the_base_weighs_less_than_elsewhere():
    everywhere = term_weights(["contract"], {"contract": 5000}, 5000)["contract"]
    assert everywhere < 0.1 < 2 < term_weights(["contract"], {"contract": 5}, 5000)["contract"]


def test_the_seam_between_two_chinese_words_weighs_less_than_a_word():
    # 贷款合同: 贷款 and 合同 are words, 款合 is where they meet.
    weights = term_weights(["贷款", "款合", "合同"], {}, 0)
    assert weights["款合"] < 0.5 * min(weights["贷款"], weights["合同"])


def test_a_new_word_of_the_field_counts_in_full():
    alien = "显存"
    assert background().cohesion(alien) is None
    assert term_weights([alien], {alien: 20}, 300)[alien] > 1.5 * term_weights([alien], {}, 300)[alien]
