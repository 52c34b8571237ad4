"""`embedloom evaluate` as a script: `ray job submit -- python jobs/evaluate_encoder.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
