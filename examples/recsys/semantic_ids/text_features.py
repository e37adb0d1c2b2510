"""Titles and descriptions of items as embeddings of a sentence encoder."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import rich
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from examples.recsys.checks import check_positive
from examples.recsys.data import SequenceDataModule
from examples.recsys.data.download import cache_folder
from examples.recsys.files import unfinished
from examples.recsys.semantic_ids.features import ItemFeatures


class TextFeatures(ItemFeatures):
    """Mean-pooled and normalised embeddings of what a data module tells of its items.

    The text of an item is its title and its description (``item_titles`` and ``item_descriptions``). It is encoded
    once, on the accelerator at hand, and kept in ``cache_dir`` under a name made from the texts, the name of the
    encoder and ``max_tokens``: where the weights in a folder change, delete the file.

    The mean is over the tokens of a text, as most sentence encoders are trained for. Of a model with a decoder, such as
    T5, the encoder alone is run. What Sentence-T5 (the encoder of arXiv 2305.05065) does after the mean, a dense layer,
    is left out, and models that are trained to pool the last token are not served.

    Args:
        source: the data module that the recommender is trained on.
        encoder: folder or hub name of any encoder that ``transformers.AutoModel`` and ``AutoTokenizer`` load.
        max_tokens: longer texts are cut.
        encoder_batch_size: texts the encoder sees at once.
        cache_dir: where embeddings are kept; None for ``lightning_muon/text_features`` in ``$XDG_CACHE_HOME`` or
            ``~/.cache``.
        **kwargs: of :class:`ItemFeatures`.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(
        self,
        source: SequenceDataModule,
        encoder: str = "sentence-transformers/all-MiniLM-L6-v2",
        max_tokens: int = 128,
        encoder_batch_size: int = 64,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_positive(max_tokens=max_tokens, encoder_batch_size=encoder_batch_size)
        self.source = source
        self.encoder = encoder
        self.max_tokens = max_tokens
        self.encoder_batch_size = encoder_batch_size
        self.cache_dir = cache_folder("text_features", cache_dir)

    @property
    def num_items(self) -> int:
        return self.source.num_items

    @property
    def num_features(self) -> int:
        """Width of the encoder, from its configuration alone."""
        return _width(_transformers().AutoConfig.from_pretrained(self.encoder))

    @property
    def path(self) -> Path:
        """The file that keeps the embeddings; the texts must be there."""
        key = json.dumps([self.encoder, self.max_tokens, self._texts]).encode()
        return self.cache_dir / f"{hashlib.sha256(key).hexdigest()[:24]}.pt"

    def prepare_data(self) -> None:
        """Fetch what the source needs and encode its texts, unless that was done before.

        Raises:
            ValueError: if the source knows no titles.
        """
        self.source.prepare_data()
        if self.path.exists():
            return
        embeddings = encode(self._texts, self.encoder, self.max_tokens, self.encoder_batch_size)
        with unfinished(self.path) as file:
            torch.save(embeddings, file.part)

    def load_features(self) -> Tensor:
        """See the class.

        Raises:
            RuntimeError: before :meth:`prepare_data`.
        """
        if not self.path.exists():
            raise RuntimeError("The texts are not encoded yet: call prepare_data() first.")
        embeddings: Tensor = torch.load(self.path, map_location="cpu", weights_only=True)
        return embeddings

    @cached_property
    def _texts(self) -> list[str]:
        titles, descriptions = self.source.item_titles(), self.source.item_descriptions()
        if titles == self.source.item_names() and not any(descriptions):
            raise ValueError(
                f"{type(self.source).__name__} knows no titles of its items: take AttributeFeatures or EmbeddingFile."
            )
        return [" ".join(filter(None, pair)) for pair in zip(titles, descriptions, strict=True)]


@torch.inference_mode()
def encode(texts: list[str], encoder: str, max_tokens: int = 128, batch_size: int = 64) -> Tensor:
    """Unit vectors (len(texts), width) float32: the mean of the last states of the tokens of a text, normalised.

    Texts of similar length share a batch, so that little is padding.
    """
    transformers = _transformers()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    model = transformers.AutoModel.from_pretrained(encoder).to(device, torch.float32).eval()
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        # Not by config.is_encoder_decoder: it is false where an encoder was saved without its decoder.
        model = model.get_encoder()
    order = sorted(range(len(texts)), key=lambda item: len(texts[item]))
    embeddings = torch.empty(len(texts), _width(model.config))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in track(batches, f"Encoding {len(texts)} texts", console=rich.get_console()):
        tokens = tokenizer(
            [texts[item] for item in batch], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
        ).to(device)
        states = model(**tokens).last_hidden_state
        real = tokens["attention_mask"][:, :, None]
        embeddings[batch] = F.normalize((states * real).sum(1) / real.sum(1).clamp(min=1), dim=1).cpu()
    return embeddings


def _width(config: Any) -> int:
    """Width of the encoder's states; some models with a decoder keep settings of the encoder apart."""
    return int(getattr(config, "encoder", config).hidden_size)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ImportError("TextFeatures needs transformers: pip install transformers.") from None
    return transformers
