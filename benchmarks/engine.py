"""Measure generation engines on this machine: python -m benchmarks.engine [--engines ...] [--out DIR]

Every engine runs alone, in a process of its own, on the same random weights (Qwen3 shapes), the
same prompts and the same threads. Limits of the machine are measured in the same run, and figures
are medians over --repeats. Nothing here passes or fails. Results: engine.json and engine.md in DIR.

Scenarios
  a  chat turns 2 to 5 over 2,000 tokens of passages: seconds to the first token
  b  four users take turns over four documents: seconds to the first token
  c  32 questions over one document, together: output tokens a second, prefill included
  d  one cold prompt of 2,000 tokens: prompt tokens a second
  s  one stream behind 512 tokens: output tokens a second
  r  one stream that repeats what stands in its prompt, as quoting answers do: output tokens a second;
     prompt lookup is on in ours and in the engines that are named for it
  e  the bundled reader, with and without prompt lookup (only ours): output tokens a second
  f  passages in another order behind another question, exact against approximate reuse (only ours)
  q  the bundled reader in fewer bits: how far its answers move from bfloat16 (only ours)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

SHAPES: dict[str, dict[str, int]] = {
    "0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936,
    },
    "small": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "vocab_size": 32000,
    },
}  # fmt: skip

ENGINES = {
    "ours": "this engine, bfloat16",
    "ours-int8": "this engine, 8-bit weights",
    "ours-int4": "this engine, 4-bit weights",
    "transformers": "transformers generate(), as it is",
    "transformers-mask": "transformers forward with an explicit mask, token by token",
    "transformers-cb": "transformers generate_batch(), continuous batching",
    "llama.cpp": "llama-cpp-python, BF16, its prefix cache on",
    "llama.cpp-q8": "llama-cpp-python, Q8_0, its prefix cache on",
    "llama.cpp-lookup": "llama-cpp-python, BF16, with its prompt lookup",
    "transformers-lookup": "transformers generate() with its prompt lookup",
}
SCENARIOS = "abcdsrefq"
PAUSE = 2.0  # seconds before each measurement, as between a person's questions
# On a machine that others use too, the processor time of one thread still says what an engine
# computes; it is what --cpu-time measures.
CPU_TIME = os.environ.get("BENCHMARK_CPU_TIME") == "1"
clock = time.process_time if CPU_TIME else time.perf_counter
CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds from the call to each prompt's first token, and to the last token of all."""

    first: list[float]
    total: float


class Runner(Protocol):
    def run(self, prompts: Sequence[list[int]], new: int) -> Timing:
        """Continue the prompts by exactly `new` tokens each, together where the engine can."""
        ...


# engines


class OursRunner:
    def __init__(self, folder: Path, *, bits: Literal[8, 4] | None = None) -> None:
        from rag.engine import create_engine
        from rag.engine.own_thread import in_own_thread

        # As load_generator does it.
        self._engine = in_own_thread(lambda: create_engine(
            load_model(folder), context_length=CONTEXT, kv_tokens=6 * CONTEXT, release=True, bits=bits
        ))

    def run(self, prompts: Sequence[list[int]], new: int) -> Timing:
        from rag.engine import Request

        requests = [Request(str(n), tuple(ids), new) for n, ids in enumerate(prompts)]
        began = clock()
        first: dict[str, float] = {}
        for event in self._engine.generate(requests):
            first.setdefault(event.request_id, clock() - began)
        return Timing(list(first.values()), clock() - began)


class GenerateRunner:
    """transformers' generate(), prompts of one length as one batch."""

    options: dict[str, int] = {}

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder)

    def run(self, prompts: Sequence[list[int]], new: int) -> Timing:
        import torch

        times: list[float] = []

        class Streamer:
            def put(self, value: Any) -> None:
                times.append(clock())

            def end(self) -> None:
                pass

        began = clock()
        first: list[float] = []
        for begin in range(0, len(prompts), 16):
            batch = torch.tensor(prompts[begin : begin + 16])
            times.clear()
            start = clock()
            self._model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                # A streamer takes one row only; in a batch the first token is not timed.
                streamer=Streamer() if len(batch) == 1 else None,
                **self.options,
            )
            seen = times[1] if len(times) > 1 else clock()  # times[0]: the prompt
            first += [seen - start] * len(batch)
        return Timing(first, clock() - began)


