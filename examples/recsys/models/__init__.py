"""Recommenders as LightningModules with :class:`lightning_muon.MuonMixin`."""

from examples.recsys.models.base import NextItemRecommender, Recommender
from examples.recsys.models.popularity import Popularity
from examples.recsys.models.sasrec import PaperSASRec, SASRec

__all__ = ["NextItemRecommender", "PaperSASRec", "Popularity", "Recommender", "SASRec"]
