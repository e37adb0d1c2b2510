"""The parser of the recommenders' command line."""

from __future__ import annotations

import pytest

from examples.recsys.__main__ import main
from tests.examples.configs import on_synthetic


@pytest.fixture(scope="session")
def recommender_parser():
    """One for all files: to make it takes longer than to parse a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["examples.recsys"])
        return main([*on_synthetic("sasrec"), "--trainer.logger=false"], run=False).parser
