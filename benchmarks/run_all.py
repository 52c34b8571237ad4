"""``make bench``: every benchmark of this folder beside its peer, one table."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each under a minute")
    options = parser.parse_args()
    table = Table("benchmark", "ours", "peer", "ratio", "unit", "share of floor", "equal", "peer's name")
    failed = 0
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if script.name == Path(__file__).name:
            continue
        command = [sys.executable, str(script), "--json", *(["--quick"] if options.quick else [])]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if run.returncode:
            failed += 1
            table.add_row(script.stem, f"failed ({run.returncode})")
            continue
        r = json.loads(run.stdout.splitlines()[-1])
        table.add_row(
            r["name"], f"{r['ours']:,}", f"{r['peer']:,}", f"{r['ratio']:.2f}", r["unit"],
            f"{r.get('floor_share', '')}", str(r.get("equal", "")), r["peer_name"],
        )  # fmt: skip
    Console(width=160).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
