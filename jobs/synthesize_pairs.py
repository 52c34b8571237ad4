"""`embedloom synthesize` as a script: `ray job submit -- python jobs/synthesize_pairs.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "synthesize")
    main()
