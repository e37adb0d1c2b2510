"""Recommenders as LightningModules with :class:`lightning_muon.MuonMixin`."""

from examples.recsys.models.base import NextItemRecommender, Recommender
from examples.recsys.models.caser import Caser
from examples.recsys.models.gru4rec import GRU4Rec
from examples.recsys.models.hstu import HSTU
from examples.recsys.models.popularity import Popularity
from examples.recsys.models.sasrec import PaperSASRec, SASRec

__all__ = ["HSTU", "Caser", "GRU4Rec", "NextItemRecommender", "PaperSASRec", "Popularity", "Recommender", "SASRec"]
