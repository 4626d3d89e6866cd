"""Broken flags and arguments of every command: one message, exit code 2, nothing written."""

from __future__ import annotations

import pytest


def test_each_of_these_tests_has_a_time_limit(request: pytest.FixtureRequest) -> None:
    limit = request.node.get_closest_marker("timeout")
    assert limit is not None
    assert 0 < limit.args[0] <= 300
