"""Prompt in, text out: a causal LM with its tokenizer and chat template, on this machine.

Finds the model, checks that it fits, loads it, writes prompts as the model was taught to read
them, and turns the engine's tokens back into text. How tokens are computed is the engine's part.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_left
from collections.abc import Collection, Sequence
from collections.abc import Generator as PyGenerator
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rag.adapter import check_base, merge_adapter
from rag.engine.interface import Engine, FinishEvent, Request, Sampling, TokenEvent
from rag.errors import GeneratorError
from rag.language import detect_language
from rag.prompt import Message, Prompt, neutralise, passage_text
from rag.settings import Settings
from rag.stopping import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rag.engine.placement import MemoryPlan

BUNDLED_READER = Path(__file__).parent / "bundled" / "reader"

Layout = Literal["reader", "chat", "plain"]

# Ends of a turn in the chat formats at large; some models list only their end of text as eos.
_TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>",
    "<|endoftext|>", "<|turn_end|>", "<turn|>",
)  # fmt: skip
_READER_END = "<|end|>"
_BLOCK_TOKENS = ("<|blocks|>", "<|passage|>", "<|question|>")
_ELSEWHERE = "openai:"
_PLAIN_STOPS = ("\nQuestion:", "\n问题：")

# A fast tokenizer changes its own settings while it encodes, and fails with "Already borrowed" where
# another thread is in it.
_TOKENIZING = threading.Lock()

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "merges.txt"]
# Second copies of the weights in other layouts, gigabytes each.
_HUB_LEFT_OUT = ["consolidated*", "*/*.safetensors", "original/*", "onnx/*"]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One finished generation. `text` is all that was streamed, stop strings cut off.

    `token_logprobs` are natural logs, one for each of `token_ids`, before temperature and filters.
    `top_logprobs` has, for each of them, the most probable tokens of its place with theirs, highest
    first; empty where none were asked for.
    `tokens_per_second` counts from the first token on; 0.0 where there were fewer than two.
    From a generator elsewhere there are no `token_ids`, log-probabilities only where it gives them,
    and with `counts_estimated` the numbers of tokens are reckoned from the text.
    """

    text: str
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    tokens_per_second: float
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    counts_estimated: bool = False


