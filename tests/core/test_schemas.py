import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedloom.core.schemas import SCHEMAS, check_table, check_unique_ids, content_id, table_from_rows
from embedloom.errors import DataError

DOCUMENT = {"id": "a", "text": "hello", "source": "test"}


def test_optional_columns_become_nulls():
    table = table_from_rows("documents", [DOCUMENT])
    assert table.to_pylist() == [{**DOCUMENT, "title": None, "lang": None}]


def test_missing_column_is_named_with_what_was_found():
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text'.*found \['id', 'body'\]"):
        check_table("documents", pa.table({"id": ["1"], "body": ["x"]}), "a.parquet")


def test_null_in_a_required_column_is_refused():
    with pytest.raises(DataError, match="'text' has 1 nulls"):
        check_table("documents", pa.table({"id": ["1", "2"], "text": ["x", None], "source": ["s", "s"]}), "f")


def test_wrong_type_is_named():
    table = pa.table(
        {
            "query_id": ["q"],
            "document_ids": [["d"]],
            "scores": ["high"],
            "teacher": ["t"],
            "contract_hash": ["h"],
        }
    )
    with pytest.raises(DataError, match=r"'scores' is string, expected list<"):
        check_table("candidates", table, "f")


def test_unknown_column_of_a_new_row_is_refused():
    with pytest.raises(DataError, match="unknown column 'colour'"):
        table_from_rows("documents", [{**DOCUMENT, "colour": "red"}])


def test_duplicate_id_is_named_with_its_count():
    with pytest.raises(DataError, match="id 'a' stands 2 times"):
        check_unique_ids(pa.table({"id": ["a", "b", "a"]}), "f")


def test_every_kind_writes_and_reads_back_empty():
    for kind in SCHEMAS:
        assert check_table(kind, table_from_rows(kind, []), kind).num_rows == 0


@given(st.lists(st.text(), min_size=1, max_size=3), st.lists(st.text(), min_size=1, max_size=3))
def test_content_ids_differ_unless_the_parts_are_equal(first, second):
    assert (content_id(*first) == content_id(*second)) == (first == second)
