"""Bad input never hangs: every test of this folder has a time limit, far above what it takes on a busy machine."""

from __future__ import annotations

from pathlib import Path

import pytest

SECONDS = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Called by pytest with the tests of all folders."""
    for item in items:
        if Path(__file__).parent in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SECONDS))