class MaskRunner:
    """transformers' forward, one row, with the all-true mask that spares it a slow path."""

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder)

    def run(self, prompts: Sequence[list[int]], new: int) -> Timing:
        import torch
        from transformers import DynamicCache

        began = clock()
        first: list[float] = []
        with torch.inference_mode():
            for ids in prompts:
                start = clock()
                cache = DynamicCache(config=self._model.config)
                tokens = torch.tensor([ids])
                for step in range(new):
                    mask = None
                    if step:
                        mask = torch.ones(1, 1, 1, len(ids) + step, dtype=torch.bool)
                    output = self._model(
                        tokens, past_key_values=cache, attention_mask=mask, logits_to_keep=1
                    )
                    tokens = output.logits[:, -1:].argmax(-1)
                    if not step:
                        first.append(clock() - start)
        return Timing(first, clock() - began)


class ContinuousRunner:
    """transformers' continuous batching."""

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder)

    def run(self, prompts: Sequence[list[int]], new: int) -> Timing:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        began = clock()
        self._model.generate_batch(
            inputs=[list(ids) for ids in prompts], generation_config=config, progress_bar=False
        )
        total = clock() - began
        return Timing([total] * len(prompts), total)


class LlamaCppRunner:
    """llama-cpp-python's own generate(): one row, the last prompt's cache reused."""

    def __init__(self, folder: Path, *, quantised: bool = False, **options: Any) -> None:
        from llama_cpp import Llama

        path = write_gguf(folder, "Q8_0" if quantised else "BF16")
        threads = int(os.environ["OMP_NUM_THREADS"])
        self._llama = Llama(
            str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads,
            n_batch=512, verbose=False, flash_attn=os.environ.get("LLAMA_FLASH") == "1",
            **options,
        )  # fmt: skip

    def run(self, prompts: Sequence[list[int]], new: int) -> Timing:
        began = clock()
        first: list[float] = []
        for ids in prompts:
            start = clock()
            for index, _ in enumerate(self._llama.generate(ids, temp=0.0, top_k=1)):
                if not index:
                    first.append(clock() - start)
                if index + 1 == new:
                    break
        return Timing(first, clock() - began)


class GenerateLookupRunner(GenerateRunner):
    """transformers' generate() with prompt lookup."""

    options = {"prompt_lookup_num_tokens": 10}


class LlamaCppLookupRunner(LlamaCppRunner):
    """llama-cpp-python with its prompt lookup, at the better of the two lengths it recommends."""

    def __init__(self, folder: Path) -> None:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        # Given from the start, as it then keeps the logits of all tokens.
        super().__init__(folder, draft_model=LlamaPromptLookupDecoding(), logits_all=True)

    def run(self, prompts: Sequence[list[int]], new: int) -> Timing:
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        found: list[Timing] = []
        for length in (2, 10):
            self._llama.draft_model = LlamaPromptLookupDecoding(num_pred_tokens=length)
            self._llama.reset()
            found.append(super().run(prompts, new))
        return min(found, key=lambda timing: timing.total - timing.first[0])


MAKERS: dict[str, Callable[[Path], Runner]] = {
    "ours": OursRunner,
    "ours-int8": lambda folder: OursRunner(folder, bits=8),
    "ours-int4": lambda folder: OursRunner(folder, bits=4),
    "transformers": GenerateRunner,
    "transformers-mask": MaskRunner,
    "transformers-cb": ContinuousRunner,
    "transformers-lookup": GenerateLookupRunner,
    "llama.cpp": LlamaCppRunner,
    "llama.cpp-lookup": LlamaCppLookupRunner,
    "llama.cpp-q8": lambda folder: LlamaCppRunner(folder, quantised=True),
}