class TextStream:
    """Token ids to text, piece by piece, as soon as and no sooner than the text is certain.

    A character spread over several tokens is held until it is whole, and what could be the
    beginning of a stop string until it is not. An unfinished character at the very end is dropped.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stop_strings if stop)
        self._ids: list[int] = []
        self._prefix = 0  # decoding starts here, so that what a token's neighbour does to it shows
        self._read = 0  # tokens before here have been turned into text
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that has become certain with this token; often empty, and so after a stop."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """What is still held at the end of the tokens."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        rest = after[len(before) :].rstrip("\ufffd")
        piece = self._release(rest)
        if not self.stopped:
            piece += self._held
            self.text += self._held
            self._held = ""
        return piece

    def _decode(self, ids: list[int]) -> str:
        with _TOKENIZING:
            text = self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        assert isinstance(text, str)
        return text

    def _release(self, new: str) -> str:
        pending = self._held + new
        found = [at for at in (pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            piece, self._held, self.stopped = pending[: min(found)], "", True
        else:
            keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
            piece, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class PromptFormat:
    """Writes a Prompt as the token ids that one model was taught to read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_reader: bool) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self.layout: Layout = "reader" if is_reader else "chat" if template else "plain"
        self._block_ids: tuple[int, int, int] | None = None
        known = tokenizer.get_added_vocab()
        if is_reader and all(token in known for token in _BLOCK_TOKENS):
            blocks, passage, question = (known[token] for token in _BLOCK_TOKENS)
            self._block_ids = (blocks, passage, question)
        # Only passed where the template knows it: a variable it does not read changes nothing,
        # but some templates fail on what they do not expect.
        source = template if isinstance(template, str) else json.dumps(template)
        self._template_arguments: dict[str, Any] = {}
        if "enable_thinking" in source:
            self._template_arguments["enable_thinking"] = False
        self.merges_system = self.layout == "chat" and not self._keeps_system()

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The token ids of a prompt, special tokens included, ready to be continued."""
        text, add_special_tokens = self._written(prompt)
        return self._ids(text, add_special_tokens=add_special_tokens)

    def passages(self, prompt: Prompt) -> tuple[tuple[int, int], ...]:
        """[start, end) of the tokens that lie wholly inside each of the prompt's passages, and
        neither first nor last there: those may have merged with what stands beside them."""
        text, add_special_tokens = self._written(prompt)
        with _TOKENIZING:
            encoding = self._tokenizer(
                text,
                add_special_tokens=add_special_tokens,
                return_offsets_mapping=True,
                verbose=False,
            )
        # Special tokens put around the text have (0, 0).
        starts = list(accumulate((start for start, _ in encoding["offset_mapping"]), max))
        spans: list[tuple[int, int]] = []
        at = 0
        for hit in prompt.hits:
            # The reader's layout strips what it numbers; a passage that is not found is computed.
            passage = neutralise(passage_text(hit)).strip()
            found = text.find(passage, at)
            if found < 0:
                continue
            at = found + len(passage)
            span = (bisect_left(starts, found) + 1, bisect_left(starts, at) - 1)
            if span[0] < span[1]:
                spans.append(span)
        return tuple(spans)

    def _written(self, prompt: Prompt) -> tuple[str, bool]:
        """The prompt as one text, and whether the tokenizer is to put its own tokens around it."""
        if prompt.text is not None:
            return prompt.text, False
        if not prompt.messages:
            raise GeneratorError("the prompt holds neither messages nor text.")
        if not self._tokenizer.chat_template:
            return plain_text(prompt.messages), True
        from jinja2 import TemplateError

        messages = merge_system(prompt.messages) if self.merges_system else prompt.messages
        try:
            return self._render(messages), False
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise GeneratorError(
                f"the model's chat template refuses a conversation of {roles}: {error}. "
                "Ask without history, or choose another model."
            ) from error

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """What the model would have to write for an answer: its tokens and the end of the turn.

        Raises GeneratorError where the model has no token that ends a turn.
        """
        known = self._tokenizer.get_added_vocab()
        template = self._tokenizer.chat_template
        written = template if isinstance(template, str) else json.dumps(template)
        if self.layout == "reader":
            ends = [known[_READER_END]] if _READER_END in known else []
        elif self.layout == "chat":
            ends = [known[mark] for mark in _TURN_ENDS if mark in known and mark in written]
        else:
            ends = []
        if not ends and self._tokenizer.eos_token_id is not None:
            ends = [int(self._tokenizer.eos_token_id)]
        if not ends:
            raise GeneratorError("the model's tokenizer names no token that ends an answer.")
        lead = " " if self.layout == "plain" else ""  # the prompt ends with "Answer:"
        return (*self._ids(lead + text, add_special_tokens=False), ends[0])

    def blocks(self, ids: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Where passages and question begin in the reader's second layout; ((), 0) in any other."""
        if self._block_ids is None or not ids or ids[0] != self._block_ids[0]:
            return (), 0
        _, passage, question = self._block_ids
        starts = tuple(index for index, token in enumerate(ids) if token == passage)
        if not starts or question not in ids:
            raise GeneratorError("a prompt of separate passages needs passages and a question.")
        return starts, list(ids).index(question)

    def _render(self, messages: Sequence[Message]) -> str:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        text = self._tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True, **self._template_arguments
        )
        assert isinstance(text, str)
        return text

    def _keeps_system(self) -> bool:
        """Whether the chat template shows a system message; some refuse it, some drop it."""
        from jinja2 import TemplateError

        probe = (Message("system", "probe-of-the-system-role"), Message("user", "question"))
        try:
            return "probe-of-the-system-role" in self._render(probe)
        except TemplateError:
            return False

    def _ids(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        with _TOKENIZING:
            encoding = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(encoding["input_ids"])


def merge_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages with every system text put in front of the first user message."""
    system = "\n\n".join(message.content for message in messages if message.role == "system")
    others = [message for message in messages if message.role != "system"]
    if system and others and others[0].role == "user":
        others[0] = Message("user", f"{system}\n\n{others[0].content}")
    elif system:
        others.insert(0, Message("user", system))
    return tuple(others)


def plain_text(messages: Sequence[Message]) -> str:
    """The layout for base models, which have no chat template: questions and answers in turn."""
    asked = [message.content for message in messages if message.role == "user"]
    chinese = detect_language(asked[-1] if asked else "") == "zh"
    question, answer = ("问题：", "回答：") if chinese else ("Question: ", "Answer: ")
    parts = []
    for message in messages:
        if message.role == "system":
            parts.append(message.content)
        elif message.role == "user":
            parts.append(f"{question}{message.content}\n{answer.rstrip()}")
        else:
            parts[-1] += f"{answer[len(answer.rstrip()) :]}{message.content}"
    return "\n\n".join(parts)


class Generator:
    """A loaded causal LM. Safe to use from several threads at once."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        is_reader: bool = False,
        stop_ids: Collection[int] = (),
        memory: MemoryPlan | None = None,
        splices_passages: bool = False,
    ) -> None:
        """`splices_passages` reuses passages from other prompts approximately, for an engine that
        was made for it."""
        if splices_passages and not tokenizer.is_fast:
            raise GeneratorError(
                f"{name} has a tokenizer that can't say where a token stands in the text, which "
                "passage_reuse approximate needs. Set it to exact."
            )
        self.engine = engine
        self._splices = splices_passages
        self.name = name
        self._memory = memory
        self._tokenizer = tokenizer
        self._format = PromptFormat(tokenizer, is_reader=is_reader)
        self.layout: Layout = self._format.layout
        self.context_length = engine.context_length
        self.device = engine.device
        self.dtype = engine.dtype
        self.stop_ids = tuple(sorted(set(stop_ids)))
        self._numbers = count(1)
        self._numbers_lock = threading.Lock()

    def describe(self) -> str:
        """One line on what runs: name, layout, device, dtype, context, engine."""
        layout = {
            "reader": "reader layout",
            "chat": "its chat template" + (", system merged" if self._format.merges_system else ""),
            "plain": "a plain question-and-answer layout (the model has no chat template)",
        }[self.layout]
        return (
            f"{self.name}: {layout}, {self.device}, {self.dtype}, context "
            f"{self.context_length} tokens, {self.engine.description}"
        )

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt's token ids, special tokens included."""
        return self._format.encode(prompt)

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """The token ids that the model would have to write for this answer, its end included."""
        return self._format.encode_answer(text)

    def prompt_text(self, prompt: Prompt) -> str:
        """What the model reads, back from its tokens: template and special tokens included."""
        ids = list(self.encode(prompt))
        with _TOKENIZING:
            text = self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        assert isinstance(text, str)
        return text

    @property
    def model_bytes(self) -> int:
        """Memory of the weights on the device; 0 where it was not planned by `load_generator`."""
        return self._memory.weight_bytes if self._memory else 0

    @property
    def cache_bytes(self) -> int:
        """The most that keys and values may take."""
        return self._memory.kv_tokens * self._memory.kv_bytes_per_token if self._memory else 0

    @property
    def cached_bytes(self) -> int:
        """What keys and values take now."""
        return self.engine.cached_tokens * self._memory.kv_bytes_per_token if self._memory else 0

    def count_tokens(self, prompt: Prompt) -> int:
        """How many of the model's tokens the prompt takes."""
        return len(self.encode(prompt))

    def token_text(self, token_id: int) -> str:
        """What one token stands for by itself; part of a character shows as U+FFFD."""
        with _TOKENIZING:
            text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        top_logprobs: int = 0,
        stop: Stop | None = None,
    ) -> PyGenerator[str, None, GenerationResult]:
        """Yield the text piece by piece; the generator's return value is the GenerationResult.

        With `top_logprobs` the result has that many of the most probable tokens for each place.
        Closing it stops the computation, and so does `stop` from another thread, even while the
        prompt is being read; the result then says "cancelled". Raises GeneratorError where prompt
        and new tokens exceed the context.
        """
        request = self._request(prompt, max_new_tokens, sampling, top_logprobs)
        text = self._text_stream(stop_strings)
        tokens: list[TokenEvent] = []
        if stop is not None:
            stop.then(lambda: self.engine.cancel(request.id))
        events = self.engine.generate([request])
        try:
            for event in events:
                if stop is not None and stop.is_set:  # perhaps before the engine knew the request
                    self.engine.cancel(request.id)
                if isinstance(event, FinishEvent):
                    piece = text.finish()
                    if piece:
                        yield piece
                    return _result(event, text, tokens)
                if not text.stopped:  # else chosen before the engine saw the cancellation
                    tokens.append(event)
                    piece = text.push(event.token_id)
                    if piece:
                        yield piece
                if text.stopped:
                    self.engine.cancel(request.id)
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()
        raise AssertionError("the engine ended without a FinishEvent")

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> GenerationResult:
        """The whole answer at once."""
        return self.generate_batch(
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_strings=stop_strings,
            top_logprobs=top_logprobs,
        )[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_strings: Sequence[str] = (),
        top_logprobs: int = 0,
    ) -> list[GenerationResult]:
        """One result for each prompt, in their order.

        With a seed each prompt samples from its own generator, started from that same seed.
        """
        requests = [
            self._request(prompt, max_new_tokens, sampling, top_logprobs) for prompt in prompts
        ]
        texts = {request.id: self._text_stream(stop_strings) for request in requests}
        tokens: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
        results: dict[str, GenerationResult] = {}
        for event in self.engine.generate(requests):
            id_ = event.request_id
            text = texts[id_]
            if isinstance(event, TokenEvent):
                if not text.stopped:  # else chosen before the engine saw the cancellation
                    tokens[id_].append(event)
                    text.push(event.token_id)
                if text.stopped:
                    self.engine.cancel(id_)
            else:
                text.finish()
                results[id_] = _result(event, text, tokens[id_])
        return [results[request.id] for request in requests]

    def _request(
        self, prompt: Prompt, max_new_tokens: int, sampling: Sampling | None, top_logprobs: int
    ) -> Request:
        with self._numbers_lock:
            number = next(self._numbers)
        ids = self.encode(prompt)
        block_starts, question_start = self._format.blocks(ids)
        reusable = self._format.passages(prompt) if self._splices and not block_starts else ()
        return Request(
            id=f"{number}",
            prompt_ids=ids,
            block_starts=block_starts,
            question_start=question_start,
            reusable=reusable,
            max_new_tokens=max_new_tokens,
            sampling=sampling if sampling is not None else Sampling(),
            stop_ids=self.stop_ids,
            top_logprobs=top_logprobs,
        )

    def _text_stream(self, stop_strings: Sequence[str]) -> TextStream:
        stops = (*stop_strings, *(_PLAIN_STOPS if self.layout == "plain" else ()))
        return TextStream(self._tokenizer, stops)


def _result(event: FinishEvent, text: TextStream, tokens: list[TokenEvent]) -> GenerationResult:
    decoding = event.seconds - event.seconds_to_first_token
    rate = (event.new_tokens - 1) / decoding if event.new_tokens > 1 and decoding > 0 else 0.0
    return GenerationResult(
        text=text.text,
        token_ids=tuple(token.token_id for token in tokens),
        token_logprobs=tuple(token.logprob for token in tokens),
        finish_reason="stop" if text.stopped else event.reason,
        prompt_tokens=event.prompt_tokens,
        reused_tokens=event.reused_tokens,
        new_tokens=len(tokens),
        seconds_to_first_token=event.seconds_to_first_token,
        tokens_per_second=rate,
        top_logprobs=tuple(token.top for token in tokens if token.top),
    )


def load_generator(settings: Settings) -> Generator:
    """Load the generator that the settings name, on the device and in the dtype they name; or find
    the server of one that begins with `openai:`.

    Raises GeneratorError where it can't be found, is not a causal LM in safetensors, or does not
    fit into free memory; nothing else is ever loaded in its place.
    """
    if settings.generator.startswith(_ELSEWHERE):
        from rag.remote import load_remote

        return load_remote(settings)
    from rag.engine.own_thread import in_own_thread

    return in_own_thread(lambda: _load_here(settings))


def _load_here(settings: Settings) -> Generator:
    """A generator on this machine, loaded in the calling thread."""
    from transformers import AutoTokenizer

    from rag.engine import create_engine
    from rag.engine.placement import (
        WEIGHT_BITS,
        check_map,
        choose_device,
        choose_dtype,
        count_weights,
        free_bytes,
        kv_bytes_per_token,
        mapped_devices,
        memory_shares,
        plan_memory,
        weight_bytes,
    )

    name = settings.generator
    folder = find_model(name)
    check_folder(folder, name)
    adapter = Path(settings.adapter).expanduser() if settings.adapter else None
    if adapter is not None:
        check_base(adapter, name, weight_files(folder))
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    bits = WEIGHT_BITS.get(settings.dtype)
    int8_kv = settings.kv_dtype == "int8"
    splices = settings.passage_reuse == "approximate"
    config = _load_config(folder, name)
    text_config = config.get_text_config(decoder=True)
    limit = getattr(text_config, "max_position_embeddings", None)
    wanted = settings.max_prompt_tokens + settings.max_new_tokens
    needed = min(limit, wanted) if limit else wanted
    num_weights = count_weights(weight_files(folder))
    devices = mapped_devices(settings.device, device)
    free = [free_bytes(one) for one in devices]
    bytes_per_token = kv_bytes_per_token(text_config, dtype, int8=int8_kv)
    if splices:  # as many tokens of passages beside the cache
        bytes_per_token += kv_bytes_per_token(text_config, dtype)
    plan = plan_memory(
        name=name,
        weight_bytes=weight_bytes(num_weights, text_config, dtype, bits=bits),
        loading_bytes=num_weights * dtype.itemsize,
        dtype=settings.dtype if bits else str(dtype).removeprefix("torch."),
        bytes_per_token=bytes_per_token,
        needed_tokens=needed,
        device=device if len(devices) == 1 else f"{len(devices)} GPUs",
        free=sum(free),
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise GeneratorError(f"the tokenizer of {name} can't be loaded: {error}") from error
    if len(devices) == 1:
        model = load_model(folder, name, dtype).to(device)
    else:
        shares = memory_shares(free, plan.kv_tokens * plan.kv_bytes_per_token)
        model = load_model(folder, name, dtype, device_map="auto", max_memory=shares)
        check_map(model.hf_device_map, name)
    if adapter is not None:
        merge_adapter(model, adapter)
    is_reader = _reader_layout(folder)
    stop_ids = _stop_ids(model, tokenizer, is_reader=is_reader)
    context_length = min(limit, plan.kv_tokens) if limit else plan.kv_tokens
    engine = create_engine(
        model,
        context_length=context_length,
        kv_tokens=plan.kv_tokens,
        release=True,
        bits=bits,
        int8_kv=int8_kv,
        splice_passages=splices,
    )
    return Generator(
        engine,
        tokenizer,
        name=name if adapter is None else f"{name}+{adapter.name}",
        is_reader=is_reader,
        stop_ids=stop_ids,
        memory=plan,
        splices_passages=splices,
    )


def find_model(name: str) -> Path:
    """The folder of a model: the bundled reader, a local folder, or a hub name's local copy.

    The hub is asked only for a hub name that is not, or not whole, in the local cache.
    """
    if name == "bundled":
        if not (BUNDLED_READER / "config.json").is_file():
            raise GeneratorError(
                f"the bundled reader is not in {BUNDLED_READER}. Train it with "
                "python -m rag.bundled.train_reader, or set generator to a folder or hub name."
            )
        return BUNDLED_READER
    if name.startswith(_ELSEWHERE):
        raise GeneratorError(
            f"the generator {name!r} runs on a server; none of its files are here. Choose a model on "
            "this machine to look inside."
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    if path.exists() or looks_local:
        raise GeneratorError(
            f"the generator {name!r} is not a folder. Name a folder with config.json and "
            "*.safetensors, a Hugging Face name such as owner/model, or 'bundled'."
        )
    return _find_on_hub(name)


def _find_on_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(
            snapshot_download(
                name,
                allow_patterns=_HUB_FILES,
                ignore_patterns=_HUB_LEFT_OUT,
                local_files_only=True,
            )
        )
        if _is_complete(cached):
            return cached
    except LocalEntryNotFoundError:
        pass  # not in the cache: ask the hub
    except HFValidationError as error:
        raise GeneratorError(
            f"{name!r} is neither a folder nor a Hugging Face name (owner/model): {error}"
        ) from error
    try:
        fetched = Path(
            snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEFT_OUT)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise GeneratorError(
            f"the generator {name!r} is not on this disk and could not be fetched from the hub: "
            f"{error} Fetch it where there is a network, or set generator to 'bundled' or a folder."
        ) from error
    # Where the hub can't be reached, what is cached comes back as if it were all there is.
    if not _is_complete(fetched):
        raise GeneratorError(
            f"the generator {name!r} is not whole in {fetched}: config.json or *.safetensors are "
            "missing. Either the hub could not be reached, or the model is not published as "
            "safetensors. Fetch it where there is a network, or choose another."
        )
    return fetched


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder should hold."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _is_complete(folder: Path) -> bool:
    files = weight_files(folder)
    return (folder / "config.json").is_file() and bool(files) and all(p.is_file() for p in files)


def check_folder(folder: Path, name: str) -> None:
    """Raise GeneratorError where the folder can't be a causal LM in safetensors."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise GeneratorError(
                f"{name} is a LoRA adapter, not a whole model. One of python -m rag.finetune is the "
                "setting adapter, beside the generator it was trained on; merge another into its base "
                "first (peft: merge_and_unload, then save_pretrained)."
            )
        raise GeneratorError(f"{name} has no config.json in {folder}: not a Hugging Face model.")
    files = weight_files(folder)
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise GeneratorError(
            f"{name} is incomplete in {folder}: missing {', '.join(missing)}. Fetch it again."
        )
    if not files:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise GeneratorError(
                f"{name} has only pickled weights ({', '.join(pickled)}), which can run code when "
                "they are loaded. Save it as safetensors: model.save_pretrained(folder)."
            )
        raise GeneratorError(f"{name} has no *.safetensors weights in {folder}.")


def _load_config(folder: Path, name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise GeneratorError(f"the config of {name} can't be read: {error}") from error


def load_model(
    folder: Path,
    name: str,
    dtype: Any,
    *,
    device_map: str | dict[str, str] | None = None,
    max_memory: dict[int, int] | None = None,
) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    # It would stand in the middle of a command's output.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            max_memory=max_memory,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise GeneratorError(
            f"{name} can't be loaded as a causal language model: {error}"
        ) from error
    finally:
        if shows_progress:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random weights in their place
        raise GeneratorError(
            f"{name} lacks {len(missing)} of its weights, such as {missing[0]}. Fetch it again."
        )
    return model.eval()


def _reader_layout(folder: Path) -> bool:
    path = folder / "reader.json"
    if not path.is_file():
        return False
    try:
        layout = json.loads(path.read_text(encoding="utf-8")).get("layout")
    except (ValueError, AttributeError) as error:
        raise GeneratorError(f"{path} is not a JSON object: {error}") from error
    return bool(layout == "reader")


def _stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase, *, is_reader: bool) -> set[int]:
    """Every token that ends an answer: the eos of model and tokenizer, and ends of a turn."""
    stops: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config(decoder=True)):
        eos = getattr(config, "eos_token_id", None)
        stops.update([eos] if isinstance(eos, int) else eos or [])
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    special = tokenizer.get_added_vocab()
    names = (_READER_END,) if is_reader else _TURN_ENDS if tokenizer.chat_template else ()
    stops.update(special[end] for end in names if end in special)
    return stops
