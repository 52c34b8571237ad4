"""Tens of thousands of schemathesis calls over the OpenAPI document: the plain endpoint, one with keys, and search.

    python tests/drills/serve_schema.py [--examples 3300] [--calls 20000]

Runs tests/serving/test_openapi.py with so many examples an operation and fresh random ones, and counts the calls.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEST = ROOT / "tests" / "serving" / "test_openapi.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=3300, help="of each operation")
    parser.add_argument("--calls", type=int, default=20_000, help="fewer than this is a failure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="el-drill-") as folder:
        counter = Path(folder) / "calls"
        environment = {"SCHEMA_EXAMPLES": str(options.examples), "SCHEMA_CALLS_FILE": str(counter)}
        started = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-m", "pytest", str(TEST), "-q", "--timeout", "7200"], cwd=ROOT, capture_output=True,
            text=True, check=False, env=os.environ | environment,
        )  # fmt: skip
        calls = int(counter.read_text()) if counter.is_file() else 0
    problems = [] if run.returncode == 0 else [run.stdout[-3000:]]
    if calls < options.calls:
        problems.append(f"{calls} calls, {options.calls} are wanted")
    seconds = round(time.monotonic() - started)
    print(json.dumps({"drill": "serve_schema", "calls": calls, "seconds": seconds, "problems": problems}))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
