"""Tables in files: every format gives the same numbers, and what is damaged says so."""

import bz2
import csv
import decimal
import gzip
import importlib.util
import io
import json
import lzma
import pickle
import re
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_files import MASKS, SCORES, WRITERS, check

from ksm_ext.tables.files import printable, read_document, write_columns
from ksm_ext.tables.scores import read_scores


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_table(kind, tmp_path):
    if kind.startswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "scores.npz"  # the ending says nothing
    WRITERS[kind](path)
    check(read_scores(path))
    assert str(read_scores(path)).startswith("9 subsets of 4 tasks (wiki, code, ")


def test_standard_input(monkeypatch, tmp_path):
    WRITERS["csv"](tmp_path / "x")
    stdin = io.TextIOWrapper(io.BytesIO((tmp_path / "x").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    check(read_scores("-"))


# -- single files -------------------------------------------------------------------------------


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x").write_bytes(b"PAR1")
    with pytest.raises(RuntimeError, match=r'pip install "ksm_ext\[tables\]"'):
        read_document(tmp_path / "x")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be a file, got .*/none"):
        read_document(tmp_path / "none")


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_what_is_written_is_read_again(form, tmp_path):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    columns = {"task": ["a, b", 'c "d"'], "value": [0.1 + 0.2, float("nan")], "count": [1, 2]}
    path = tmp_path / f"x.{form}"
    write_columns(columns, str(path), None)
    again = read_document(path)
    assert list(again) == list(columns) and again["task"].tolist() == columns["task"]
    np.testing.assert_array_equal(again["value"], columns["value"])
    np.testing.assert_array_equal(again["count"], [1, 2])


def test_blanks_at_the_ends_of_names_are_those_of_csv_alone(tmp_path):
    (tmp_path / "x").write_text("a , b,key\n1, 2 , r 1 \n")
    found = read_document(tmp_path / "x")
    assert list(found) == ["a", "b", "key"] and found["b"] == [2.0] and found["key"] == ["r 1"]
    (tmp_path / "x").write_text('[{"a ": 1, " key": " r 1 "}]')
    found = read_document(tmp_path / "x")
    assert list(found) == ["a ", " key"] and found[" key"] == [" r 1 "]


# -- files of other programs, and damaged ones --------------------------------------------------


def zipped(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name.replace("_npy", ".npy"), member)
    return content.getvalue()


def npy(shape, numbers, kind="<f8"):
    """A member that declares ``shape`` and holds some numbers."""
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    content = np.asarray(numbers, dtype=kind).tobytes()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


MASKS_NPY = npy("(2, 2)", [1, 0, 0, 1])


def scored(shape, numbers, kind="<f8", **more):
    return zipped(masks_npy=MASKS_NPY, scores_npy=npy(shape, numbers, kind), **more)


FOREIGN = {
    "nothing": (b"", "nothing in it"),
    "half of UTF-16": (b"\xff\xfe\x00", "utf-16"),
    "zeros": (b"a,loss\n\xff\x00,1\n", "utf-8"),
    "half a document": (b'{"masks": [[1, 0]', "JSON that ends or breaks off"),
    "half an archive": (b"PK\x03\x04 no archive", "a damaged zip archive (File is not"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff", "got a PNG picture. Export"),
    "a program": (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "got a program. Export"),
    "a surrogate": (b"\x10\x00\x00\x00\x00\x00\x00\x00{}\xff\xff", "got safetensors, as ksm fit"),
    "random bytes": (b"\x9d\x00\xe1\xff\x81a,b\n\xd0", "got no text in utf-8-sig. Export"),
    "damaged Feather": (b"ARROW1 and nothing else", "got Feather with"),
    "damaged Parquet": (b"PAR1 and nothing else PAR1", "got Parquet with"),
    "a name twice": (b"a,a\n1,2\n", "got 'a'"),
    "a short row": (b"a,b\n1,2\n3\n", "got 1 in row 3"),
    "tasks alone": (b"a,b\n1,0\n0,1\n", "no scores"),
    "scores alone": (b"x,y\n0.5,2\n1.5,3\n", "no tasks"),
    "other records": (b'[{"a": 1}, {"b": 2}]', "as record 1"),
    "ragged masks": (b'{"masks": [[1, 0], [1]], "scores": [1, 2]}', "rows of different lengths"),
    "fewer scores": (b'{"masks": [[1, 0], [0, 1]], "scores": [1]}', "got 2 rows"),
    "fewer names": (b'{"masks": [[1, 0]], "scores": [1], "task_names": ["a"]}', "names, got 1"),
    "a cell of 140,000 characters": (b"a,loss\n1,%s\n" % (b"5" * 140_000), "limit (131072) in"),
    "400 digits": (b'{"masks": [[1], [0]], "scores": [%s, 1]}' % (b"1" * 400), "no numbers"),
    "5,000 digits": (b'{"masks": [[1], [0]], "scores": [%s, 1]}' % (b"1" * 5000), "JSON that"),
    "deep JSON": (b"[" * 200_000, "JSON that"),
    "JSON within JSON": (b'{"masks": [[1, [2]], [0, 1]], "scores": [1, 2]}', "no numbers"),
    "columns of different lengths": (b'{"a": [1, 0], "b": [1], "loss": [1, 2]}', "got 1 rows"),
    "objects by name": (b'{"a": {"x": 1}, "loss": {"x": 1}}', "objects by name"),
    "split rows that do not fit": (b'{"columns": ["a"], "data": [[1, 2]]}', "rows that do not fit"),
    "a lone surrogate": (b'[{"\\ud800": 1, "loss": 0.5}]', "text that UTF-8 can write"),
    "a header alone": (b"a,b,loss\n", "no rows"),
    "half of gzip": (gzip.compress(b"a,loss\n1,2\n")[:20], "packed with"),
    "half of xz": (lzma.compress(b"a,loss\n1,2\n")[:20], "packed with"),
    "a pickle": (pickle.dumps({"a": 1}), "got a pickle"),
    "one array": (npy("(2,)", [1, 2]), "got a list of rows"),
    "an array of three dimensions": (npy("(1, 1, 1)", [1]), "(.npy) of 3 dimensions"),
    "an array of 2^40 numbers": (npy("(1099511627776,)", [1]), "8 bytes for shape (10995116"),
    "damaged Excel": (zipped(**{"xl/workbook.xml": "<xml/>"}), "Excel with"),
    "a spreadsheet": (zipped(sheet="<xml/>"), "a zip archive without arrays"),
    "NPZ of 2^40 numbers": (scored("(1099511627776,)", [1, 2]), "16 bytes for shape (10995116"),
    "NPZ of True numbers": (scored("(True,)", [1]), "8 bytes for shape (True,)"),
    "NPZ without columns": (
        zipped(masks_npy=npy("(0, 1000000000000)", []), scores_npy=npy("(0,)", [])),
        "must be of at most 1,048,576 columns",
    ),
    "NPZ of complex numbers": (scored("(2,)", [1, 2], "<c16"), "no numbers"),
    "NPZ of objects": (zipped(masks_npy=npy("(1,)", [{}], "|O")), "Object arrays cannot be loaded"),
    "NPZ with other members": (zipped(masks_npy=MASKS_NPY, scores=b"hello"), "got none"),
    "NPZ with one name": (scored("(2,)", [1, 2], task_names_npy=npy("()", 1)), "got 0 dimensions"),
    "NPZ packed in another way": (
        zipped(masks_npy=MASKS_NPY).replace(b"\x08\x00", b"\x63\x00"),
        "That compression method is not supported",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_named(kind, tmp_path):
    for word, package in (("Parquet", "pyarrow"), ("Feather", "pyarrow"), ("Excel", "openpyxl")):
        if word in kind:
            pytest.importorskip(package)
    content, found = FOREIGN[kind]
    path = tmp_path / "scores"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^`.*` must be .*, got .*\. [A-Z]") as caught:
        read_scores(path)
    assert found in str(caught.value)
    assert str(path) in str(caught.value) or kind in ("a lone surrogate", "fewer scores")


TABLE = pd.DataFrame({"wiki": [1, 0, 1], "größe": [0, 1, 1], "loss": [0.5, 1.25, -2.0]})
CSV = TABLE.to_csv(index=False)


def the_table(path):
    found = read_document(path)
    assert list(found) == list(TABLE)
    for name, cells in found.items():
        np.testing.assert_array_equal(cells, TABLE[name].to_numpy(dtype=float))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, "zstd"])
def test_packed_files_are_unpacked(pack, tmp_path, monkeypatch):
    if pack == "zstd":
        pack = pytest.importorskip("pyarrow").Codec("zstd").compress
    (tmp_path / "x").write_bytes(pack(CSV.encode()))
    the_table(tmp_path / "x")
    (tmp_path / "x").write_bytes(pack(b"a,loss\n" + b"1,2\n" * 1000))
    monkeypatch.setattr("ksm_ext.tables.files.MAX_BYTES", 500)
    with pytest.raises(ValueError, match="must be at most 500 bytes, got 501"):
        read_document(tmp_path / "x")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "latin-1", "utf-16"])
def test_text_in_the_encodings_of_spreadsheets(encoding, tmp_path):
    (tmp_path / "x").write_bytes(CSV.encode(encoding))
    the_table(tmp_path / "x")


@pytest.mark.parametrize("orient", ["records", "split", "columns", "index", "table"])
def test_every_orient_of_pandas(orient, tmp_path):
    TABLE.to_json(tmp_path / "x", orient=orient)
    found = read_document(tmp_path / "x")
    if orient == "table":
        assert found.pop("index").tolist() == [0, 1, 2]
    for name, cells in found.items():
        np.testing.assert_array_equal(cells, TABLE[name].to_numpy(dtype=float))
    assert list(found) == list(TABLE)


def test_sheets_and_feather(tmp_path):
    pytest.importorskip("pyarrow")
    TABLE.to_feather(tmp_path / "x")
    the_table(tmp_path / "x")
    pytest.importorskip("openpyxl")
    TABLE.to_excel(tmp_path / "x.xlsx", index=False)
    the_table(tmp_path / "x.xlsx")
    mixed = TABLE.assign(note=["a", None, "3"], empty=[None, 1.5, None])
    mixed.to_excel(tmp_path / "x.xlsx", index=False)
    found = read_document(tmp_path / "x.xlsx")
    assert found["note"].tolist() == ["a", "", "3"]
    np.testing.assert_array_equal(found["empty"], [np.nan, 1.5, np.nan])


def test_pairs_of_arrays(tmp_path):
    np.save(tmp_path / "masks.npy", MASKS.numpy())
    np.save(tmp_path / "margins.npy", np.asfortranarray(SCORES.numpy()))
    table = read_scores(tmp_path / "margins.npy", tmp_path / "masks.npy")
    assert table.masks.equal(MASKS) and table.scores.equal(SCORES)


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["0,5", "1,25", "-2"], [0.5, 1.25, -2.0]),
        (["1e-3", "0,25", ""], [1e-3, 0.25, np.nan]),
        (["1,234", "1,5", "2"], [1.234, 1.5, 2.0]),
        (["1,234", "5,678", "2"], None),  # or thousands
        (["1,5", "1.5", "2"], None),
    ],
)
def test_decimal_commas(cells, numbers, tmp_path):
    rows = "\n".join(f"{bit};{cell}" for bit, cell in zip((1, 0, 1), cells, strict=True))
    (tmp_path / "x").write_text(f"wiki;loss\n{rows}\n")
    found = read_document(tmp_path / "x")["loss"]
    if numbers is None:
        assert found.tolist() == cells
    else:
        np.testing.assert_array_equal(found, numbers)


