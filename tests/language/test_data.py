from __future__ import annotations

import csv
import json
import os
import pickle
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guerdon.errors import DataError
from guerdon.language.data import read_rows, require_columns

ROWS = [{"prompt": f"{a} + {b} =", "answer": str(a + b), "level": a} for a in range(4) for b in range(3)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=5)


def write_saved(path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


WRITERS = {
    "rows.jsonl": write_jsonl,
    "lines.json": write_jsonl,
    "list.json": write_json,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
    "saved": write_saved,
}


def message(path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert text.rstrip().endswith((".", "?"))
    return text


def file(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# every form


@pytest.fixture(params=WRITERS)
def form(request):
    return request.param


def write(tmp_path, form, rows=ROWS):
    path = tmp_path / form
    WRITERS[form](path, rows)
    return path


def expected(form, rows=ROWS):
    return [{name: str(value) for name, value in row.items()} for row in rows] if form.endswith("csv") else rows


def test_rows_come_back(tmp_path, form):
    rows, wanted = read_rows(write(tmp_path, form)), expected(form)
    assert len(rows) == len(wanted)
    assert rows.columns == ("prompt", "answer", "level")
    assert list(rows) == wanted
    assert [rows[7], rows[0], rows[-1]] == [wanted[7], wanted[0], wanted[-1]]
    assert rows[2:9:3] == wanted[2:9:3]
    with pytest.raises(IndexError, match="no row 12; it has 12"):
        rows[12]
    with pytest.raises(IndexError):
        rows[-13]


def test_changing_a_row_leaves_the_data(tmp_path, form):
    rows = read_rows(write(tmp_path, form))
    rows[3]["prompt"] = "other"
    assert rows[3] == expected(form)[3]


def test_rows_survive_pickling(tmp_path, form):
    rows = read_rows(write(tmp_path, form))
    assert pickle.loads(pickle.dumps(rows))[5] == expected(form)[5]


def test_text_beyond_ascii_and_lines(tmp_path, form):
    odd = [
        {"prompt": "a\nb, \"c\" ; 'd'\u2028e\u0085f\x0bg", "answer": "√2 ≠ 1,4"},
        {"prompt": " leading\ttab\r\n", "answer": "漢字🙂"},
        {"prompt": "x" * 200_000, "answer": ""},
    ]
    assert list(read_rows(write(tmp_path, form, odd))) == odd


def test_require_columns(tmp_path, form):
    rows = read_rows(write(tmp_path, form))
    require_columns(rows, ["prompt", "answer"])
    with pytest.raises(
        DataError, match=r"no column 'anwser'\. Did you mean 'answer'\? There are: prompt, answer, level\."
    ):
        require_columns(rows, ["prompt", "anwser"])


def test_null_is_a_missing_value(tmp_path, form):
    if form.endswith("csv"):
        pytest.skip("CSV has no null")
    holes = [{**row, "answer": None if i in (4, 6, 11) else row["answer"]} for i, row in enumerate(ROWS)]
    rows = read_rows(write(tmp_path, form, holes))
    line = r" \(line 5\)" if "list" not in form and form.endswith(("jsonl", "json")) else ""
    with pytest.raises(
        DataError, match=rf"3 of 12 rows lack the column 'answer'.*the first is row 4{line}, which has prompt, level"
    ):
        require_columns(rows, ["answer"])
    require_columns(rows, ["level"])


def test_message_prompts(tmp_path, form):
    if form.endswith("csv"):
        pytest.skip("CSV holds text only")
    chat = [
        {"prompt": [{"role": "system", "content": "short"}, {"role": "user", "content": f"{i}?"}]} for i in range(4)
    ]
    assert list(read_rows(write(tmp_path, form, chat))) == chat


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("", "prompt is empty"),
        ([], "prompt is an empty list of messages"),
        (7, "prompt must be text or a list of messages; got a number"),
        ([{"role": "user", "content": None}], "message 1 of prompt lacks 'content'; it has role"),
        (
            [{"role": "user", "content": "a"}, {"role": 3, "content": "b"}],
            "'role' of message 2 of prompt must be text; got a number",
        ),
        ([{"role": "user", "text": "a"}], "message 1 of prompt lacks 'content'; it has role, text"),
        (["hello"], "message 1 of prompt must be an object with role and content; got text"),
        ({"role": "user", "content": "a"}, "prompt must be text or a list of messages; got an object"),
    ],
)
def test_bad_prompts_are_named(tmp_path, prompt, problem):
    lines = write(tmp_path, "rows.jsonl", [{"prompt": "good"}, {"prompt": prompt}])
    assert f"1 row is malformed:\n  line 2: {problem}" in message(lines)
    listed = write(tmp_path, "list.json", [{"prompt": "good"}, {"prompt": prompt}])
    assert f"row 1: {problem}" in message(listed)


def test_bad_prompts_in_arrow_are_named(tmp_path):
    for form in ("rows.parquet", "saved"):
        path = write(tmp_path, form, [{"prompt": "good"}, {"prompt": ""}])
        assert "row 1: prompt is empty" in message(path)
    assert "row 0: prompt must be text" in message(write(tmp_path, "rows.parquet", [{"prompt": 1}]))


# places


def test_missing_file_offers_the_nearest(tmp_path):
    write(tmp_path, "rows.jsonl")
    assert "there is no such file" in message(tmp_path / "rosw.jsonl")
    assert "Did you mean 'rows.jsonl'?" in message(tmp_path / "rosw.jsonl")
    assert "nor the folder" in message(tmp_path / "nowhere" / "rows.jsonl")


def test_directory_lists_its_files(tmp_path):
    path = write(tmp_path, "rows.jsonl")
    assert (
        f"is a directory, and not one saved by datasets.Dataset.save_to_disk. Name one of its files: {path}."
        in message(tmp_path)
    )
    (tmp_path / "bare").mkdir()
    assert "There is no data file in it." in message(tmp_path / "bare")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_empty_file(tmp_path, name):
    assert "is empty (0 bytes)" in message(file(tmp_path, name, b""))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.jsonl", "\n  \n", "only blank lines"),
        ("rows.json", "[]", "an empty list"),
        ("rows.csv", "prompt,answer\n", "a header and no rows"),
        ("rows.csv", "\n\n", "no header"),
    ],
)
def test_files_without_rows(tmp_path, name, content, problem):
    assert problem in message(file(tmp_path, name, content))