# weights


def load_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return model.eval()


def write_weights(folder: Path, shape: str) -> None:
    """Random bfloat16 weights of a Qwen3, as a model folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3", **SHAPES[shape], max_position_embeddings=40960, tie_word_embeddings=True,
        eos_token_id=None, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def write_gguf(folder: Path, kind: str) -> Path:
    """The same weights as llama.cpp reads them."""
    import gguf
    from safetensors.torch import load_file

    path = folder / f"model-{kind}.gguf"
    if path.is_file():
        return path
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{n}" for n in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    target = getattr(gguf.GGMLQuantizationType, kind)
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    for name, tensor in tensors.items():
        if name == "model.embed_tokens.weight":
            short = "token_embd.weight"
        elif name == "model.norm.weight":
            short = "output_norm.weight"
        elif name == "lm_head.weight":
            continue  # tied
        else:
            _, _, layer, *rest = name.split(".")
            short = f"blk.{layer}.{names['.'.join(rest[:-1])]}.weight"
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(short, values)
        else:
            writer.add_tensor(short, gguf.quantize(values, target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# scenarios


def chat_turns(run: Runner, ids: Callable[[int], list[int]]) -> float:
    """Median seconds to the first token of turns 2 to 5. The answers are the benchmark's own
    tokens, the same for every engine."""
    prompt = ids(2000)
    first: list[float] = []
    for turn in range(5):
        prompt += ids(24)
        timing = run.run([prompt], 2)
        if turn:
            first += timing.first
        prompt += ids(48)
    return statistics.median(first)


def users_in_turn(run: Runner, ids: Callable[[int], list[int]]) -> float:
    """Median seconds to the first token from each user's second question on."""
    prompts = [ids(800) for _ in range(4)]
    first: list[float] = []
    for turn in range(3):
        for prompt in prompts:
            prompt += ids(20)
            timing = run.run([list(prompt)], 2)
            if turn:
                first += timing.first
            prompt += ids(30)
    return statistics.median(first)


def batch_over_one_document(run: Runner, ids: Callable[[int], list[int]]) -> float:
    document = ids(512)
    prompts = [document + ids(20) for _ in range(32)]
    return 32 * 32 / run.run(prompts, 32).total


def cold_prompt(run: Runner, ids: Callable[[int], list[int]]) -> float:
    return 2000 / run.run([ids(2000)], 1).first[0]


def one_stream(run: Runner, ids: Callable[[int], list[int]]) -> float:
    timing = run.run([ids(512)], 49)
    return 48 / (timing.total - timing.first[0])


def repeating_stream(run: Runner, ids: Callable[[int], list[int]]) -> float:
    timing = run.run([ids(40) * 12], 97)
    return 96 / (timing.total - timing.first[0])


MEASURES: dict[str, tuple[str, str, Callable[[Runner, Callable[[int], list[int]]], float]]] = {
    "a": ("chat turns 2-5, first token", "s", chat_turns),
    "b": ("four users in turn, first token", "s", users_in_turn),
    "c": ("32 questions, one document", "tokens/s", batch_over_one_document),
    "d": ("cold prompt of 2,000", "tokens/s", cold_prompt),
    "s": ("one stream behind 512", "tokens/s", one_stream),
    "r": ("one stream that repeats itself", "tokens/s", repeating_stream),
}


def unfit(engine: str, scenario: str) -> bool:
    """What an engine has no way to do apart from what another row already measures: continuous
    batching is for batches, and the forward with a mask takes prompts one by one where generate()
    takes 16 together."""
    if engine == "transformers-cb":
        return scenario != "c"
    if engine.endswith("-lookup"):
        return scenario != "r"
    return engine == "transformers-mask" and scenario == "c"


