"""Measure a suite of cases: ``python -m benchmarks.run --suite targets --peers DIR --json FILE``.

Every contender of a case runs on the same inputs in the same process, in turns. A case whose answer of ours
is wrong gets no time for anybody, and the exit code is 1; a peer that is wrong gets none for itself.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import report
from benchmarks.cases import SUITES, Case, as_recorded, suite
from benchmarks.contenders import Contender, Run, contenders_of
from benchmarks.gate import Reach, Sample, sampled_truth, worst_error
from benchmarks.host import controls
from benchmarks.indices import recorded_block_indices
from benchmarks.inputs import Inputs, make_inputs, work_of
from benchmarks.measure import enqueue_timer, extra_bytes, measure_ceilings, take_turns, timer_for
from benchmarks.operator_gate import operator_error
from benchmarks.progress import progress_bar
from benchmarks.results_file import Measured, Results, Row, machine_of
from service.files import check_writable
from service.malloc import restart_tuned

MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks: torch sees no GPU; --device cpu runs the suites cpu and smoke")
    if options.threads:
        torch.set_num_threads(options.threads)
    recorded = recorded_block_indices(options.indices) if options.indices else None
    cases = _cases(options.suite, options.only, recorded, device)
    if options.json:
        _check_results_file(options.json)
    words = sys.argv[1:] if arguments is None else list(arguments)
    results = Results(machine_of(device), shlex.join(["python", "-m", "benchmarks.run", *words]))
    print("  ".join(f"{name} {value}" for name, value in results.machine.items()))
    if options.resume:
        results.rows = _rows_to_keep(options.json, results.machine)
        done = {row.case for row in results.rows}
        cases = [case for case in cases if case not in done]
    results.ceilings = measure_ceilings(device, options.seconds)
    for row in _measured(cases, device, options.peers, recorded, options.seconds):
        results.rows.append(row)
        print(_line(row), flush=True)
        if options.json:
            results.write(options.json)
    report.print_targets(results)
    red = [row.case.name for row in results.rows if row.red]
    if red:
        print(f"wrong answers, not measured: {', '.join(red)}", file=sys.stderr)
    return 1 if red else 0


def _measured(
    cases: list[Case],
    device: torch.device,
    peers: Path | None,
    recorded: torch.Tensor | None,
    seconds_each: float,
) -> Iterator[Row]:
    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            contenders = contenders_of(case, device, peers)
            yield measure(case, contenders, device, recorded, seconds_each)
            progress.advance(task)


def measure(
    case: Case,
    contenders: list[Contender],
    device: torch.device,
    recorded: torch.Tensor | None,
    seconds_each: float,
) -> Row:
    """The row of a case; ours is the first of ``contenders``."""
    x = make_inputs(case, device, recorded)
    truth: dict[Reach, list[Sample]] = {}
    runs: dict[str, Run] = {}
    measured: dict[str, Measured] = {}
    for contender in contenders:
        run, verdict = _admitted(contender, case, x, truth)
        measured[contender.name] = verdict
        if run is None and contender is contenders[0]:
            return Row(case, red=verdict.refused)
        if run is not None:
            runs[contender.name] = run
    if device.type == "cuda":
        memory = {name: extra_bytes(run) for name, run in runs.items()}
    else:
        memory = dict.fromkeys(runs)
    if case.clock == "host":
        for name, run in controls(x, case.stage, runs["ours"]).items():
            # They compute nothing, so there is nothing to check.
            runs[name], measured[name], memory[name] = run, Measured(), None
    timer = enqueue_timer if case.clock == "host" else timer_for(device)
    for name, times in take_turns(runs, timer, seconds_each).items():
        measured[name] = Measured(
            median_seconds=times.median_seconds / case.calls,
            p20_seconds=times.p20_seconds / case.calls,
            p80_seconds=times.p80_seconds / case.calls,
            runs=times.runs,
            extra_bytes=memory[name],
            worst_error=measured[name].worst_error,
        )
    return Row(case, work_of(case, x), measured)


def _admitted(
    contender: Contender, case: Case, x: Inputs, truth: dict[Reach, list[Sample]]
) -> tuple[Run | None, Measured]:
    """The contender's call, if its answer passes the gate, and how it did there.

    ``truth`` is kept for the contenders to come, of each reach.
    """
    try:
        run = contender.prepare(x, case.stage)
        answer = contender.settle(run())
        if case.part == "selected" or contender.reach != "selected":
            if contender.reach not in truth:
                truth[contender.reach] = sampled_truth(x, case.stage, contender.reach)
            error = worst_error(answer, truth[contender.reach])
        else:
            error = operator_error(case, x, answer)
    except Exception as failure:
        # A peer that cannot run a case must not keep the others from being measured.
        return None, Measured(refused=f"failed: {type(failure).__name__}: {failure}"[:200])
    if not error <= contender.tolerance:
        return None, Measured(worst_error=error, refused=f"wrong by {error:.1e}")
    return run, Measured(worst_error=error)


def _rows_to_keep(path: Path | None, machine: dict[str, str]) -> list[Row]:
    """What an earlier run on the same machine and versions measured, without its wrong answers."""
    if path is None or not path.exists():
        raise SystemExit("benchmarks: --resume needs the --json FILE of the run to go on with")
    earlier = Results.read(path)
    if _undated(earlier.machine) != _undated(machine):
        raise SystemExit(f"benchmarks: {path} is of another machine or version: {earlier.machine}")
    return [row for row in earlier.rows if not row.red]


def _undated(machine: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in machine.items() if name != "date"}


def _cases(name: str, only: str, recorded: torch.Tensor | None, device: torch.device) -> list[Case]:
    cases = suite(name)
    if recorded is not None:
        cases += as_recorded(cases, *recorded.shape[1:])
    chosen = [case for case in cases if fnmatch(case.name, f"*{only}*")]
    if not chosen:
        names = "\n  ".join(case.name for case in cases)
        _refuse(f"no case of {name} matches {only!r}; there are\n  {names}")
    if device.type == "cpu" and any(case.clock == "host" or case.stage == "index" for case in chosen):
        _refuse(f"the suite {name} needs a GPU")
    return chosen


def _check_results_file(path: Path) -> None:
    """Ends the process where the results could not be written after the first case."""
    try:
        check_writable(path)
    except OSError as error:
        _refuse(f"--json {path} cannot be written: {error.strerror}")


def _refuse(message: str) -> NoReturn:
    """Wrong usage: exit code 2."""
    print(f"benchmarks: {message}", file=sys.stderr)
    raise SystemExit(2)


def _line(row: Row) -> str:
    if row.red:
        return f"{row.case.name:<44} RED, not measured: {row.red}"
    columns = []
    for name, measured in row.contenders.items():
        if measured.median_seconds is None:
            columns.append(f"{name} {measured.refused.splitlines()[0][:40]}")
            continue
        memory = "" if measured.extra_bytes is None else f" {measured.extra_bytes / MIB:.0f} MiB"
        columns.append(f"{name} {measured.median_seconds * 1e3:.4g} ms{memory}")
    return f"{row.case.name:<44} " + "  ".join(f"{column:<26}" for column in columns).rstrip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    suites = "\n".join(f"{name}: {cases.__doc__}" for name, cases in SUITES.items())
    parser.add_argument("--suite", choices=SUITES, required=True, help=suites)
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name has this in it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=_default_device())
    parser.add_argument("--peers", type=Path, metavar="DIR", help="peers' checkouts, see benchmarks/peers.py")
    parser.add_argument(
        "--indices",
        type=Path,
        metavar="FILE",
        help="an .npz of recorded block indices, [heads, tokens, slots] a layer, blocks of 64",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, after every case")
    parser.add_argument("--resume", action="store_true", help="go on with FILE: skip the cases it has")
    parser.add_argument("--seconds", type=float, default=0.15, help="to measure each contender of a case for")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    return parser


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    # As the server runs its workers: memory that a call frees is there for the next one, in huge pages.
    restart_tuned()
    sys.exit(main())
