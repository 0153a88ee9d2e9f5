"""service/pb is what protos/ generates."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc_tools", reason="grpcio-tools generates the code")

ROOT = Path(__file__).resolve().parent.parent
CHECKED_IN = ROOT / "service" / "pb"


def python_files(folder: Path) -> dict[str, str]:
    """Path inside ``folder`` -> text, of modules and stubs."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*.py*")
        if path.suffix != ".pyc"
    }


def test_checked_in_code_is_fresh(tmp_path: Path) -> None:
    generate = [sys.executable, str(ROOT / "protos" / "generate.py"), str(tmp_path)]
    subprocess.run(generate, check=True, timeout=60)
    assert python_files(CHECKED_IN) == python_files(tmp_path), "make protos, then commit service/pb"
