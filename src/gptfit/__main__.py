"""`python -m gptfit`."""

from gptfit.cli import main

if __name__ == "__main__":
    main()
