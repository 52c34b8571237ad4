"""A sink for Qdrant."""

import importlib.util
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from embedloom.errors import ConfigError, DataError, MissingDependency, StageError, first_line
from embedloom.raydata.sinks import VectorSink, check_size, vector_size

Distance = Literal["cosine", "dot"]
_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 4122's of URLs
_TIMEOUT_SECONDS = 60


class QdrantSink(VectorSink):
    """Rows into a Qdrant collection: a point each, its other columns as payload.

    Qdrant numbers points by whole numbers or UUIDs. Whole ids are taken as they are; a text becomes the UUID (version 5) of
    its name, the same on every machine, and the payload has the text under the name of its column.
    """

    def __init__(
        self,
        url: str,
        collection: str,
        *,
        distance: Distance = "cosine",
        api_key_env: str | None = None,
        id_column: str = "id",
        vector_column: str = "vector",
    ) -> None:
        """Describe the collection; nothing is sent yet.

        Args:
            url: of the server, such as http://host:6333; or a folder, for Qdrant's local mode, which one process at a time may
                open: ``write_datasink(sink, concurrency=1)``.
            collection: made if it is not there.
            distance: of a collection that is made.
            api_key_env: variable that holds the server's key where tasks run; the key itself is kept nowhere.
            id_column: texts or whole numbers from 0 on.
            vector_column: what ``embedloom.embed`` made.

        Raises:
            MissingDependency: no qdrant-client.
        """
        if importlib.util.find_spec("qdrant_client") is None:
            raise MissingDependency("qdrant-client", "qdrant", "QdrantSink")
        store = QdrantStore(url, collection, distance, api_key_env)
        super().__init__(store, id_column=id_column, vector_column=vector_column)


@dataclass(frozen=True, slots=True)
class QdrantStore:
    """A collection."""

    url: str
    collection: str
    distance: Distance
    api_key_env: str | None
    rows: int = 512  # a request: 32 MB are a server's default limit, and JSON takes 8 KB for 384 dimensions

    @property
    def _where(self) -> str:
        return f"Qdrant collection {self.collection!r}"

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """A client, closed in the end: local mode keeps its folder locked."""
        import httpx
        from qdrant_client import QdrantClient
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        key = os.environ.get(self.api_key_env) if self.api_key_env else None
        if self.api_key_env and not key:
            raise ConfigError(
                f"api_key_env: the environment variable {self.api_key_env!r} is not set where this runs"
            )
        place = {"url": self.url} if "://" in self.url else {"path": self.url}
        client = QdrantClient(**place, api_key=key, timeout=_TIMEOUT_SECONDS)
        try:
            yield client
        except (ResponseHandlingException, UnexpectedResponse, httpx.HTTPError) as error:
            raise StageError(f"{self._where} at {self.url}: {first_line(error)}") from error
        finally:
            client.close()

    def prepare(self, schema: pa.Schema, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.prepare``."""
        from qdrant_client import models

        check_payload(schema, vector_column)
        size = vector_size(schema, vector_column)
        kinds = {"cosine": models.Distance.COSINE, "dot": models.Distance.DOT}
        with self._client() as client:
            if client.collection_exists(self.collection):
                found = client.get_collection(self.collection).config.params.vectors
                check_size(getattr(found, "size", None), size, self._where)
                return
            params = models.VectorParams(size=size, distance=kinds[self.distance])
            client.create_collection(self.collection, vectors_config=params)

    def upsert(self, rows: pa.Table, id_column: str, vector_column: str) -> None:
        """See ``VectorStore.upsert``; returns when the server has them."""
        from qdrant_client import models

        vectors = rows.column(vector_column).to_pylist()
        payloads = payload_columns(rows.drop_columns([vector_column])).to_pylist()
        points = [point_id(one) for one in rows.column(id_column).to_pylist()]
        with self._client() as client:
            batch = models.Batch(ids=points, vectors=vectors, payloads=payloads)
            client.upsert(self.collection, points=batch, wait=True)

    def present(self, ids: list[Any], id_column: str) -> set[Any]:
        """See ``VectorStore.present``."""
        points = {point_id(one): one for one in ids}
        with self._client() as client:
            if not client.collection_exists(self.collection):
                return set()
            found = client.retrieve(self.collection, list(points), with_payload=False, with_vectors=False)
            return {points[point.id] for point in found}


def point_id(one: Any) -> int | str:
    """Qdrant's id of a row.

    Raises:
        DataError: a negative number, or null.
    """
    if isinstance(one, str):
        return str(uuid.uuid5(_NAMESPACE, one))
    if not isinstance(one, int) or one < 0:
        raise DataError(f"id_column: {one!r}; allowed by Qdrant: texts, and whole numbers from 0 on")
    return one


def check_payload(schema: pa.Schema, vector_column: str) -> None:
    """Raise ConfigError if a column cannot be sent as JSON."""
    for field in schema:
        if field.name != vector_column and (
            pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        ):
            raise ConfigError(
                f"column {field.name!r} is {field.type}; allowed in a payload: text, numbers, times, lists and structs of "
                "them; drop it with Dataset.drop_columns"
            )


def payload_columns(rows: pa.Table) -> pa.Table:
    """The columns as JSON can hold them: times and decimals as texts."""
    for place, field in enumerate(rows.schema):
        if pa.types.is_temporal(field.type) or pa.types.is_decimal(field.type):
            rows = rows.set_column(place, field.name, rows.column(place).cast(pa.string()))
    return rows