def work(engine: str, folder: Path, scenarios: str, repeats: int) -> dict[str, list[float]]:
    """In the subprocess: every measurement of one engine."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    runner = MAKERS[engine](folder)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    found: dict[str, list[float]] = {}
    runner.run([list(range(10, 40))], 2)  # first calls compile, page in, start threads
    for repeat in range(repeats):
        for scenario in scenarios:
            if scenario not in MEASURES or unfit(engine, scenario):
                continue
            time.sleep(PAUSE)
            rng = random.Random(f"{scenario}{repeat}")
            value = MEASURES[scenario][2](
                runner, lambda n, rng=rng: [rng.randrange(10, vocabulary) for _ in range(n)]
            )
            found.setdefault(scenario, []).append(value)
            print(f"  {engine} {scenario} {value:.4g}", file=sys.stderr, flush=True)
    return found


def asked_of_handbook() -> list[tuple[str, str]]:
    """Questions with the passage of the handbook that answers each."""
    root = Path(__file__).parent.parent
    asked: list[tuple[str, str]] = []
    for line in (root / "tests" / "questions.jsonl").read_text("utf-8").splitlines():
        question = json.loads(line)
        path = root / "knowledge" / question.get("path", "")
        if path.suffix == ".md" and question.get("quote"):
            text = path.read_text("utf-8")
            at = text.find(question["quote"])
            if at >= 0:
                asked.append((question["question"], text[max(0, at - 300) : at + 500]))
    return asked


def around(asked: Sequence[tuple[str, str]], number: int, count: int = 3) -> list[str]:
    """The passage of a question, and those of the questions behind it."""
    return [asked[(number + step) % len(asked)][1] for step in range(count)]


def lookup(repeats: int) -> dict[str, Any]:
    """Scenario e: the bundled reader quotes passages of the handbook, drafts on and off."""
    import dataclasses

    from rag.generator import load_generator
    from rag.prompt import Prompt, reader_prompt
    from rag.settings import Settings

    asked = asked_of_handbook()[:16]
    result: dict[str, Any] = {}
    for name, drafts in (("with", 32), ("without", 0)):
        rates = []
        for _ in range(repeats):
            generator = load_generator(Settings(max_new_tokens=64))
            engine: Any = generator.engine
            engine.limits = dataclasses.replace(engine.limits, draft_tokens=drafts)
            tokens, seconds = 0, 0.0
            for number, (question, _) in enumerate(asked):
                prompt = Prompt(hits=(), text=reader_prompt(question, around(asked, number)))
                done = generator.generate(prompt, max_new_tokens=64)
                if done.tokens_per_second:
                    tokens += done.new_tokens - 1
                    seconds += (done.new_tokens - 1) / done.tokens_per_second
            rates.append(tokens / seconds)
            stats = engine.stats()
        result[name] = statistics.median(rates)
        result[f"accepted_{name}"] = stats.accepted_tokens / max(1, stats.new_tokens)
    return result


def shuffled(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Scenario f: seconds to the first token on the weights of --shape, where four passages of 400
    tokens were read before in another order; and on the bundled reader what that costs, as F1 to
    the answer that the exact engine gives."""
    from rag.engine import Request, create_engine
    from rag.quality.evaluation import token_f1

    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    found: dict[str, dict[str, float]] = {}
    for name, splices in (("exact", False), ("approximate", True)):
        engine: Any = create_engine(
            load_model(folder), context_length=CONTEXT, kv_tokens=6 * CONTEXT, release=True,
            splice_passages=splices,
        )  # fmt: skip
        seconds = []
        for repeat in range(repeats + 1):  # the first makes ready
            rng = random.Random(repeat)
            opening, *passages = (
                tuple(rng.randrange(10, vocabulary) for _ in range(length))
                for length in (100, 400, 400, 400, 400)
            )
            for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
                ids, spans = opening, []
                for index in order:
                    spans.append((len(ids), len(ids) + 400))
                    ids += passages[index]
                ids += tuple(rng.randrange(10, vocabulary) for _ in range(24))
                request = Request("a", ids, 1, reusable=tuple(spans) if splices else ())
                began = clock()
                next(iter(engine.generate([request])))
                taken = clock() - began
            if repeat:
                seconds.append(taken)
        engine.close()
        found[name] = {"first_token": statistics.median(seconds)}
    exact = reordered_answers("exact")
    for name in found:
        answers = reordered_answers(name) if name != "exact" else exact
        pairs = list(zip(answers, exact, strict=True))
        found[name]["answers"] = len(pairs)
        found[name]["f1"] = statistics.mean(token_f1(ours, [theirs]) for ours, theirs in pairs)
        found[name]["same"] = statistics.mean(ours == theirs for ours, theirs in pairs)
    return found


