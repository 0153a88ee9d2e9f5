"""``python -m service``: the server, set by environment and file alone. ``fsa serve`` has flags."""

import sys

from pydantic import ValidationError

from service.config import Settings
from service.server import run


def main() -> int:
    try:
        settings = Settings()
    except ValidationError as error:
        print(f"fsa: {error}", file=sys.stderr)
        return 2
    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