def test_npz_of_other_byte_orders_and_bytes_for_names(tmp_path):
    names = {"task_names": np.array([name.encode() for name in "abcd"])}
    numbers = {"masks": MASKS.numpy().astype(">f8"), "scores": SCORES.numpy().astype(">f4")}
    np.savez(tmp_path / "x.npz", **numbers, **names)
    table = read_scores(tmp_path / "x.npz")
    assert table.masks.equal(MASKS) and table.task_names == ("a", "b", "c", "d")
    assert table.scores.equal(SCORES.float().double())


def test_parquet_of_other_kinds(tmp_path):
    pytest.importorskip("pyarrow")
    path, stamp = tmp_path / "x", pd.Timestamp("2026-01-01 00:00:00.000000001")
    good = pd.DataFrame({"a": [1, 0], "loss": [decimal.Decimal("1.5"), decimal.Decimal("2")]})
    good.to_parquet(path)
    assert read_scores(path).scores.tolist() == [[1.5], [2.0]]
    for column, found in (
        ([["wiki"], ["code"]], "lists such as"),
        ([b"\xff", b"x"], "text such as"),
        ([{"q": 1}, {"q": 2}], "text such as"),
        ([stamp, stamp], "text such as '2026-01-01"),
    ):
        good.assign(more=column).to_parquet(path)
        with pytest.raises(ValueError, match=r"^`.*` must be .*, got .*\. [A-Z]") as caught:
            read_scores(path)
        assert found in str(caught.value)
        assert read_scores(path, ignore="more").task_names == ("a",)
    good.astype({"a": "Int64"}).assign(a=pd.array([1, None], dtype="Int64")).to_parquet(path)
    with pytest.raises(ValueError, match=r"`'a' of .*` must be a number in every row, got no num"):
        read_scores(path)


