"""Vector files: what their schema promises, read with every promise checked."""

from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from embedloom.core.storage import Place
from embedloom.encoder.tokenizer import CutTexts, unknown_warning
from embedloom.errors import DataError
from embedloom.retrieval.search import Matrix, check_vectors
from embedloom.retrieval.stored import stored_dimension, stored_vectors

# Schema metadata of every vectors file.
CONTRACT_KEY = b"contract_hash"
MODEL_KEY = b"model"
TOKENS_KEY = b"tokens"
# Only where a limit cut texts, or the tokenizer does not know some of them.
CUT_COUNTS = ("texts_cut", "tokens_left_out", "tokens_unknown")
CUT_KEYS = tuple(name.encode() for name in CUT_COUNTS)


def cost_metadata(tokens: int, cuts: CutTexts) -> dict[bytes, bytes]:
    """Schema metadata of what the vectors of a file cost, and of what the model did not see of their texts."""
    cut = {key.encode(): str(value).encode() for key, value in cuts.counts().items()}
    return {TOKENS_KEY: str(tokens).encode(), **cut}


def cost_counts(schemas: Iterable[pa.Schema]) -> dict[str, int]:
    """``tokens`` of all files, and of ``CUT_COUNTS`` those that there are."""
    found = {TOKENS_KEY: 0}
    for schema in schemas:
        for key in (TOKENS_KEY, *CUT_KEYS):
            if key in schema.metadata:
                found[key] = found.get(key, 0) + int(schema.metadata[key])
    return {key.decode(): value for key, value in found.items()}


def cut_line(texts: int, cost: Mapping[str, int]) -> str:
    """What ``cost_counts`` say of the model's limits, in a clause."""
    doubt = unknown_warning(cost.get("tokens_unknown", 0), cost["tokens"])
    if "texts_cut" not in cost:
        return f"no text was cut at the model's limit{doubt}"
    left = cost["tokens_left_out"]
    share = cost["tokens"] / (cost["tokens"] + left)
    read = f"{share:.1%} of their tokens read, {left:,} left out"
    return f"{cost['texts_cut']:,} of {texts:,} texts cut at the model's limit: {read}{doubt}"


def read_vector_file(place: Place, name: str) -> tuple[list[str], Matrix, str]:
    """Ids, float32 [n, dimension] and contract hash of one file.

    Raises:
        DataError: not a vectors table, or a vector that is zero or not finite, named by id.
    """
    table = place.read_table(name)
    source = f"{place.uri}/{name}"
    ids = [str(value) for value in id_column(table, source).to_pylist()]
    vectors = stored_vectors(table, source)
    check_vectors(vectors, source, ids)
    return ids, vectors, _contract_hash(table.schema, source)


def read_vectors(place: Place, folder: str, contract_hash: str | None = None) -> tuple[list[str], Matrix]:
    """All vectors of a folder: ids and float32 [n, dimension].

    Raises:
        DataError: no vectors, files of different contracts or dimensions, another contract than asked for,
            or a vector that is zero or not finite.
    """
    ids: list[str] = []
    blocks: list[Matrix] = []
    for name in place.names(folder, ".parquet"):
        source = f"{place.uri}/{name}"
        found, vectors, contract = read_vector_file(place, name)
        contract_hash = contract_hash or contract
        if contract != contract_hash:
            raise DataError(
                f"{source}: contract_hash {contract!r}, expected {contract_hash!r}; vectors of different prompts cannot be compared"
            )
        blocks.append(vectors)
        if vectors.shape[1] != blocks[0].shape[1]:
            raise DataError(
                f"{source}: column 'vector' has {vectors.shape[1]} dimensions, the files before have {blocks[0].shape[1]}"
            )
        ids.extend(found)
    if not blocks:
        raise DataError(f"{place.uri}/{folder}: no vectors")
    return ids, np.concatenate(blocks)


def check_same_contract(queries: tuple[str, str], documents: tuple[str, str]) -> None:
    """Refuse to compare vectors that went through different prompts.

    Args:
        queries: name and contract hash of the query vectors.
        documents: the same of the document vectors.

    Raises:
        DataError: the hashes differ; both are named.
    """
    if queries[1] != documents[1]:
        raise DataError(
            f"{queries[0]} has contract_hash {queries[1]!r}, {documents[0]} has {documents[1]!r}; "
            "vectors of different prompts cannot be compared, embed both with one model"
        )


def id_column(table: pa.Table, source: str) -> pa.Array:
    """Column ``id`` in one piece; DataError if it is missing or holds nulls."""
    if "id" not in table.column_names or table.column("id").null_count:
        raise DataError(
            f"{source}: a vectors table needs column 'id' without nulls, found {table.column_names}"
        )
    return pa.concat_arrays(
        [chunk.cast(pa.large_string()) for chunk in table.column("id").chunks]
        or [pa.array([], pa.large_string())]
    )


def _contract_hash(schema: pa.Schema, source: str) -> str:
    found = (schema.metadata or {}).get(CONTRACT_KEY)
    if found is None:
        raise DataError(
            f"{source}: no {CONTRACT_KEY.decode()} in the file metadata, so how its texts were prompted is unknown"
        )
    return str(found.decode())


def common_footer(place: Place, names: list[str]) -> tuple[str, int]:
    """Contract hash and dimension that all files share."""
    first: tuple[str, int] | None = None
    for name in names:
        schema, rows = place.parquet_footer(name)
        source = f"{place.uri}/{name}"
        if "vector" not in schema.names:
            raise DataError(
                f"{source}: no column 'vector'; a vectors table has id and vector, found {schema.names}"
            )
        if rows == 0:
            continue
        size = stored_dimension(schema.field("vector").type)
        size = size or stored_vectors(place.read_table(name), source).shape[1]
        found = (_contract_hash(schema, source), size)
        first = first or found
        if found[0] != first[0]:
            check_same_contract((source, found[0]), (f"{place.uri}/{names[0]}", first[0]))
        if found[1] != first[1]:
            raise DataError(f"{source}: column 'vector' has {found[1]} dimensions, {names[0]} has {first[1]}")
    if first is None:
        raise DataError(f"{place.uri}: {names[0]} and the files beside it hold no vectors")
    return first
