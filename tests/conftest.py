"""Every test runs on one thread, from the same seed, in full float32."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For ``-n auto``: the cores that this process may use; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Set the seed before each test, and restore global settings after it."""
    random.seed(0)
    torch.manual_seed(0)
    environment = dict(os.environ)
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    for name in {*os.environ, *environment} - {"PYTEST_CURRENT_TEST"}:  # Lightning leaves seeds and ports there
        if name not in environment:
            del os.environ[name]
        elif os.environ.get(name) != environment[name]:
            os.environ[name] = environment[name]


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator for one test."""
    return torch.Generator().manual_seed(1234)
