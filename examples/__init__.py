"""Worked examples of lightning_muon; they use its public names only."""
