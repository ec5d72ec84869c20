"""The bundled reader's tokenizer: byte-level BPE whose tokens an answer can be copied by.

An answer is a run of a passage's tokens, so it has to begin and end on token borders: Han
characters and punctuation marks each stand alone, digits in groups of at most four (a year is one
token), Latin words keep the space before them. A later answer therefore starts with a space when
its first word does in the passage; whoever shows it strips it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rag.prompt import READER_TOKENS

CONTEXT_LENGTH = 4096

_HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_PIECES = (
    r"'(?i:[sdmt]|ll|ve|re)(?!\p{L})"  # English contractions
    r"| ?\p{L}+| ?\p{N}{1,4}"  # words, numbers
    r"| ?[^\s\p{L}\p{N}]"  # one punctuation mark at a time
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A prompt already holds its special tokens, so the template only hands the content through.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) of `vocab_size` tokens.

    The reader's special tokens have the lowest ids, in the order of READER_TOKENS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_HAN), "isolated"),
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in READER_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it: end, padding and chat template named."""
    make: Any = PreTrainedTokenizerFast  # untyped in transformers
    wrapped: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=[t for t in READER_TOKENS if t not in ("<|end|>", "<|pad|>")],
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`."""
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder))
    return loaded
