"""Fixtures for more than one kind of test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sandbox import Sandbox


@pytest.fixture(scope="session")
def shared_sandbox() -> Iterator[Sandbox]:
    """One private view of the host for the whole run."""
    if os.geteuid() != 0:
        pytest.fail("these tests change identity: run them as root (see HACKING)")
    root = Path(tempfile.mkdtemp(prefix="mda-sandbox-"))
    sandbox = Sandbox(root)
    yield sandbox
    sandbox.close()
    shutil.rmtree(root)


@pytest.fixture
def sandbox(shared_sandbox: Sandbox) -> Iterator[Sandbox]:
    """The private view with an empty mail spool."""
    shared_sandbox.clear_mail()
    yield shared_sandbox
    shared_sandbox.clear_mail()
