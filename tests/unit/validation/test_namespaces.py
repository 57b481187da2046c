"""Where nodes cannot be made of network namespaces, the reason is said."""

from __future__ import annotations

import os
import shutil

import pytest

from scripts.validation import namespaces

pytestmark = pytest.mark.fast


def test_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert namespaces.why_not() == "network namespaces need root"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    assert namespaces.why_not() == "tc not found: install iproute2"
