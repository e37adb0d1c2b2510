"""Sequential recommenders trained with Muon: ``python -m examples.recsys fit --config configs/sasrec_synthetic.yaml``."""
