"""Valid cases for servers that are about to be hurt."""

from tests.fsa_core.conftest import make_case

__all__ = ["make_case"]
