"""Settings: frozen, checked at birth, no field that nothing reads.

Order of precedence: arguments, environment (`RAG_GENERATOR=...`), `rag.toml` in the current
folder (or the file that `RAG_CONFIG` names), defaults.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rag.errors import SettingsError
from rag.retrieval_steps import kept_steps


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything one can choose. `python -m rag doctor` prints the values in force."""

    kb: str = ".kb"  # folder of the knowledge base
    store: str = "embedded"  # "embedded" (SQLite and FAISS in that folder) or "milvus"
    milvus_uri: str = ""  # of the store "milvus": a file NAME.db, or http://host:19530, and #BASE
    embedder: str = "bundled"  # "bundled", a folder, or a Hugging Face name
    generator: str = "bundled"  # "bundled", a folder, a Hugging Face name, or openai:http://host/v1#model
    adapter: str = ""  # folder of `python -m rag.finetune`, for the generator it was trained on; "" is none
    remote_context_length: int = 0  # of a generator elsewhere, in its tokens; 0: what its server says
    remote_seconds: float = 60.0  # longest wait for the next piece from a generator elsewhere
    device: str = "auto"  # "auto", "auto-map" (over all GPUs), "cpu", "cuda", "cuda:1", "mps"
    dtype: str = "auto"  # "auto", "float32", "bfloat16", "float16", "int8", "int4"
    kv_dtype: str = "auto"  # of the KV cache: "auto" (the compute dtype), "int8"
    passage_reuse: str = "exact"  # "exact", or "approximate": faster, and answers may differ
    retrieval_without: str = ""  # steps of rag.retrieval_steps to leave out, separated by commas
    top_k: int = 4  # passages given to the generator
    chunk_tokens: int = 320  # largest chunk, in the embedder's tokens
    max_prompt_tokens: int = 6144  # prompt budget, in the generator's tokens
    max_new_tokens: int = 256  # longest answer, in the generator's tokens
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    sampling_top_k: int = 0  # 0 is off
    repetition_penalty: float = 1.0
    seed: int = 0
    citations: str = "mark"  # unsupported sentences of an answer: "mark" them, or "strict": take them out

    def __post_init__(self) -> None:
        for field_ in fields(self):
            value = getattr(self, field_.name)
            expected = {"str": str, "int": int, "float": float}[str(field_.type)]
            if expected is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field_.name, float(value))
            elif not isinstance(value, expected) or isinstance(value, bool):
                raise SettingsError(
                    f"setting {field_.name} must be {field_.type}, not {value!r}. "
                    f"Its default is {field_.default!r}."
                )
        for name in ("kb", "embedder", "generator"):
            if not getattr(self, name).strip():
                raise SettingsError(f"setting {name} is empty. Leave it out for its default.")
        if self.citations not in ("mark", "strict"):
            raise SettingsError(f"setting citations is {self.citations!r}; it is one of mark, strict.")
        if self.store not in ("embedded", "milvus"):
            raise SettingsError(f"setting store is {self.store!r}; it is one of embedded, milvus.")
        if (self.store == "milvus") != bool(self.milvus_uri.strip()):
            raise SettingsError(
                f"setting store is {self.store!r} and milvus_uri is {self.milvus_uri!r}. Give both or "
                "neither: store = 'milvus', milvus_uri = 'kb.db' or 'http://localhost:19530'."
            )
        if self.adapter and self.generator.startswith("openai:"):
            raise SettingsError(
                f"setting adapter is {self.adapter!r}, but {self.generator!r} runs on a server, whose weights "
                "are not here. Load the adapter there, or name a model on this machine."
            )
        kept_steps(self.retrieval_without)
        self._check_range("top_k", 1, 50)
        self._check_range("chunk_tokens", 32, 8192)
        self._check_range("max_prompt_tokens", 128, 1_000_000)
        self._check_range("max_new_tokens", 1, 100_000)
        self._check_range("remote_context_length", 0, 10_000_000)
        self._check_range("remote_seconds", 0.1, 86_400.0)
        self._check_range("temperature", 0.0, 5.0)
        self._check_range("top_p", 0.01, 1.0)
        self._check_range("sampling_top_k", 0, 1_000_000)
        self._check_range("repetition_penalty", 0.1, 10.0)
        self._check_range("seed", 0, 2**63 - 1)
        dtypes = ("auto", "float32", "bfloat16", "float16", "int8", "int4")
        if self.dtype not in dtypes:
            raise SettingsError(
                f"setting dtype is {self.dtype!r}; it is one of {', '.join(dtypes)}."
            )
        if self.kv_dtype not in ("auto", "int8"):
            raise SettingsError(f"setting kv_dtype is {self.kv_dtype!r}; it is one of auto, int8.")
        if self.passage_reuse not in ("exact", "approximate"):
            raise SettingsError(
                f"setting passage_reuse is {self.passage_reuse!r}; it is one of exact, approximate."
            )
        head = self.device.split(":")[0]
        if head not in ("auto", "auto-map", "cpu", "cuda", "mps"):
            raise SettingsError(
                f"setting device is {self.device!r}; it is one of auto, auto-map, cpu, cuda, "
                "cuda:N, mps."
            )

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not low <= value <= high:  # NaN fails too
            raise SettingsError(f"setting {name} is {value}; it must be from {low} to {high}.")

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **arguments: Any) -> Settings:
        """Settings from arguments (None counts as not given), environment, rag.toml, defaults.

        Raises SettingsError for an unknown name or a value out of range, saying where it stood.
        """
        environ = os.environ if environ is None else environ
        values = _from_toml(environ)
        values.update(_from_environment(environ))
        given = {name: value for name, value in arguments.items() if value is not None}
        _refuse_unknown(given, "argument")
        values.update(given)
        return cls(**values)


_TYPES: dict[str, str] = {field_.name: str(field_.type) for field_ in fields(Settings)}
# Read elsewhere and therefore not a misspelt setting: where the file is, and what must not stand in
# one: the page's password, the keys of those who are served, the key for a generator elsewhere.
_OTHER_VARIABLES = {"RAG_CONFIG", "RAG_PASSWORD", "RAG_SERVE_KEYS", "RAG_GENERATOR_KEY"}


def _refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    for name in values:
        if name not in _TYPES:
            raise SettingsError(
                f"unknown setting {name!r} ({where}). Known are: {', '.join(sorted(_TYPES))}."
            )


def _from_toml(environ: Mapping[str, str]) -> dict[str, Any]:
    named = environ.get("RAG_CONFIG")
    path = Path(named) if named else Path("rag.toml")
    if not path.is_file():
        if named:
            raise SettingsError(f"RAG_CONFIG names {named}, which is not a file.")
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid TOML: {error}") from error
    _refuse_unknown(values, str(path))
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith("RAG_") or variable in _OTHER_VARIABLES:
            continue
        name = variable[4:].lower()
        _refuse_unknown({name: text}, f"environment variable {variable}")
        convert = {"int": int, "float": float, "str": str}[_TYPES[name]]
        try:
            values[name] = convert(text)
        except ValueError as error:
            raise SettingsError(
                f"environment variable {variable} is {text!r}, which is not {_TYPES[name]}."
            ) from error
    return values
