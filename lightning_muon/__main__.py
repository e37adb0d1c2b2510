"""``python -m lightning_muon``: the same as ``lightning-muon``."""

from lightning_muon.cli import main

if __name__ == "__main__":
    main()