def read_and_peak(*files, **options):
    """A table, and the bytes of memory that reading it took at most."""
    tracemalloc.start()
    table = read_scores(*files, **options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return table, peak


def test_what_is_not_needed_is_not_unpacked(tmp_path):
    path, junk = tmp_path / "x.npz", np.zeros(2**24)
    np.savez_compressed(path, masks=MASKS.numpy(), scores=SCORES.numpy(), junk=junk)
    table, peak = read_and_peak(path)
    assert table.masks.equal(MASKS) and peak < junk.nbytes / 50


def test_one_file_does_not_decide_the_memory(tmp_path, monkeypatch):
    scores, lists = tmp_path / "scores.json", tmp_path / "lists.json"
    scores.write_text("[[1], [2]]")
    lists.write_text("[[0, 1000000000], [1]]")
    for n in (None, 10**9 + 1):
        with pytest.raises(ValueError, match=r"at most 1,048,576, .* got n = 1,000,000,001 for"):
            read_scores(scores, lists, num_tasks=n)
    monkeypatch.setattr("ksm_ext.tables.files.MAX_BYTES", 500)
    np.savez_compressed(tmp_path / "x", masks=MASKS.numpy(), scores=np.zeros(100))
    with pytest.raises(ValueError, match=r"x.npz` must be at most 500 bytes, got 1,"):
        read_scores(tmp_path / "x.npz")
    pytest.importorskip("pyarrow")
    pd.DataFrame({"a": np.zeros(100)}).to_parquet(tmp_path / "x")
    with pytest.raises(ValueError, match=r"must be at most 500 bytes, got 8\d\d"):
        read_document(tmp_path / "x")


def test_a_long_cell_does_not_widen_its_column(tmp_path):
    """Text is not stored as wide as its longest cell: 1,000 rows of 100,000 characters."""
    rows = [{"note": "x" * 100_000 if i == 0 else "", "a": i % 2, "loss": i} for i in range(1000)]
    pd.DataFrame(rows).to_csv(tmp_path / "x.csv", index=False)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for name in ("x.csv", "x.json"):
        assert read_and_peak(tmp_path / name, ignore="note")[1] < 5e6


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("a,loss\n1,2\n")
    refuse = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(PermissionError, match=r"/x` must be readable, got Permission denied\. M"):
        read_scores(tmp_path / "x")


def whole_files():
    """Valid files of every kind, to be damaged."""
    files = []
    for kind, write in WRITERS.items():
        if not kind.startswith("parquet") or importlib.util.find_spec("pyarrow"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "x.npz"
                write(path)
                files.append(path.read_bytes())
    return files


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # NumPy's, of headers that Python 2 wrote
@settings(derandomize=True, deadline=None, database=None, max_examples=400)
@given(
    content=st.one_of(st.binary(max_size=200), st.sampled_from(whole_files())),
    damage=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3)), max_size=4),
    keep=st.floats(0, 1),
    two=st.booleans(),
    weights=st.booleans(),
)
def test_readers_refuse_in_the_one_form(content, damage, keep, two, weights, tmp_path_factory):
    """Any bytes, and whole files of which parts were exchanged, are read or refused."""
    for place, other in damage:
        cut = int(place * len(content))
        content = content[:cut] + other + content[cut + len(other) :]
    if not damage:
        content = content[: int(keep * len(content))]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        table = read_scores(path, path if two else None, weights=weights)
    except ValueError as error:
        assert re.match(r"(?s)`.+` must be .+, got .+\. .+", str(error))
    else:
        assert len(table.masks) == len(table.scores) > 0 and not table.scores.isnan().any()
        assert table.masks.shape[1] == len(set(table.task_names))
        assert str(table) and table.role_table()


