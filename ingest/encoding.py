"""Bytes -> text: UTF-8, UTF-16, UTF-32, GB18030, Big5, Shift-JIS, Latin-1 and what else there is.

UTF-8 and byte-order marks are certain. Old Chinese and Japanese encodings accept one another's
bytes, so they are told apart by how common the characters are that they would mean: GB 2312 and
Big5 both put the few thousand everyday characters into one range of lead bytes, and Japanese text
has kana. What is left goes to charset-normalizer.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE = 200_000  # bytes looked at when guessing
_MIN_PLAUSIBLE = 0.75
# The commonest characters of running Chinese text, simplified and traditional.
_COMMON = frozenset(
    "的一是不了在人有我他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可"
    "里后小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已"
    "老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向情部正名定女问"
    "這來國個說們為時會過學對裡後還發見經頭長樣現將與進實點種聲話問開動兩從無當麼沒應該請單據"
)
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u30fc]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_WESTERN = re.compile(
    r"(?<![^\x00-\x7f])(?:[àâäáãåæçéèêëíìîïñóòôöõøúùûüýÿßœžšð]|[ÀÂÄÁÃÅÆÇÉÈÊËÍÎÏÑÓÔÖÕØÚÙÛÜ](?=[a-zA-Z' ])"
    r"|[“”‘’–—…«»°§©®€£º¿¡](?=[\sA-Za-z0-9.,]|$))"
)
_HANGUL = re.compile(r"[\uac00-\ud7a3]")
_HANGUL_WORDS = re.compile(r"[\uac00-\ud7a3] [\uac00-\ud7a3]")
_HAN = re.compile(r"[\u4e00-\u9fff]")
# Encodings that write everything in bytes of ASCII, which UTF-8 would accept as they are.
_SHIFTED = re.compile(r"(?:csiso2022|iso[-_]?2022|hz\b|hz[-_]gb|utf[-_]?7\b)", re.IGNORECASE)
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]")


@dataclass(frozen=True, slots=True)
class DecodedText:
    """A file's text and the encoding it was read as. `is_certain` is False where it was guessed."""

    text: str
    encoding: str
    is_certain: bool


def decode_text(data: bytes, *, declared: str | None = None) -> DecodedText:
    """Decode a file's bytes. `declared` is what the file itself says (an HTML meta tag).

    Never fails: bytes that mean nothing in the chosen encoding become U+FFFD, which the caller
    can count and report.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return DecodedText(data.decode(encoding, "replace").removeprefix("\ufeff"), encoding, True)
    if (wide := _wide_encoding(data)) is not None:
        return DecodedText(data.decode(wide, "replace"), wide, False)
    if declared and _SHIFTED.match(declared) and (text := _decode_strictly(data, declared)) is not None:
        return DecodedText(text, declared.lower(), True)
    try:
        return DecodedText(data.decode("utf-8"), "utf-8", True)
    except UnicodeDecodeError as error:
        # One torn character at the end (a truncated file) does not make it another encoding.
        if error.start >= len(data) - 3 and error.start > 16:
            return DecodedText(data.decode("utf-8", "replace"), "utf-8", False)
    if declared and (text := _decode_strictly(data, declared)) is not None:
        return DecodedText(text, declared.lower(), True)
    if _utf8_share(data) > 0.9:
        return DecodedText(data.decode("utf-8", "replace"), "utf-8", False)
    encoding = _guess(data[:_SAMPLE])
    return DecodedText(data.decode(encoding, "replace"), encoding, False)


def is_binary(data: bytes) -> bool:
    """Whether the first bytes of a file are those of no text."""
    head = data[:8192]
    if any(head.startswith(mark) for mark, _ in _BYTE_ORDER_MARKS) or _wide_encoding(head):
        return False
    control = len(head) - len(head.translate(None, _CONTROL_BYTES))
    return b"\0" in head or control > len(head) // 50


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 without a mark: every other byte of ASCII is zero, Chinese has its lead bytes in a row."""
    head = data[:4096]
    half = len(head) // 2
    if half < 4:
        return None
    for encoding, high in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        zeros = high.count(0)
        low = head[0::2] if encoding == "utf-16-le" else head[1::2]
        if zeros > 0.4 * half and low.count(0) < 0.05 * half:
            return encoding
    return None


