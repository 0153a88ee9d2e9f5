"""``fsa serve`` does not start where no worker could ever answer."""

import os
import subprocess
import sys
from pathlib import Path


def test_it_does_not_start_with_a_table_of_the_users_that_is_not_valid(tmp_path: Path) -> None:
    table = tmp_path / "fsa-serve" / "tuned" / "cpu.json"
    table.parent.mkdir(parents=True)
    table.write_text('{"device": "cpu"}')
    # Of a device that is not served, and so nobody looks into it.
    (table.parent / "another-device.json").write_text("{}")
    command = [sys.executable, "-m", "service.cli", "serve", "--devices", "cpu", "--port", "0"]
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path), "FSA_METRICS_PORT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    expected = f"fsa: cannot start: tuning table {table} cannot be used: the table has no entries, provenance"
    assert done.stderr.strip() == expected
