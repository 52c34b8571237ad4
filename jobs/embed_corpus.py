"""`embedloom embed` as a script: `ray job submit -- python jobs/embed_corpus.py CONFIG|INPUT [OPTIONS]`."""

import sys

from embedloom.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "embed")
    main()
