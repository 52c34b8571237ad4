from embedloom.raydata.embedding import Embedder as Embedder
from embedloom.raydata.embedding import embed as embed

__version__: str
