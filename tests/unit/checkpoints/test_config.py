"""Single entries of a config, read and set, and its text else left as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codebook_tools.checkpoints.config import entry_of, parse_config, with_entries
from codebook_tools.errors import CodebookError


def test_an_entry_has_a_dotted_key_and_is_none_where_it_is_missing() -> None:
    config = {"k": 3, "vq_config": {"num_embeddings": 16, "deep": {"er": [1]}}, "none": None}
    keys = ("k", "vq_config.num_embeddings", "vq_config.deep.er")
    assert [entry_of(config, key) for key in keys] == [3, 16, [1]]
    assert [entry_of(config, key) for key in ("x", "vq_config.x", "k.x", "none", "none.x", "")] == [None] * 6


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        ('{\n\t"a": NaN,\n\t"k" : 16\n}', "k", 8, '{\n\t"a": NaN,\n\t"k" : 8\n}'),
        ('{"k": 8.0}', "k", 8, '{"k": 8}'),
        ('{"k": true}', "k", 1, '{"k": 1}'),
        ('{"k":16,"b":[1, 2]}', "k", 8, '{"k":8,"b":[1, 2]}'),
        ('{"a": Infinity, "k": 1, "b": -Infinity}', "k", 8, '{"a": Infinity, "k": 8, "b": -Infinity}'),
        ('{"a": {"k": 16}, "k": 16}', "k", 8, '{"a": {"k": 16}, "k": 8}'),
        ('{"a": {"k": 16}, "k": 16}', "a.k", 8, '{"a": {"k": 8}, "k": 16}'),
        ('{"b": "\\"k\\": 16, {[", "k": 16}', "k", 8, '{"b": "\\"k\\": 16, {[", "k": 8}'),
        ('{"\\u006b": 16}', "k", 8, '{"\\u006b": 8}'),  # the same name, spelt otherwise
        ('{"k": 1, "k": 2}', "k", 8, '{"k": 1, "k": 8}'),  # the last of a name is the one that counts
        (' \r\n{ "k"\t:\r\n16 \r\n,"b" :{ } }\r\n', "k", 8, ' \r\n{ "k"\t:\r\n8 \r\n,"b" :{ } }\r\n'),
        ('{"k": "16"}', "k", 8, '{"k": 8}'),
        ('{"r": [\n  1.5,\n  3.0\n ], "k": 1}', "r", [1.2, 2.4], '{"r": [\n  1.2,\n  2.4\n ], "k": 1}'),
        ('{"r": [1.5, [3, 4]]}', "r", [1.5, [3, 5]], '{"r": [1.5, [3, 5]]}'),
        ('{"r": [1.5, 3.0]}', "r", [2.0], '{"r": [2.0]}'),
        ('{"r": []}', "r", [2.0], '{"r": [2.0]}'),
        ('{"a": 1}', "k", 8, '{\n  "a": 1,\n  "k": 8\n}\n'),
        ('{"a": {"b": 1}}', "a.k", 8, '{\n  "a": {\n    "b": 1,\n    "k": 8\n  }\n}\n'),
        ("{}", "a.k", 8, '{\n  "a": {\n    "k": 8\n  }\n}\n'),
        ('\ufeff{"n": "Ünal", "k": 1}', "k", 8, '\ufeff{"n": "Ünal", "k": 8}'),
    ],
)
def test_one_entry_is_set_and_the_rest_left_as_it_was(text: str, key: str, value: object, expected: str) -> None:
    assert with_entries(text.encode(), {key: value}).decode() == expected
    assert with_entries(expected.encode(), {key: value}).decode() == expected


def test_several_entries_are_set_at_once_in_the_encoding_of_the_text() -> None:
    text = '{"vq": {"k": 1, "r": [1, 2]}, "n": 3}'
    changed = with_entries(text.encode("utf-16"), {"vq.k": 10, "n": 30, "vq.r": [1.25, 2.5]})
    assert changed == '{"vq": {"k": 10, "r": [1.25, 2.5]}, "n": 30}'.encode("utf-16")
    assert with_entries(text.encode(), {}) == text.encode()


def test_a_key_that_leads_through_a_number_and_a_file_without_an_object_are_refused(tmp_path: Path) -> None:
    for text in ('{"a": 3}', '{"a": [1]}', '{"a": null}', '{"a": "text"}'):
        with pytest.raises(CodebookError, match=r"no place for k: .* is no object"):
            with_entries(text.encode(), {"a.k": 8})
    for text, message in (("{", "is no JSON"), ("[]", "holds a JSON list"), ("[" * 99999, "is no JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CodebookError, match=message):
            parse_config(tmp_path / "config.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(config=st.dictionaries(st.text(max_size=3), JSON, max_size=4), value=JSON, indent=st.sampled_from([None, 0, 3]))
def test_any_entry_of_any_config_can_be_set(config: dict[str, object], value: object, indent: int | None) -> None:
    for key in config:
        if "." not in key:
            text = json.dumps(config, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
            edited = json.loads(with_entries(text, {key: value}))
            assert edited == {**config, key: value} and list(edited) == list(config)
