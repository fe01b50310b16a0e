"""What a process may use of its machine, containers' limits included."""

import contextlib
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def memory() -> Iterator[int]:
    """Yield the bytes of memory that there are, and that each control group may use."""
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for text in _limits("memory", "memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(ValueError):  # "max"
            yield int(text)


def processors(most: int) -> int:
    """Return how many of so many processors the control groups leave at a time.

    Where `docker run --cpus=2` grants two of 64, 64 threads would use up in a moment
    what they may, and all stand still for the rest of each tenth of a second.
    """
    for text in _limits("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
        with contextlib.suppress(ValueError, ZeroDivisionError):  # "max"; -1: no limit
            quota, period = map(int, text.split())
            share = quota / period
            if share > 0:
                most = min(most, math.ceil(share))
    return most


def _limits(kind: str, name: str, *old_names: str) -> Iterator[str]:
    """Yield what the files of a kind of limit say in each control group.

    Each group is bound by those that it is in.  In a container, the paths may be those
    outside it, which are not to be found; its own group is the root then.
    """
    groups = _ROOT / "sys/fs/cgroup"
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (_ROOT / "proc/self/cgroup").read_text(errors="replace").splitlines()
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            roots, names = [groups, groups / "unified"], [name]
        elif kind in kinds.split(","):
            roots, names = [groups / kind], list(old_names)
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for root, each in itertools.product(roots, (group, *group.parents)):
            with contextlib.suppress(OSError):
                yield " ".join(
                    (root / each / file).read_text().strip() for file in names
                )
