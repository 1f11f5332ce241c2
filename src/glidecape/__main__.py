"""`python -m glidecape`: the command line, where the script `glidecape` is not on the path."""

from .cli import main

if __name__ == "__main__":
    main()