def reordered_answers(reuse: str) -> list[str]:
    """What the bundled reader answers to a question whose passages it has just read in another
    order, for the question before."""
    from rag.answer import Hit
    from rag.document import Chunk
    from rag.generator import load_generator
    from rag.prompt import build_prompt
    from rag.settings import Settings

    asked = asked_of_handbook()[:48]
    generator = load_generator(Settings(max_new_tokens=64, passage_reuse=reuse))
    answers = []
    for number, (question, _) in enumerate(asked):
        hits = [Hit(Chunk("a.md", text, 0, len(text)), 1.0) for text in around(asked, number)]
        order = [hits[2], hits[0], hits[1]]
        for words, passages in ((asked[number - 1][0], hits), (question, order)):
            prompt = build_prompt(
                words, passages, layout="reader", budget=3500, count_tokens=generator.count_tokens
            )
            done = generator.generate(prompt, max_new_tokens=64)
        answers.append(done.text)
    return answers


# What is compared with bfloat16: settings of the generator.
PRECISIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, KV cache int8": {"dtype": "bfloat16", "kv_dtype": "int8"},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
    "int4, KV cache int8": {"dtype": "int4", "kv_dtype": "int8"},
}


def precision(prompts: int = 48) -> dict[str, dict[str, float]]:
    """Scenario q: the bundled reader's own greedy answers in bfloat16, read again by the others.

    Over all tokens of these answers: mean and largest change of the token's log-probability, the
    largest change of any logit, the share of places where the most probable token is the same; and
    the share of answers that come out the same, word for word.
    """
    import torch

    from rag.engine.attention import Chunk
    from rag.generator import load_generator
    from rag.prompt import Prompt, reader_prompt
    from rag.settings import Settings

    asked = asked_of_handbook()[:prompts]
    written = [
        Prompt(hits=(), text=reader_prompt(question, around(asked, number)))
        for number, (question, _) in enumerate(asked)
    ]
    loaded = {
        name: load_generator(Settings(max_new_tokens=64, **changes))
        for name, changes in PRECISIONS.items()
    }
    answers = {
        name: [result.token_ids for result in generator.generate_batch(written, max_new_tokens=64)]
        for name, generator in loaded.items()
    }

    def logits(name: str, number: int) -> torch.Tensor:
        engine: Any = loaded[name].engine
        answer = answers["bfloat16"][number]
        tokens = [*loaded[name].encode(written[number]), *answer]
        pool = engine._model.new_pool(len(tokens), int8=engine._int8_kv)
        chunk = Chunk(tokens[:-1], 0, [(0, len(tokens) - 1)], len(answer))
        return engine._model.forward([chunk], pool)

    yardstick = [
        logits("bfloat16", number) if answer else None
        for number, answer in enumerate(answers["bfloat16"])
    ]
    found: dict[str, dict[str, float]] = {}
    for name in PRECISIONS:
        logprobs, largest, same = [], 0.0, []
        for number, answer in enumerate(answers["bfloat16"]):
            exact = yardstick[number]
            if exact is None:
                continue
            ours = logits(name, number)
            at = torch.tensor(answer)[:, None]
            change = ours.log_softmax(-1).gather(1, at) - exact.log_softmax(-1).gather(1, at)
            logprobs += change.abs().flatten().tolist()
            largest = max(largest, float((ours - exact).abs().max()))
            same += (ours.argmax(-1) == exact.argmax(-1)).tolist()
        found[name] = {
            "tokens": len(logprobs),
            "mean_logprob_change": statistics.mean(logprobs),
            "largest_logprob_change": max(logprobs),
            "largest_logit_change": largest,
            "same_token": sum(same) / len(same),
            "same_answer": sum(map(tuple.__eq__, answers[name], answers["bfloat16"])) / len(asked),
        }
    return found


