"""`embedloom gate` as a script: `ray job submit -- python jobs/judge_candidate.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "gate")
    main()
