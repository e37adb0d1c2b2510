"""Interaction data as LightningDataModules, split by one of two protocols."""

from examples.recsys.data.amazon2014 import AmazonReviews2014
from examples.recsys.data.amazon2018 import AmazonReviews2018
from examples.recsys.data.interactions import Interactions, TitleFile
from examples.recsys.data.module import SequenceDataModule
from examples.recsys.data.movielens import MovieLens1M
from examples.recsys.data.protocol import EvaluationProtocol, LeaveOneOut, TimeSplit
from examples.recsys.data.sequences import PADDING, UserSequences
from examples.recsys.data.synthetic import SyntheticSequences

__all__ = [
    "PADDING",
    "AmazonReviews2014",
    "AmazonReviews2018",
    "EvaluationProtocol",
    "Interactions",
    "LeaveOneOut",
    "MovieLens1M",
    "SequenceDataModule",
    "SyntheticSequences",
    "TimeSplit",
    "TitleFile",
    "UserSequences",
]
