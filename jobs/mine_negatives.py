"""`embedloom mine` as a script: `ray job submit -- python jobs/mine_negatives.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "mine")
    main()
