import pytest

from rag.errors import SettingsError
from rag.settings import Settings


def test_arguments_beat_environment_beats_file_beats_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rag.toml").write_text('top_k = 5\nseed = 1\nkb = "toml"\n')
    settings = Settings.load({"RAG_TOP_K": "6", "RAG_SEED": "2"}, top_k=7)
    assert (settings.top_k, settings.seed, settings.kb, settings.dtype) == (7, 2, "toml", "auto")


@pytest.mark.parametrize("name", ["RAG_TOPK", "RAG_GENERATORR"])
def test_a_misspelt_variable_is_an_error_that_names_it(name):
    with pytest.raises(SettingsError, match=name):
        Settings.load({name: "1"})


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 0), ("top_k", "4"), ("temperature", -1.0), ("temperature", float("nan")), ("device", "tpu"),
     ("dtype", "int3"), ("kv_dtype", "int4"), ("passage_reuse", "naive"), ("generator", " "), ("top_p", True)],
)
def test_a_value_out_of_range_is_refused_at_birth(field, value):
    with pytest.raises(SettingsError, match=field):
        Settings(**{field: value})


def test_a_value_that_is_no_number_names_its_variable():
    with pytest.raises(SettingsError, match="RAG_TOP_K"):
        Settings.load({"RAG_TOP_K": "many"})
