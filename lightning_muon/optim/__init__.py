"""Optimizers for matrices, and HybridOptimizer, which combines them with any other optimizer."""

from lightning_muon.optim.adamuon import AdaMuon
from lightning_muon.optim.conda import Conda
from lightning_muon.optim.dion2 import Dion2
from lightning_muon.optim.hybrid import HybridOptimizer
from lightning_muon.optim.hyperball import MuonHyperball
from lightning_muon.optim.matrix import MatrixOptimizer
from lightning_muon.optim.momentum import MomentumOptimizer
from lightning_muon.optim.multinorm import SWAN, SinkGD
from lightning_muon.optim.muon import Muon
from lightning_muon.optim.muown import Muown
from lightning_muon.optim.namo import NAMO, NAMOD
from lightning_muon.optim.normuon import NorMuon
from lightning_muon.optim.observing import StackUpdate
from lightning_muon.optim.orthogonalizing import OrthogonalizingOptimizer
from lightning_muon.optim.polargrad import PolarGrad
from lightning_muon.optim.reg import REG
from lightning_muon.optim.spectral_sphere import SpectralSphere
from lightning_muon.optim.variance import MuonNSR, MuonVS
from lightning_muon.optim.weight_aware import WeightAwareOptimizer

__all__ = [
    "NAMO",
    "NAMOD",
    "REG",
    "SWAN",
    "AdaMuon",
    "Conda",
    "Dion2",
    "HybridOptimizer",
    "MatrixOptimizer",
    "MomentumOptimizer",
    "Muon",
    "MuonHyperball",
    "MuonNSR",
    "MuonVS",
    "Muown",
    "NorMuon",
    "OrthogonalizingOptimizer",
    "PolarGrad",
    "SinkGD",
    "SpectralSphere",
    "StackUpdate",
    "WeightAwareOptimizer",
]
