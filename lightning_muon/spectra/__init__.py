"""The subcommand ``lightning-muon spectra``: what the singular values in checkpoints say."""

from lightning_muon.spectra.command import main

__all__ = ["main"]
