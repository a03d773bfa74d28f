"""How long tests wait, and the one failure that says something about the machine instead of the data."""

from __future__ import annotations

PATIENCE = 3.0
"""Factor of every deadline. A deadline only bounds a failure, so a wide one costs nothing where all goes well."""


class TooSlow(AssertionError):
    """The machine did not get there in time: a process to start, to stop or to freeze, a group to share its partitions.

    `make test` runs a test that ended so once more. It must never stand for an answer that is wrong or missing: a wait for
    data raises it only while the data still come, and a plain AssertionError where they have stopped coming.
    """
