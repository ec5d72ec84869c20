"""Tiny random causal LMs with a real tokenizer, made in a temporary folder. No download.

`make_model(folder, "llama" | "qwen2" | "qwen3" | ...)` writes config, safetensors, tokenizer and
chat template, as a folder that a user would point the generator at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# Matrices this small only lose by being spread over threads.
torch.set_num_threads(1)

FAMILIES = ("llama", "qwen2", "qwen3")

CORPUS = (
    "The cat sat on the mat and the dog lay by the door of the old house.",
    "A key value cache keeps what attention has already computed for earlier tokens.",
    "Where is the answer written? The answer is in the second passage of the document.",
    "猫坐在垫子上，狗躺在老房子的门边。注意力机制让模型看到前面的词。",
    "键值缓存保存已经算过的键和值。答案写在文档的第二段里。",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL_TOKENS = (
    "<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>",
    "<|question|>", "<|passage|>", "<|answer|>", "<|blocks|>",
)  # fmt: skip


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 400 tokens: an emoji or a rare character takes several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    if chat_template is not None:
        wrapped.chat_template = chat_template
    return wrapped


def make_config(family: str, **changes: Any) -> Any:
    """4 query heads over 2 key heads, 3 layers, context 512; `changes` override config fields."""
    values: dict[str, Any] = {
        "vocab_size": 408,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family == "qwen3",
        "initializer_range": 0.35,  # sharp enough that greedy choices are not near ties
        "bos_token_id": None,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    values.update(changes)
    return AutoConfig.for_model(family, **values)


def make_random_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model in memory, float32, evaluation mode."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(family, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # initialised to zero, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model.float().eval()


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    **changes: Any,
) -> Path:
    """Write a whole model folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_random_model(family, seed=seed, **changes)
    model.generation_config.eos_token_id = 3
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    make_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder
