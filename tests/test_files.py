"""Files that others wrote: every limit of ptp_ds.files, and what passes it."""

import json
import os

import pytest

from ptp_ds.files import (
    brief,
    in_moved_run,
    is_file,
    is_folder,
    listed,
    parse_json,
    plain_name,
    read_json,
    read_text,
    require_writable_folder,
)


@pytest.mark.parametrize("name", ["CB", "AX-b", "RTE.pet", "my task", "Aufgabe \u00e4", "a" * 128])
def test_plain_names(name):
    assert plain_name(name, "it") == name


@pytest.mark.parametrize(
    "name", ["", "..", ".git", "../a", "a/../b", "/a", "a\\b", "~a", "a\0", "a\n", "a" * 129, None, 3]
)
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match=r"^it is .*; expected a plain name of at most 128 bytes"):
        plain_name(name, "it")


def test_values_in_messages_are_short_and_on_one_line():
    for value in ("x" * 10**6, "a\nb\x1b[31m", {"a": ["y" * 1000]}, [1] * 10**4, None):
        assert len(brief(value)) <= 120
        assert brief(value).isprintable()
    assert brief("a\nb") == r"'a\nb'"
    assert listed(["a\nb", *map(str, range(20))]) == r"a\nb, 0, 1, 2, 3, 4, 5, 6 and 13 more"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not valid JSON \(Expecting property name enclosed in double quotes, column 2\)"),
        ("{\n1", r"not valid JSON \(.*, line 2, column 1\)"),
        ('{"a": 1, "b": 2, "a": 3}', r"not valid JSON \(the key 'a' comes twice\)"),
        ("[" * 100_000, r"not valid JSON \(nested deeper than 64 levels\)"),
        ("[" * 65 + "]" * 65, r"not valid JSON \(nested deeper than 64 levels\)"),
        ("1" * 5000, r"not valid JSON \(a number of thousands of digits\)"),
        (r'["\ud800"]', r"half a surrogate pair \(\\udXXX\) stands alone"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        parse_json(text, "here", once=True)


@pytest.mark.parametrize(
    "text", ["[" * 64 + "]" * 64, '["' + "[" * 1000 + '"]', r'["\ud83d\ude00", "[{"]', "{}", "[NaN, 1e999, -1]", '"a"']
)
def test_json_that_passes(text):
    assert repr(parse_json(text, "here", once=True)) == repr(json.loads(text))


def test_byte_order_marks_and_line_ends(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a":\r\n 1}\r\n')
    assert read_json(tmp_path / "a.json", "here") == {"a": 1}


def test_what_stands_in_a_file_s_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "latin").write_bytes(b"\xe4")
    (tmp_path / "large").write_bytes(b"ab")
    for name, message in (("pipe", "Not a regular file"), ("zero", "Not a regular file"), ("loop", "Too many levels"),
                          (".", "Is a directory"), ("none", "No such file or directory; look again"),
                          ("latin", "not UTF-8 text"), ("large", "2 bytes; expected at most 1"),
                          ("x" * 300, "File name too long")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^here: {message}"):
            read_text(tmp_path / name, "here", most=1, hint="; look again")
    for look in (is_file, is_folder):
        assert not any(map(look, (tmp_path / "pipe", tmp_path / "loop", tmp_path / ("x" * 300), tmp_path / "none")))
    assert is_file(tmp_path / "latin")
    assert is_folder(tmp_path)


def test_what_lay_in_a_run_s_folder_is_found_where_that_is_now(tmp_path):
    now = tmp_path / "moved" / "members" / "x"
    (now / "data").mkdir(parents=True)
    (tmp_path / "moved" / "data").mkdir()
    assert in_moved_run("a/r/data", "a/r", now) == in_moved_run("./a/r/data/", "a//r", now) == str(now / "data")
    assert in_moved_run("/a/r/data", "/a/r", now) == str(now / "data")
    assert in_moved_run("ten/data", "ten/members/x", now) == str(tmp_path / "moved" / "data")
    for path, was in (
        ("a/r/gone", "a/r"), ("a/data", "a/r"), ("a/r/../data", "a/r"), ("a/r", "a/r"), ("a/rest/data", "a/r"),
        (None, "a/r"), ("a/r/data", None), (3, "a/r"), ("", ""),
    ):  # fmt: skip
        assert in_moved_run(path, was, now) is None


def test_a_folder_to_write_in_need_not_be_there(tmp_path, monkeypatch):
    for name in ("", "new", "new/below"):
        assert require_writable_folder("--out", str(tmp_path / name)) == tmp_path / name
    assert list(tmp_path.iterdir()) == [], "nothing is made"
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to(tmp_path / "gone")
    cases = {"file": "is a file; give a folder", "file/x/y": r": .*/file is a file; give a folder",
             "lost": "is a link that leads nowhere; give a folder"}  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            require_writable_folder("--out", str(tmp_path / name))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"this user can't write in .*; give another folder"):
        require_writable_folder("--out", str(tmp_path / "new"))
