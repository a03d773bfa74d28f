"""`onerec` whose preset `tiny` is tinier, for the processes of a test: `python small_onerec.py train …`."""

from __future__ import annotations

import pytest
from small_world import make_small

from onerec.cli import main

if __name__ == "__main__":
    make_small(pytest.MonkeyPatch())
    main()
