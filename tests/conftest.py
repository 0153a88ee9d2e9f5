"""Options that the whole suite shares: which device the numerical tests run on."""

import os
import signal

import pytest
import torch
from hypothesis import Phase, settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where numerical tests run")
    parser.addoption("--shapes", type=int, default=12, help="how many random problems the kernels are given")
    parser.addoption("--explore", action="store_true", help="draw other examples on every run, not the same")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the suite in the background has it ignore Ctrl-C, and so all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A shared machine makes single examples slow; pytest-timeout bounds the whole test. Everybody's run has
    # the same examples unless it explores; what that finds is printed so that it can be run again.
    explores = config.getoption("--explore")
    settings.register_profile("fsa", deadline=None, derandomize=not explores, print_blob=True)
    settings.load_profile("fsa")
    # To explain what fails, hypothesis would trace every line, also of all that passes.
    settings.register_profile(
        "shapes", max_examples=config.getoption("--shapes"), phases=set(Phase) - {Phase.explain}
    )
    # Triton reads this when it is imported: without a GPU its kernels run in the interpreter. A process for
    # tests that only compile has it set to 0.
    if config.getoption("--device") == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


# What starts servers, kills workers or measures: one after the other, beside the numerical tests.
SERIAL_FOLDERS = ("deploy", "examples", "fault", "fuzz", "service")
# What compiles for minutes begins before what takes seconds, so that no process has it left at the end.
LONG_FILES = ("test_hopper_grid.py",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With pytest-xdist and --dist loadgroup, keep the tests of these folders in one process, and begin with
    what takes longest.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    root = config.rootpath / "tests"
    for item in items:
        if item.path.relative_to(root).parts[0] in SERIAL_FOLDERS:
            item.add_marker(pytest.mark.xdist_group("serial"))
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no CUDA device", returncode=2)
    return torch.device(name)
