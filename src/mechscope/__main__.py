"""`python -m mechscope`: the command line."""

from mechscope.cli import main

if __name__ == "__main__":
    main()
