"""The container's HEALTHCHECK: exit 0 when the server beside it is SERVING, by gRPC's health protocol."""

import os
import sys

from service.client import AttentionClient

TARGET = f"127.0.0.1:{os.environ.get('FSA_PORT', '50051')}"

with AttentionClient(TARGET, timeout_seconds=4, retry=False) as client:
    sys.exit(client.health() != "SERVING")
