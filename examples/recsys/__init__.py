"""Sequential recommenders: ``python -m examples.recsys fit -c configs/model/MODEL.yaml -c configs/data/DATA.yaml``."""
