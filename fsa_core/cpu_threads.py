"""Threads of the CPU backend: each takes whole parts of a call, with torch's operations on itself alone.

A tile's operations are too short to split: threads would meet thousands of times a call, and wait each time
for the one that the system has not woken yet. A part keeps a thread busy for tens of milliseconds.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def share(items: Iterable[T], work: Callable[[Iterator[T]], None]) -> None:
    """Call ``work`` on as many threads as torch has here, at most one an item; all draw from one iterator.

    A single item is worked on by the caller, with all of torch's threads. ``work`` runs without autograd; its
    first error is raised here.
    """
    items = list(items)
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, len(items))
    if num_workers < 2:
        work(iter(items))
        return
    remaining, is_inference = iter(items), torch.is_inference_mode_enabled()
    all_set = threading.Barrier(num_workers + 1)

    def draw() -> None:
        # Asked first, because torch's first question in a thread is what sets the thread's number.
        torch.get_num_threads()
        torch.set_num_threads(1)
        all_set.wait()
        with torch.inference_mode(is_inference), torch.no_grad():
            work(remaining)

    with ThreadPoolExecutor(num_workers, thread_name_prefix="fsa-cpu") as pool:
        try:
            workers = [pool.submit(draw) for _ in range(num_workers)]
            all_set.wait()
        except BaseException:
            all_set.abort()
            raise
        finally:
            # The number is a thread's own, but a thread that starts later gets the one that was set last.
            torch.set_num_threads(num_threads)
    for worker in workers:
        worker.result()
