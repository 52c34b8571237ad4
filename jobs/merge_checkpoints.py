"""`embedloom merge` as a script: `ray job submit -- python jobs/merge_checkpoints.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "merge")
    main()
