"""Workers of one machine: plain processes, which start faster and hold less than actors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from gs_dist.checkpoint.part_manifest import PartManifest
from gs_dist.conversion.parts import Part
from gs_dist.conversion.worker import ConversionTask, convert_part
from gs_dist.errors import JobFailure

__all__ = ["convert_here"]

# Algebra on several threads has no part in a conversion; a pool of them would only take memory.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def convert_here(task: ConversionTask, parts: Iterable[Part], num_workers: int) -> Iterator[PartManifest]:
    """Converts parts on this machine, the largest first where there are several workers.

    Raises:
        JobFailure: a worker was killed; what is finished is kept.
    """
    if num_workers == 1:
        for part in parts:
            yield convert_part(task, part)
        return
    for name in _ONE_THREAD:
        os.environ.setdefault(name, "1")
    ordered = sorted(parts, key=lambda part: (-part.nbytes, part.number))
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending: set[Future[PartManifest]] = {pool.submit(convert_part, task, part) for part in ordered}
        try:
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise JobFailure(
                "a worker process was killed, by hand or for want of memory: run the same command again to go on from "
                "the parts that are finished, with fewer workers if memory was short"
            ) from error
        finally:
            for future in pending:
                future.cancel()
