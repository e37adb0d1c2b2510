"""What measures, keeps and draws spectra; no callback, and nothing of a training loop."""
