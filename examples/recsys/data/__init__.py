"""Interaction data as LightningDataModules under one evaluation protocol."""

from examples.recsys.data.amazon2014 import AmazonReviews2014
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.protocol import LeaveOneOut
from examples.recsys.data.sequences import PADDING, UserSequences
from examples.recsys.data.synthetic import SyntheticSequences

__all__ = [
    "PADDING",
    "AmazonReviews2014",
    "LeaveOneOut",
    "SequenceDataModule",
    "SyntheticSequences",
    "UserSequences",
]
