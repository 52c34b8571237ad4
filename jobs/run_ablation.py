"""`embedloom ablate` as a script: `ray job submit -- python jobs/run_ablation.py ABLATION`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "ablate")
    main()