# limits


def measure_limits(folder: Path) -> dict[str, float]:
    """What this machine can read and multiply, and what that allows for these weights."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    large = torch.ones(256 * 2**20)  # 1 GiB
    x = torch.randn(2048, 4096).bfloat16()
    weight = torch.randn(4096, 4096).bfloat16()

    def best(work: Callable[[], Any], runs: int = 5) -> float:
        seconds = []
        for _ in range(runs):
            began = clock()
            work()
            seconds.append(clock() - began)
        return min(seconds)

    with torch.inference_mode():
        read = large.nbytes / best(lambda: large.sum())
        product = 2 * 2048 * 4096 * 4096 / best(lambda: torch.nn.functional.linear(x, weight))
    shape = json.loads((folder / "config.json").read_text())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    embedding = shape["vocab_size"] * shape["hidden_size"]
    multiplied = stored / 2 - embedding  # weights that every prompt token is multiplied with
    kv = 4 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return {
        "read_bytes_per_second": read,
        "flops_per_second": product,
        "d": product / (2 * multiplied),
        "s": read / (stored + 536 * kv),
    }


# the run


def available(engine: str) -> str | None:
    """None, or why an engine can't run here."""
    if engine.startswith("llama"):
        for module in ("llama_cpp", "gguf"):
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
    return None


