from embedloom.raydata.embedding import Embedder as Embedder
from embedloom.raydata.embedding import embed as embed
from embedloom.raydata.lance import LanceDBSink as LanceDBSink
from embedloom.raydata.lance import LanceSink as LanceSink
from embedloom.raydata.parquet import FaissSink as FaissSink
from embedloom.raydata.parquet import ParquetSink as ParquetSink
from embedloom.raydata.postgres import PgvectorSink as PgvectorSink
from embedloom.raydata.qdrant import QdrantSink as QdrantSink
from embedloom.raydata.sinks import VectorSink as VectorSink
from embedloom.raydata.stages import mine as mine
from embedloom.raydata.stages import synthesize as synthesize

__version__: str
