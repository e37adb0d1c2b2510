"""Sequential recommenders: ``python -m examples.recsys fit --config configs/sasrec_synthetic.yaml``."""
