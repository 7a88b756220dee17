"""Texts of any encoding are read or named; a file is found however its name is spelled."""

import shutil
import subprocess
import unicodedata

import pytest

from mae_core.errors import UserError
from mae_core.texts import find_named, missing_hint, read_lines, read_text, same_spelling

TEXT = "file,labels\nÄpfel.png,grün\n"
NFC, NFD = (unicodedata.normalize(form, "Café.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, encoding):
    (tmp_path / "x.csv").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "x.csv") == TEXT


@pytest.mark.parametrize(
    "encoding, named, converted_from",
    [
        ("latin-1", "line 2 holds the byte 0xc4, 'Ä' in Latin-1", "LATIN1"),
        ("cp1252", "line 2 holds the byte 0xc4, 'Ä' in Latin-1", "LATIN1"),
        ("utf-16", "is in UTF-16, not in UTF-8", "UTF-16"),
        ("utf-16-le", "is in UTF-16LE, not in UTF-8", "UTF-16LE"),
        ("utf-16-be", "is in UTF-16BE, not in UTF-8", "UTF-16BE"),
        ("utf-32", "is in UTF-32, not in UTF-8", "UTF-32"),
    ],
)
def test_another_encoding_is_named_with_a_command_that_converts_it(tmp_path, encoding, named, converted_from):
    file = tmp_path / "it's.csv"
    file.write_bytes(TEXT.encode(encoding))
    with pytest.raises(UserError) as caught:
        read_text(file)
    message = str(caught.value)
    assert named in message and str(file) in message and f"iconv -f {converted_from} -t UTF-8" in message
    if shutil.which("iconv"):
        command = message.partition("by: ")[2]
        subprocess.run(command.replace("NEW", "new.csv"), shell=True, check=True, cwd=tmp_path)
        assert read_text(tmp_path / "new.csv") == TEXT


def test_what_is_no_text_or_not_there_is_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(bytes(range(8)))
    with pytest.raises(UserError, match="is not a text file"):
        read_text(tmp_path / "x.txt")
    with pytest.raises(UserError, match="No such file"):
        read_text(tmp_path / "y.txt")


def test_lines_end_as_windows_and_unix_end_them(tmp_path):
    (tmp_path / "x.txt").write_bytes("a\r\nb\x85c\nd".encode())
    assert read_lines(tmp_path / "x.txt") == ["a", "b\x85c", "d"]


@pytest.mark.parametrize(
    "stored, written",
    [
        ("a/b.png", "a\\b.png"),
        ("a/b.png", ".\\A\\B.PNG"),
        ("a/b.JPG", "a/b.jpg"),
        ("a/b.jpg", "a/b.JPG"),
        (f"a/{NFD}", f"a/{NFC}"),
        (f"a/{NFC}", f"a/{NFD}"),
        (f"{NFD}/x.png", f"{NFC}/X.png"),
        ("a/b\\c.png", "a/b\\c.png"),
        ("a/b.png", "a/../a/b.png"),
    ],
)
def test_a_file_is_found_however_it_is_spelled(tmp_path, stored, written):
    (tmp_path / stored).parent.mkdir()
    (tmp_path / stored).write_text("")
    found = find_named(tmp_path, written)
    assert found is not None and found.resolve() == (tmp_path / stored).resolve()
    assert find_named(tmp_path, str(tmp_path / written)) is not None


def test_of_two_spellings_neither_is_guessed(tmp_path):
    for name in ("a.JPG", "A.jpg"):
        (tmp_path / name).write_text("")
    assert find_named(tmp_path, "a.JPG") == tmp_path / "a.JPG"
    assert find_named(tmp_path, "a.jpg") is None
    assert "A.jpg and a.JPG do" in missing_hint(tmp_path, "a.jpg")


def test_a_missing_file_has_a_hint(tmp_path):
    (tmp_path / "a.png").write_text("")
    (tmp_path / "street_0012.png").write_text("")
    assert missing_hint(tmp_path, "a.jpg") == "; there is a.png"
    assert missing_hint(tmp_path, "street_012.png") == "; there is street_0012.png"
    assert missing_hint(tmp_path, "b\\a.png") == f", nor does its folder {tmp_path / 'b'}"
    assert missing_hint(tmp_path, "zzz") == "" and find_named(tmp_path, "zzz") is None
    assert find_named(tmp_path, "x" * 5000) is None


def test_names_that_look_the_same():
    assert same_spelling(NFC, NFD) and not same_spelling("a", "A")
