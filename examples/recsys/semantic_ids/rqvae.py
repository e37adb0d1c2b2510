"""RQ-VAE: semantic ids from a trained residual quantizer (arXiv 2107.03312; of items, arXiv 2305.05065)."""

from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from vector_quantize_pytorch import ResidualVQ

from examples.recsys.checks import check_positive
from examples.recsys.semantic_ids.kmeans import residual_kmeans
from examples.recsys.semantic_ids.quality import QuantizationQuality, collisions_and_error
from examples.recsys.semantic_ids.quantization import Quantization, code_vectors
from lightning_muon import MuonMixin, ParameterRule


class Losses(NamedTuple):
    """Terms of the loss, each a mean over the items of a batch, and what else came of the batch."""

    reconstruction: Tensor
    codebook: Tensor
    commitment: Tensor
    decoded: Tensor
    codes: Tensor


class RQVAE(MuonMixin, L.LightningModule):
    """An autoencoder whose narrowest layer is a sum of code vectors, one a level.

    The encoder makes ``z`` of an item's features. With ``r_1 = z``, level l takes the nearest vector of its
    codebook and hands on what is left; the decoder sees the sum::

        c_l = argmin_c |r_l - e_l[c]|^2        r_{l+1} = r_l - sg(e_l[c_l])        q = sum_l e_l[c_l]

    The loss of an item, where ``sg`` marks what gets no gradient and beta is ``commitment``, is ::

        |x - decoder(z + sg(q - z))|^2  +  sum_l (|sg(r_l) - e_l[c_l]|^2 + beta |r_l - sg(e_l[c_l])|^2)

    The decoder's gradient goes straight through the codes to the encoder, and a code vector learns at its own level
    alone. Codebooks are parameters, for the other optimizer; all maps of encoder and decoder are matrices, the last one
    too: features are no classes.

    Before the first step RQ-k-means of what the encoder makes of the first batch sets the codebooks. Codes that no item
    took in an epoch get new vectors at the start of the next: what is left, at their level, of items drawn by the
    square of what their codes leave. Both go by the batches of all processes, which keep the same codebooks.

    Encoder and decoder compute in the type of their weights, and codes are found in float32: autocast makes no
    difference to these small nets, so that an item has the same codes within a training run and after it.

    Logs the first term over D as ``train/reconstruction``, the last without beta as ``train/commitment``; and of all
    items ``val/commitment`` and what :class:`QuantizationQuality` computes, as ``val/reconstruction``, ``val/use_1``,
    ``val/collisions``, ... Callbacks can also monitor ``val/collisions_and_error``, whose fraction tells which weights
    with as many collisions explain more.

    Args:
        num_features: width D of the features.
        levels: codes an item gets.
        codebook_size: code vectors a level; the first batch needs as many items.
        code_width: width of a code vector.
        hidden_sizes: widths between D and ``code_width`` in the encoder; the decoder mirrors them.
        commitment: weight beta of what draws the encoder to the codes.
        **kwargs: optimizers, schedule and rules of :class:`lightning_muon.MuonMixin`.

    Raises:
        ValueError: if a size is below 1 or ``commitment`` is negative; if the first batch has fewer items than a
            codebook.
    """

    def __init__(
        self,
        num_features: int,
        levels: int = 3,
        codebook_size: int = 256,
        code_width: int = 32,
        hidden_sizes: tuple[int, ...] = (512, 256, 128),
        commitment: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()
        check_positive(num_features=num_features, levels=levels, codebook_size=codebook_size, code_width=code_width)
        for width in hidden_sizes:
            check_positive(hidden_sizes=width)
        if not commitment >= 0.0:
            raise ValueError(f"commitment must be 0 or more, got {commitment}.")
        self.levels = levels
        self.codebook_size = codebook_size
        self.commitment = commitment
        self.encoder = _perceptron(num_features, *hidden_sizes, code_width)
        self.decoder = _perceptron(code_width, *reversed(hidden_sizes), num_features)
        # The library's losses weigh both sides of the commitment alike, and its straight-through sum has the gradient
        # of as many encoders as there are levels: it finds the codes, and the loss is made here.
        self.quantizer = ResidualVQ(
            dim=code_width,
            num_quantizers=levels,
            codebook_size=codebook_size,
            learnable_codebook=True,
            ema_update=False,
            rotation_trick=False,
            commitment_weight=0.0,
        )
        self.register_buffer("codebooks_set", torch.tensor(False))
        self.register_buffer("counts", torch.zeros(levels, codebook_size, dtype=torch.long))
        self.quality = QuantizationQuality(num_features, codebook_size)
        self.parameter_rules = [ParameterRule(pattern="decoder.*.weight", group="matrix"), *self.parameter_rules]

    @property
    def codebooks(self) -> Tensor:
        """The code vectors, (levels, codebook_size, code_width) float32."""
        return self.quantizer.codebooks.float()

    @torch.no_grad()
    def quantize(self, features: Tensor) -> Quantization:
        """Encode features (N, D) and find their codes."""
        z = _run(self.encoder, features)
        return Quantization(z, self._nearest(z), self.codebooks)

    def codes(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, levels) int64."""
        return self.quantize(features).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """What codes stand for: (N, levels) -> (N, D) float32."""
        return _run(self.decoder, code_vectors(self.codebooks, codes).sum(0))

    def losses(self, features: Tensor) -> Losses:
        """The three terms of the loss of features (B, D), beta not counted in."""
        z = _run(self.encoder, features)
        codes = self._nearest(z)
        vectors = code_vectors(self.codebooks, codes)
        residuals = z - (vectors.cumsum(0) - vectors).detach()
        decoded = _run(self.decoder, z + (vectors.sum(0) - z).detach())
        return Losses(
            _mean_square(decoded - features),
            _mean_square(vectors - residuals.detach()),
            _mean_square(residuals - vectors.detach()),
            decoded,
            codes,
        )

    def on_train_batch_start(self, batch: Tensor, batch_index: int) -> None:
        if batch_index:
            return
        if not bool(self.codebooks_set):
            self._start_codebooks(batch)
        elif bool(self.counts.any()):
            self._replace_unused(batch)
        self.counts.zero_()

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        losses = self.losses(batch)
        for level, codes in enumerate(self.all_gather(losses.codes).flatten(0, -2).T):
            self.counts[level] += torch.bincount(codes, minlength=self.codebook_size)
        loss = losses.reconstruction + losses.codebook + self.commitment * losses.commitment
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        self.log("train/reconstruction", losses.reconstruction / batch.shape[1], batch_size=len(batch))
        self.log("train/commitment", losses.commitment, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, batch_index: int) -> None:
        losses = self.losses(batch)
        self.quality.update(batch, losses.decoded, losses.codes)
        self.log("val/commitment", losses.commitment, batch_size=len(batch), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        quality = self.quality.compute()
        for name, value in quality.items():
            self.log(f"val/{name}", value, prog_bar=name == "collisions")
        # Not logged: that would make it float32.
        self.trainer.callback_metrics["val/collisions_and_error"] = collisions_and_error(quality)
        self.quality.reset()

    @torch.no_grad()
    def _nearest(self, z: Tensor) -> Tensor:
        """Codes of what the encoder makes of items: (B, code_width) float32 -> (B, levels) int64."""
        with torch.autocast(z.device.type, enabled=False):
            codes: Tensor = self.quantizer(z)[1]
        return codes

    def _start_codebooks(self, batch: Tensor) -> None:
        vectors = self._encode_all(batch)
        if len(vectors) < self.codebook_size:
            raise ValueError(
                f"The first batch has {len(vectors)} items, but codebook_size={self.codebook_size} needs as many: set "
                "a larger batch_size, or a smaller codebook_size."
            )
        _, codebooks = residual_kmeans(vectors, self.levels, self.codebook_size)
        self._set_codebooks(codebooks)
        self.codebooks_set.fill_(True)

    @torch.no_grad()
    def _replace_unused(self, batch: Tensor) -> None:
        unused = self.counts == 0
        if not bool(unused.any()):
            return
        z = self._encode_all(batch)
        codebooks = self.codebooks.clone()
        vectors = code_vectors(codebooks, self._nearest(z))
        residuals = z - (vectors.cumsum(0) - vectors)
        errors = (residuals - vectors).square().sum(-1)
        for level in range(self.levels):
            codes = unused[level].nonzero().flatten()[: int(errors[level].count_nonzero())]
            if len(codes):
                codebooks[level, codes] = residuals[level, torch.multinomial(errors[level], len(codes))]
        self._set_codebooks(codebooks)

    @torch.no_grad()
    def _encode_all(self, batch: Tensor) -> Tensor:
        """What the encoder makes of the batches of all processes: (B, D) -> (processes * B, code_width)."""
        return self.all_gather(_run(self.encoder, batch)).flatten(0, -2)

    @torch.no_grad()
    def _set_codebooks(self, codebooks: Tensor) -> None:
        """Take the codebooks (levels, codebook_size, code_width) of the first process."""
        codebooks = self.trainer.strategy.broadcast(codebooks.cpu())
        for layer, vectors in zip(self.quantizer.layers, codebooks, strict=True):
            layer.codebook = vectors


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _run(net: nn.Sequential, inputs: Tensor) -> Tensor:
    """What a net makes of inputs in the type of its weights, whatever autocast says, as float32."""
    weight = next(net.parameters())
    with torch.autocast(weight.device.type, enabled=False):
        return net(inputs.to(weight.dtype)).float()


def _mean_square(differences: Tensor) -> Tensor:
    """Squared lengths, summed over levels and averaged over items: (..., B, d) -> scalar."""
    return differences.square().sum() / differences.shape[-2]
