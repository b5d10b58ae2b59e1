"""``python -m unwrite``: the command line, also under ``accelerate launch -m unwrite``."""

from unwrite.cli import main

if __name__ == "__main__":
    main()
