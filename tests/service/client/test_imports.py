"""The client loads nothing of the server, and no torch unless its caller did."""

import subprocess
import sys

SERVER_ONLY = {
    "torch", "triton", "fsa_core", "pydantic", "prometheus_client", "typer", "safetensors", "service.config",
}  # fmt: skip


def test_importing_the_client_loads_nothing_of_the_server() -> None:
    code = "import sys, service.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not SERVER_ONLY & set(loaded.split())
