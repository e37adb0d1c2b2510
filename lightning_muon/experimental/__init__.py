"""Experimental rules without evidence that they help. They may change or be removed in any version."""

from lightning_muon.experimental.specmuon import SpecMuon

__all__ = ["SpecMuon"]
