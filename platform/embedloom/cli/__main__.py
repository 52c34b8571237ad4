"""``python -m embedloom.cli``: the form that rendered jobs use."""

from embedloom.cli.root import main

if __name__ == "__main__":
    main()