def in_subprocess(arguments: list[str], threads: int, *, cpu_time: bool) -> Any:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "BENCHMARK_CPU_TIME": "1" if cpu_time else "0",
    }
    command = [sys.executable, "-m", "benchmarks.engine", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return {"error": f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    """The figures as markdown: median, and the fraction of the limit where there is one."""
    scenarios = [s for s in MEASURES if any(s in found for found in result["engines"].values())]
    head = " | ".join(f"{s}: {MEASURES[s][0]}, {MEASURES[s][1]}" for s in scenarios)
    lines = [f"| engine | {head} |", "|---|" + "---|" * len(scenarios)]

    def cells(found: dict[str, Any]) -> Iterator[str]:
        for scenario in scenarios:
            value = found.get(scenario)
            if value is None:
                yield ""
                continue
            limit = result["limits"].get(scenario)
            share = f" ({value / limit:.2f})" if limit else ""
            yield f"{value:.3g}{share}"

    for engine, found in result["engines"].items():
        lines.append(f"| {ENGINES[engine]} | {' | '.join(cells(found))} |")
    limits = {s: result["limits"][s] for s in scenarios if s in result["limits"]}
    lines.append(f"| limit of the machine | {' | '.join(cells(limits))} |")
    notes = [
        "",
        f"{result['machine']}, {result['threads']} threads, Qwen3 shapes {result['shape']}, medians "
        f"of {result['repeats']}{', processor time' * result['cpu_time']}, load average before the run {result['load']:.1f}. Reading "
        f"{result['limits']['read_bytes_per_second'] / 1e9:.1f} GB/s, bfloat16 products "
        f"{result['limits']['flops_per_second'] / 1e9:.0f} GFLOP/s; in brackets the fraction of "
        "what these allow.",
    ]
    if result.get("lookup"):
        found = result["lookup"]
        notes.append(
            f"Bundled reader, quoting: {found['with']:.0f} tokens/s with prompt lookup, "
            f"{found['without']:.0f} without; {found['accepted_with']:.0%} of its tokens came from "
            "accepted drafts."
        )
    for name, row in result.get("shuffled", {}).items():
        notes.append(
            f"Passages in another order, {name} reuse: {row['first_token']:.3g} s to the first token "
            f"behind 1,600 tokens; of the bundled reader's {row['answers']} answers "
            f"{row['same']:.1%} are the exact ones, F1 to these {row['f1']:.3f}."
        )
    notes += precision_table(result.get("precision", {}))
    notes += [f"Not run: {name}: {why}." for name, why in result["skipped"].items()]
    return "\n".join([*(lines if scenarios else []), *notes]) + "\n"


def precision_table(found: dict[str, dict[str, float]]) -> list[str]:
    if not found:
        return []
    head = [
        "",
        f"Bundled reader, {found['bfloat16']['tokens']} tokens of its answers, against bfloat16:",
        "",
        "| stored as | mean change of a token's log-probability | largest | largest of any logit "
        "| same most probable token | same answer |",
        "|---|---|---|---|---|---|",
    ]
    rows = [
        f"| {name} | {row['mean_logprob_change']:.4f} | {row['largest_logprob_change']:.3f} "
        f"| {row['largest_logit_change']:.3f} | {row['same_token']:.1%} | {row['same_answer']:.1%} |"
        for name, row in found.items()
    ]
    return [*head, *rows, ""]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--scenarios", default=SCENARIOS, help=f"default {SCENARIOS}")
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", type=Path, help="folder to keep the random weights in")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--busy", action="store_true", help="measure on a loaded machine too")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, processor time instead of wall time"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.worker:
        if options.worker == "weights":
            write_weights(options.weights, options.shape)
            print("{}")
        elif options.worker == "limits":
            print(json.dumps(measure_limits(options.weights)))
        elif options.worker == "lookup":
            print(json.dumps(lookup(options.repeats)))
        elif options.worker == "shuffled":
            print(json.dumps(shuffled(options.weights, options.repeats)))
        elif options.worker == "precision":
            print(json.dumps(precision()))
        else:
            found = work(options.worker, options.weights, options.scenarios, options.repeats)
            print(json.dumps(found))
        return 0

    load = os.getloadavg()[0]
    if load > 0.5 and not (options.busy or options.cpu_time):
        print(
            f"the load average is {load:.1f}: other work would be measured too. Wait until it is "
            "below 0.5, pass --cpu-time, or pass --busy and take no figure for granted.",
            file=sys.stderr,
        )
        return 2
    threads = 1 if options.cpu_time else options.threads
    with tempfile.TemporaryDirectory() as temporary:
        weights = options.weights or Path(temporary)
        shared = ["--weights", str(weights), "--shape", options.shape,
                  "--scenarios", options.scenarios, "--repeats", str(options.repeats)]  # fmt: skip

        def measured(worker: str) -> Any:
            return in_subprocess(["--worker", worker, *shared], threads, cpu_time=options.cpu_time)

        measured("weights")
        result: dict[str, Any] = {
            "machine": processor(), "threads": threads, "cpu_time": options.cpu_time, "shape": options.shape,
            "repeats": options.repeats, "load": load, "limits": measured("limits"),
            "engines": {}, "runs": {}, "skipped": {},
        }  # fmt: skip
        for engine in options.engines:
            why = available(engine)
            if why is None:
                found = measured(engine)
                why = found.pop("error", None)
            if why is not None:
                result["skipped"][engine] = why
                continue
            result["runs"][engine] = found
            result["engines"][engine] = {s: statistics.median(v) for s, v in found.items()}
        if "e" in options.scenarios:
            result["lookup"] = measured("lookup")
            if "error" in result["lookup"]:
                result["skipped"]["prompt lookup"] = result.pop("lookup")["error"]
        if "f" in options.scenarios:
            result["shuffled"] = measured("shuffled")
            if "error" in result["shuffled"]:
                result["skipped"]["shuffled passages"] = result.pop("shuffled")["error"]
        if "q" in options.scenarios:
            result["precision"] = measured("precision")
            if "error" in result["precision"]:
                result["skipped"]["precision"] = result.pop("precision")["error"]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "engine.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "engine.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
