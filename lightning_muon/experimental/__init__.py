"""Rules that no evidence supports yet. They may change or go in any version."""

from lightning_muon.experimental.specmuon import SpecMuon

__all__ = ["SpecMuon"]
