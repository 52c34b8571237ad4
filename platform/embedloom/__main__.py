"""``python -m embedloom``: the command line."""

from embedloom.cli import main

if __name__ == "__main__":
    main()
