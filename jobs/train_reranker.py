"""`embedloom reranker` as a script: `ray job submit -- python jobs/train_reranker.py CONFIG`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "reranker")
    main()