def test_parquet_without_rows(tmp_path):
    table = pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "holds no rows" in message(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.jsonl.gz"])
def test_unknown_ending(tmp_path, name):
    text = message(file(tmp_path, name, "x"))
    assert "is not known" in text
    assert ".jsonl, .json, .csv, .parquet" in text
    assert ("Decompress it first." in text) == name.endswith("gz")


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, "rows.jsonl")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "open", refuse)
    assert "cannot be read: Permission denied." in message(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "not a regular file" in message(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"prompt": "ä"}\n'.encode("utf-16"), "looks like UTF-16"),
        ('{"prompt": "a"}\n'.encode("utf-16-le"), "looks like UTF-16"),
        (b"\x1f\x8b\x08\x00abc", "is compressed"),
        (b"PAR1abcd", "is a parquet file"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_other_contents(tmp_path, name, content, problem):
    assert problem in message(file(tmp_path, name, content))


def test_latin_1_is_named_with_its_byte(tmp_path):
    text = message(file(tmp_path, "rows.jsonl", b'{"prompt": "a"}\n' + '{"prompt": "ä"}\n'.encode("latin-1")))
    assert "line 2: not UTF-8 (byte 0xe4 at byte 13)" in text
    assert "line 2: not UTF-8 (byte 0xe4 at byte 1)" in message(file(tmp_path, "rows.csv", b"prompt,answer\n\xe4,b\n"))
    assert "line 1: not UTF-8 (byte 0xe4 at byte 1)" in message(file(tmp_path, "head.csv", b"\xe4,answer\na,b\n"))
    assert "not UTF-8 (byte 0xe4" in message(file(tmp_path, "list.json", b'["\xe4"]'))


@pytest.mark.parametrize("name", ["rows.jsonl", "list.json", "rows.csv"])
def test_byte_order_mark_is_no_part_of_the_first_name(tmp_path, name):
    path = write(tmp_path, name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows = read_rows(path)
    assert rows.columns[0] == "prompt"
    assert list(rows) == expected(name)


# JSON


def test_malformed_lines_are_numbered_and_counted(tmp_path):
    bad = ['{"prompt": "a" "b"}', "not json", "[1, 2]", "7", '{"prompt": }', "null", "{]"]
    lines = ['{"prompt": "good"}', "", *bad, '{"prompt": "good"}']
    text = message(file(tmp_path, "rows.jsonl", "\n".join(lines) + "\n"))
    assert "7 rows are malformed; the first 5:" in text
    assert [int(number) for number in re.findall(r"^  line (\d+):", text, re.MULTILINE)] == [3, 4, 5, 6, 7]
    assert "line 3: Expecting ',' delimiter at column 16" in text
    assert "line 5: must be a JSON object; got a list: [1, 2]" in text
    assert "truncated" not in text


def test_truncated_jsonl(tmp_path):
    whole = "".join(json.dumps(row) + "\n" for row in ROWS)
    text = message(file(tmp_path, "rows.jsonl", whole[:-9]))
    assert "line 12: truncated, the line has no end" in text
    assert "The file looks truncated" in text
    assert len(read_rows(file(tmp_path, "rows.jsonl", whole[:-1]))) == 12  # a whole row without its line end is a row


@given(cut=st.integers(0, 400))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_a_cut_file_gives_whole_rows_or_says_truncated(tmp_path, cut):
    rows = [{"prompt": f'é "{i}"', "answer": {"list": [i, None, 1.5]}} for i in range(8)]
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    content = whole[: min(cut, len(whole))]
    path = file(tmp_path, "rows.jsonl", content)
    if content.endswith((b"\n", b"}}")):
        assert list(read_rows(path)) == rows[: content.count(b"}}")]
    else:
        text = message(path)
        assert "truncated" in text or "empty" in text


def test_json_list_faults(tmp_path):
    whole = json.dumps(ROWS, indent=1)
    for size in (1, 20, len(whole) // 2, len(whole) - 1):
        assert "truncated, the list is never closed" in message(file(tmp_path, "rows.json", whole[:size]))
    assert "line 1, column 18: Expecting ',' delimiter" in message(
        file(tmp_path, "rows.json", '[{"prompt": "a"} {"prompt": "b"}]')
    )
    assert "row 1: must be an object; got a number" in message(file(tmp_path, "rows.json", '[{"prompt": "a"}, 3]'))
    assert "line 2, column 1: Extra data" in message(file(tmp_path, "rows.jsonl", '[1]\n{"prompt": "a"}\n'))


def test_one_object_over_many_lines(tmp_path):
    text = message(file(tmp_path, "rows.json", json.dumps({"version": 1, "data": ROWS}, indent=1)))
    assert "single JSON object over several lines, with the keys version, data" in text


def test_hostile_json(tmp_path):
    deep = file(tmp_path, "rows.jsonl", '{"prompt": ' + "[" * 200_000 + "\n")
    assert "line 1" in message(deep)
    assert "line 1" in message(file(tmp_path, "rows.jsonl", '{"prompt": "a", "n": ' + "9" * 10_000 + "}\n"))
    assert "rows.json" in message(file(tmp_path, "rows.json", "[" * 200_000))


def test_carriage_returns_and_blank_lines(tmp_path):
    path = file(tmp_path, "rows.jsonl", b'\r\n{"prompt": "a"}\r\n \t\r\n{"prompt": "b"}\r\n\r\n')
    rows = read_rows(path)
    assert list(rows) == [{"prompt": "a"}, {"prompt": "b"}]
    assert rows.where(1) == "row 1 (line 4)"


def test_rows_with_different_columns(tmp_path):
    rows = read_rows(write(tmp_path, "rows.jsonl", [{"prompt": "a", "n": 1}, {"prompt": "b", "m": 2}, {"promt": "c"}]))
    assert rows.columns == ("prompt", "n", "m", "promt")
    with pytest.raises(
        DataError,
        match=r"1 of 3 rows lack the column 'prompt'.*row 2 \(line 3\), which has promt\. Did you mean 'promt'",
    ):
        require_columns(rows, ["prompt"])
    with pytest.raises(DataError, match=r"2 of 3 rows lack the column 'm'.*row 0 \(line 1\), which has prompt, n\."):
        require_columns(rows, ["m"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_that_changes_is_noticed(tmp_path, name):
    path = write(tmp_path, name)
    rows = read_rows(path)
    with path.open("a") as stream:
        stream.write("more\n")
    with pytest.raises(DataError, match="has changed since it was opened"):
        rows[0]
    path.unlink()
    with pytest.raises(DataError, match="can no longer be read: No such file"):
        rows[0]


def test_rows_are_found_after_the_working_directory_changes(tmp_path, monkeypatch):
    write(tmp_path, "rows.jsonl")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    rows = read_rows("rows.jsonl")
    monkeypatch.chdir(tmp_path / "below")
    assert rows[1] == ROWS[1]


def test_memory_is_a_few_bytes_a_row(tmp_path):
    path = file(tmp_path, "rows.jsonl", '{"prompt": "abc", "answer": "d"}\n' * 10_000)
    rows = read_rows(path)
    kept = sum(sys.getsizeof(value) for value in vars(rows).values())
    assert kept < 12 * 10_000
    assert rows[9_999]["answer"] == "d"


# CSV


def test_csv_rows_over_several_lines_keep_their_line(tmp_path):
    path = file(tmp_path, "rows.csv", 'prompt,answer\n"a\nb",1\n\n"c",2\n"d",""\n')
    rows = read_rows(path)
    assert [row["prompt"] for row in rows] == ["a\nb", "c", "d"]
    assert [rows.where(i) for i in range(3)] == ["row 0 (line 2)", "row 1 (line 5)", "row 2 (line 6)"]


def test_csv_faults(tmp_path):
    text = message(file(tmp_path, "rows.csv", 'prompt,answer\na,1\nb\nc,2,3\n"d"x,4\n,5\ne,6\n'))
    assert "4 rows are malformed:" in text
    assert "line 3: 1 values for 2 columns: b" in text
    assert "line 4: 3 values for 2 columns: c,2,3" in text
    assert "line 5: ',' expected after '\"'" in text
    assert "line 6: prompt is empty" in text


@pytest.mark.parametrize(
    ("end", "problem"), [("b", "line 3: truncated, the line has no end"), ('"b', "line 3: truncated: a quote")]
)
def test_truncated_csv(tmp_path, end, problem):
    text = message(file(tmp_path, "rows.csv", f"prompt,answer\na,1\n{end}"))
    assert problem in text
    assert "The file looks truncated" in text


def test_csv_headers(tmp_path):
    assert "the header names 'a' twice" in message(file(tmp_path, "rows.csv", "a,b,a\n1,2,3\n"))
    assert "column 2 has no name" in message(file(tmp_path, "rows.csv", "a,,b\n1,2,3\n"))
    assert "the header cannot be read" in message(file(tmp_path, "rows.csv", '"a"x,b\n1,2\n'))


def test_csv_leaves_the_global_field_limit(tmp_path):
    before = csv.field_size_limit()
    read_rows(write(tmp_path, "rows.csv"))[0]
    message(file(tmp_path, "bad.csv", "a,b\n1\n"))
    assert csv.field_size_limit() == before


text_values = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)


@given(values=st.lists(st.tuples(text_values.filter(bool), text_values), min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_what_is_written_is_read(tmp_path, values):
    wanted = [{"prompt": prompt, "answer": answer} for prompt, answer in values]
    for form in ("rows.jsonl", "rows.csv"):
        rows = read_rows(write(tmp_path, form, wanted))
        assert [rows[i] for i in reversed(range(len(wanted)))] == wanted[::-1]


# Arrow


def test_truncated_parquet(tmp_path):
    path = write(tmp_path, "rows.parquet")
    whole = path.read_bytes()
    for size in (4, len(whole) // 2, len(whole) - 1):
        assert "is truncated: the footer" in message(file(tmp_path, "rows.parquet", whole[:size]))
    assert "is not a parquet file" in message(file(tmp_path, "rows.parquet", b'{"prompt": "a"}\n'))


def test_damaged_parquet(tmp_path):
    whole = write(tmp_path, "rows.parquet").read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    assert "is damaged" in message(
        file(tmp_path, "rows.parquet", whole[:-footer] + b"\xff" * (footer - 8) + whole[-8:])
    )


def test_parquet_with_a_column_twice(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "column 'prompt' is there twice" in message(tmp_path / "rows.parquet")


def test_saved_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    both = datasets.DatasetDict({n: datasets.Dataset.from_list(ROWS[:k]) for n, k in (("train", 8), ("test", 3))})
    both.save_to_disk(str(tmp_path / "both"))
    folder = tmp_path / "both"
    assert f"several splits. Name one, such as {folder}:test. There are: test, train." in message(folder)
    assert list(read_rows(f"{folder}:train")) == ROWS[:8]
    assert list(read_rows(folder / "test")) == ROWS[:3]  # each split is a saved folder of its own
    assert "no split 'trian'. Did you mean 'train'?" in message(f"{folder}:trian")
    assert "without splits. Drop ':train'." in message(f"{write(tmp_path, 'saved')}:train")
    assert "only a saved datasets folder has splits. Drop ':train'." in message(
        f"{write(tmp_path, 'rows.jsonl')}:train"
    )


def test_saved_with_a_format_gives_plain_values(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).with_format("numpy").save_to_disk(str(tmp_path / "saved"))
    rows = read_rows(tmp_path / "saved")
    assert rows[4] == ROWS[4]
    assert type(rows[4]["level"]) is int


def test_damaged_saved_folder(tmp_path):
    path = write(tmp_path, "saved")
    arrow = next(path.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:40])
    assert "is damaged or incomplete" in message(path)
    arrow.unlink()
    assert "is damaged or incomplete" in message(path)