def _decode_strictly(data: bytes, encoding: str) -> str | None:
    if encoding.lower().replace("-", "").replace("_", "") in ("gb2312", "gbk"):
        encoding = "gb18030"  # its superset, and what pages that say gb2312 often hold
    try:
        return data.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return None


def _utf8_share(data: bytes) -> float:
    """Of the characters beyond ASCII, the share that is well-formed UTF-8."""
    text = data[:_SAMPLE].decode("utf-8", "replace")
    bad = text.count("\ufffd")
    good = sum(character > "\x7f" for character in text) - bad
    return good / max(1, good + bad)


# What charset-normalizer may answer: the encodings that files on people's disks are in.
_LIKELY = [
    "gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1250", "cp1251", "cp1252", "cp1253",
    "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "koi8_r", "cp874", "cp437", "cp850", "mac_roman",
]


def _guess(sample: bytes) -> str:
    western = _decode_sample(sample, "cp1252")
    if western is not None and _is_western(western):
        return "cp1252"
    scores = {
        encoding: _plausibility(text)
        for encoding in ("gb18030", "big5hkscs", "cp932")
        if (text := _decode_sample(sample, encoding)) is not None
    }
    korean = _decode_sample(sample, "cp949")
    if korean is not None and _is_korean(korean):
        return "cp949"
    if scores and max(scores.values()) >= _MIN_PLAUSIBLE:
        return max(scores, key=lambda encoding: scores[encoding])
    from charset_normalizer import from_bytes

    match = from_bytes(sample, cp_isolation=_LIKELY).best()
    found = match.encoding if match is not None else "cp1252"
    if found in scores:
        return max(scores, key=lambda encoding: scores[encoding])
    return found


def _is_korean(text: str) -> bool:
    """Nearly all of it Hangul, in words: Chinese read as Korean has neither."""
    hangul = len(_HANGUL.findall(text))
    han = len(_HAN.findall(text))
    return hangul >= 4 and hangul >= 0.95 * (hangul + han) and bool(_HANGUL_WORDS.search(text))


def _decode_sample(sample: bytes, encoding: str) -> str | None:
    """The sample decoded, its last torn character left off; None where it is not this encoding."""
    for cut in range(4):
        try:
            return sample[: len(sample) - cut].decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def _is_western(text: str) -> bool:
    """Whether the characters beyond ASCII are those of Western words, and stand between letters."""
    beyond = _BEYOND_ASCII.findall(text)
    usual = len(_WESTERN.findall(text))
    return bool(beyond) and usual >= 0.8 * sum(map(len, beyond))


def _plausibility(text: str) -> float:
    """Between 0 and 1: how far the characters beyond ASCII are everyday ones of one language."""
    beyond = [character for character in text if character > "\x7f"]
    if not beyond or _CONTROL.search(text):
        return 0.0
    kana = sum(bool(_KANA.match(character)) for character in beyond)
    good = 0.0
    for character in beyond:
        if character in _COMMON:
            good += 1.25
        elif _is_everyday(character):
            good += 1.0
        elif _KANA.match(character) and kana > 0.15 * len(beyond):
            good += 1.3
    return min(1.0, good / len(beyond)) + 0.2 * (good / len(beyond) - 1 if good > len(beyond) else 0)


def _is_everyday(character: str) -> bool:
    """In the first level of GB 2312 or of Big5, or punctuation of East Asian text."""
    if character in "，。、；：？！“”‘’（）《》【】—…·　「」『』〈〉～％＋－＝０１２３４５６７８９":
        return True
    if not _HAN.match(character):
        return False
    for encoding, low, high in (("gb2312", 0xB0, 0xD7), ("big5", 0xA4, 0xC6)):
        try:
            coded = character.encode(encoding)
        except UnicodeEncodeError:
            continue
        if len(coded) == 2 and low <= coded[0] <= high:
            return True
    return False
