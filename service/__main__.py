"""``python -m service``: ``fsa serve`` without flags, set by environment and file alone."""

import sys

from service import cli


def main() -> None:
    if len(sys.argv) > 1:
        print(
            f"fsa: python -m service takes no arguments, not {sys.argv[1]}; fsa serve does", file=sys.stderr
        )
        sys.exit(2)
    cli.main(["serve"])


if __name__ == "__main__":
    main()
