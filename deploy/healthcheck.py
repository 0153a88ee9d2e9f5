"""The container's HEALTHCHECK: exit 0 when the server beside it is SERVING, by gRPC's health protocol.

The server's address is that of its settings, from environment and file; it cannot know of flags.
"""

import sys

from service.client import AttentionClient, AttentionError
from service.commands import settings
from service.commands.failures import WrongUsage

# Where to reach a server that listens on every address.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main() -> str | None:
    """What is wrong, if anything."""
    try:
        chosen = settings.load({})
    except WrongUsage as error:
        return str(error)
    host = LOOPBACK.get(chosen.host, chosen.host)
    target = f"[{host}]:{chosen.port}" if ":" in host else f"{host}:{chosen.port}"
    try:
        with AttentionClient(target, timeout_seconds=4, retry=False) as client:
            status = client.health()
    except AttentionError as error:
        return f"{target}: {error}"
    return None if status == "SERVING" else f"{target}: {status}"


if __name__ == "__main__":
    sys.exit(main())
