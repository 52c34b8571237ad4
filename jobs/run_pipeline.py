"""`embedloom run` as a script: `ray job submit -- python jobs/run_pipeline.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
