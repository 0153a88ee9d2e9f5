"""Generates service/pb from protos/: ``python protos/generate.py [OUTPUT_FOLDER]``.

protoc writes absolute imports from the folder of the .proto files; the generated modules live inside
the service package, so those imports are moved there and no top-level ``fsa`` package is claimed.
"""

import re
import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
OUTPUT = PROTOS.parent / "service" / "pb"


def generate(output: Path) -> None:
    """Writes a package with the messages of every .proto file and their type stubs to ``output``."""
    sources = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    output.mkdir(parents=True, exist_ok=True)
    include = files("grpc_tools") / "_proto"
    arguments = ["protoc", f"-I{PROTOS}", f"-I{include}", f"--python_out={output}", f"--pyi_out={output}"]
    if protoc.main([*arguments, *sources]) != 0:
        raise SystemExit("protoc failed")
    for module in (*output.rglob("*_pb2.py"), *output.rglob("*_pb2.pyi")):
        text = re.sub(r"^from fsa\.", "from service.pb.fsa.", module.read_text(), flags=re.MULTILINE)
        module.write_text(text)
    for folder in (output, *(path for path in output.rglob("*") if path.is_dir())):
        if folder.name != "__pycache__":
            (folder / "__init__.py").touch()


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
