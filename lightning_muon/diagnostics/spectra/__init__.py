"""The subcommand ``lightning-muon spectra``: what the singular values in checkpoints say."""

from lightning_muon.diagnostics.spectra.command import main

__all__ = ["main"]
