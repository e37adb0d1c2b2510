"""Recommenders as LightningModules with :class:`lightning_muon.MuonMixin`."""

from examples.recsys.models.base import NextItemRecommender, Recommender
from examples.recsys.models.caser import Caser
from examples.recsys.models.generative import GenerativeRecommender
from examples.recsys.models.gru4rec import GRU4Rec
from examples.recsys.models.hstu import HSTU
from examples.recsys.models.minionerec import MiniOneRec
from examples.recsys.models.popularity import Popularity
from examples.recsys.models.sasrec import PaperSASRec, SASRec
from examples.recsys.models.sid_lm import SemanticIdLM
from examples.recsys.models.tiger import TIGER

__all__ = [
    "HSTU",
    "TIGER",
    "Caser",
    "GRU4Rec",
    "GenerativeRecommender",
    "MiniOneRec",
    "NextItemRecommender",
    "PaperSASRec",
    "Popularity",
    "Recommender",
    "SASRec",
    "SemanticIdLM",
]
