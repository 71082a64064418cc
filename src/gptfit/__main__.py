"""`gptfit`, and `python -m gptfit`."""

import sys

INTERRUPTED = 130


def main() -> None:
    """The command line; a Ctrl-C that comes while it is still being imported is as quiet as a later one."""
    try:
        from gptfit.cli import main as run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
