"""Semantic ids: items as short tuples of codes, learned from their features."""

# Without RQVAE: it needs vector-quantize-pytorch, and a recommender that reads codes does not.
from examples.recsys.semantic_ids.codes import SemanticIds
from examples.recsys.semantic_ids.features import AttributeFeatures, EmbeddingFile, ItemFeatures, SyntheticFeatures
from examples.recsys.semantic_ids.text_features import TextFeatures

__all__ = ["AttributeFeatures", "EmbeddingFile", "ItemFeatures", "SemanticIds", "SyntheticFeatures", "TextFeatures"]
