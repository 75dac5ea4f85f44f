"""Settings that people write in YAML: what they mean, and what is refused in one sentence."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptp_ds.errors import UserError
from ptp_ds.settings_file import parse_yaml, read_settings

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(value=VALUES)
def test_json_is_yaml(value):
    assert parse_yaml(json.dumps(value), "f") == value


def test_words_and_numbers_mean_what_they_say():
    """PyYAML's own rules, those of YAML 1.1, take 1e-3 for text, no for false, 010 for 8 and a date for a date."""
    text = (
        "- {name: no, lr: 1e-3, seed: 010, sigma: .5, at: 2026-01-01, on: on, none: ~, empty: , flag: true, hex: 0x1F}"
    )
    (found,) = parse_yaml(text, "f")
    assert found == {
        "name": "no", "lr": 0.001, "seed": 10, "sigma": 0.5, "at": "2026-01-01", "on": "on", "none": None,
        "empty": None, "flag": True, "hex": "0x1F",
    }  # fmt: skip
    assert isinstance(found["seed"], int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x", r"an alias \(\*name\) in line 2; write the value out"),
        ("a: 1\na: 2", "the key 'a' comes twice, line 2"),
        ("a: !!python/object/apply:os.system [x]", "the tag .* in line 1; settings are plain values"),
        ("!!timestamp 2026-01-01", "the tag"),
        ("a: [1", "line 1, column 6"),
        ("1: 2", "the key 1 in line 1 is no text; quote it"),
        ("a: 1e999", "the number 1e999 in line 1 is too large"),
        ("a: " + "9" * 5000, "a number of thousands of digits in line 1"),
        ("[" * 3000, "nested too deeply"),
        ("\x00", "unacceptable character"),
        ("a: 1\n---\nb: 2", "another document, line 2"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(UserError, match=f"^f: not valid YAML .*{message}"):
        parse_yaml(text, "f")


def test_the_name_says_which(tmp_path):
    for name, text in (("a.json", '{"lr": 1e-3}'), ("a.yaml", "lr: 1e-3"), ("a.YML", "lr: 1e-3")):
        (tmp_path / name).write_text(text)
        assert read_settings(tmp_path / name, "f") == {"lr": 0.001}
    (tmp_path / "b.json").write_text("lr: 1e-3")
    with pytest.raises(UserError, match="not valid JSON"):
        read_settings(tmp_path / "b.json", "f")
