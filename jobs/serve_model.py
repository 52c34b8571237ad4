"""`embedloom serve` as a script: `ray job submit -- python jobs/serve_model.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