# -- what is written ----------------------------------------------------------------------------


TEXT = st.text(st.sampled_from("=+-@'a1 ,\"\t\r"), max_size=4)


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(names=st.lists(TEXT, min_size=1, max_size=5), number=st.floats(-9, 9))
def test_a_spreadsheet_runs_no_name(names, number, tmp_path_factory):
    """No text begins a formula; numbers stay numbers; JSON and readers see no apostrophe."""
    path = tmp_path_factory.getbasetemp() / "written"
    write_columns({"=head": names, "value": [number] * len(names)}, str(path), "csv")
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert not [cell for row in rows for cell in row[:1] if cell[:1] in "=+-@\t\r" and cell]
    assert all(float(row[1]) == number for row in rows[1:])
    if all(name.strip() == name for name in names):
        again = read_document(path)
        assert list(again) == ["=head", "value"] and (again["value"] == number).all()
        if again["=head"].dtype == object:
            assert again["=head"].tolist() == names
    write_columns({"=head": names}, str(path), "json")
    assert json.loads(path.read_text()) == [{"=head": name} for name in names]


def test_a_terminal_obeys_no_name():
    assert printable("\x1b[31mred\x07\n") == "\\x1b[31mred\\x07\n"
    assert printable("naïve, 数据\u202e\x9b\ud800") == "naïve, 数据\\u202e\\x9b\\ud800"
