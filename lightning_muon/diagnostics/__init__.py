"""Measures, stores and draws spectra. Contains no callbacks and no training loop."""
