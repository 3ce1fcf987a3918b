"""What distributed tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from forked_jobs import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as started:
        yield started
