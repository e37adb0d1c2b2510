"""The RQ-VAE against loops over levels in float64; its codebooks and logged values."""

from __future__ import annotations

import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ

from examples.recsys.semantic_ids.codes import SemanticIds
from examples.recsys.semantic_ids.features import ItemFeatures
from examples.recsys.semantic_ids.rqvae import RQVAE
from lightning_muon import Muon, ParameterRule
from tests.lightning_helpers import QUIET

SMALL = {"levels": 3, "codebook_size": 4, "code_width": 3, "hidden_sizes": (10, 6)}


class Clusters(ItemFeatures):
    """200 items around 20 centres."""

    def load_features(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        centres = torch.randn(20, 7, generator=generator)
        return centres.repeat(10, 1) + 0.2 * torch.randn(200, 7, generator=generator)


def small_model(**kwargs) -> RQVAE:
    model = RQVAE(num_features=7, **{**SMALL, **kwargs})
    for layer in model.quantizer.layers:
        torch.nn.init.normal_(layer.codebook.data, std=0.2)
    return model


def frozen_model() -> RQVAE:
    """A model with learning rate 0, so training changes no weights by gradient."""
    model = small_model()
    model.matrix_optimizer = model.other_optimizer = partial(torch.optim.SGD, lr=0.0)
    return model


def trainer(**kwargs) -> L.Trainer:
    return L.Trainer(**{**QUIET, "max_epochs": 1, **kwargs})


def reference(model: RQVAE, item: Tensor, commitment: float) -> tuple[Tensor, list[Tensor], list[int]]:
    """Loss, its three terms and the codes of one item, level by level; ``detach`` is the sg of the equations."""
    z = model.encoder(item)
    residual, quantized, codes = z, torch.zeros_like(z), []
    codebook_term = commitment_term = torch.zeros((), dtype=z.dtype)
    for layer in model.quantizer.layers:
        distances = [float((residual - vector).detach().square().sum()) for vector in layer.codebook]
        codes.append(distances.index(min(distances)))
        vector = layer.codebook[codes[-1]]
        codebook_term = codebook_term + (residual.detach() - vector).square().sum()
        commitment_term = commitment_term + (residual - vector.detach()).square().sum()
        quantized = quantized + vector
        residual = residual - vector.detach()
    reconstruction = (item - model.decoder(z + (quantized - z).detach())).square().sum()
    loss = reconstruction + codebook_term + commitment * commitment_term
    return loss, [reconstruction, codebook_term, commitment_term], codes


class TestEquations:
    @pytest.mark.parametrize("training", [True, False])
    def test_terms_codes_and_gradients_are_those_of_the_loops(self, training, monkeypatch):
        model = small_model(commitment=0.3).train(training)
        oracle = copy.deepcopy(model).double()
        items = torch.randn(30, 7)
        losses = model.losses(items)
        (losses.reconstruction + losses.codebook + model.commitment * losses.commitment).backward()
        terms = [reference(oracle, item, 0.3) for item in items.double()]
        torch.stack([loss for loss, _, _ in terms]).mean().backward()
        assert losses.codes.tolist() == [codes for _, _, codes in terms]
        for number in range(3):
            expected = torch.stack([parts[number] for _, parts, _ in terms]).mean()
            torch.testing.assert_close(losses[number].double(), expected, rtol=1e-5, atol=1e-6)
        for (name, parameter), other in zip(model.named_parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=1e-4, atol=1e-5, msg=name)

    def test_a_codebook_learns_from_its_own_level_alone(self):
        model = small_model()
        model.losses(torch.randn(30, 7)).reconstruction.backward()
        assert all(layer._codebook.embed.grad is None for layer in model.quantizer.layers)
        assert model.encoder[0].weight.grad.any()

    def test_codes_and_decode_go_with_the_losses(self):
        model, items = small_model(), torch.randn(30, 7)
        losses, quantization = model.losses(items), model.quantize(items)
        assert torch.equal(model.codes(items), losses.codes)
        torch.testing.assert_close(model.decode(losses.codes), losses.decoded)
        torch.testing.assert_close(quantization.sums(), quantization.vectors - self.rest(model, items))

    def test_last_level_distances_choose_the_last_code(self):
        quantization = small_model().quantize(torch.randn(30, 7))
        assert torch.equal(quantization.last_level_distances().argmin(1), quantization.codes[:, -1])

    def test_autocast_changes_nothing(self):
        model, items = small_model(), torch.randn(300, 7)
        with torch.autocast("cpu", torch.bfloat16):
            cast, cast_codes = model.losses(items), model.codes(items)
        losses = model.losses(items)
        assert torch.equal(cast.codes, losses.codes)
        assert torch.equal(cast_codes, losses.codes)
        assert torch.equal(cast.decoded, losses.decoded)
        assert torch.equal(cast.commitment, losses.commitment)

    @staticmethod
    def rest(model: RQVAE, items: Tensor) -> Tensor:
        with torch.no_grad():
            left = model.encoder(items)
            for level, layer in enumerate(model.quantizer.layers):
                left = left - layer.codebook[model.codes(items)[:, level]]
        return left


class TestPartition:
    def test_maps_are_matrices_and_codebooks_are_not(self):
        partition = RQVAE(num_features=637).partition()
        groups = {entry.name: (entry.group, tuple(entry.parameter.shape)) for entry in partition}
        matrices = [shape for group, shape in groups.values() if group == "matrix"]
        assert matrices == [
            *[(512, 637), (256, 512), (128, 256), (32, 128)],
            *[(128, 32), (256, 128), (512, 256), (637, 512)],
        ]
        codebooks = [value for name, value in groups.items() if name.startswith("quantizer.")]
        assert codebooks == [("other", (1, 256, 32))] * 3

    def test_rules_of_the_user_come_after(self):
        model = small_model(parameter_rules=[ParameterRule(pattern="decoder.4.weight", group="other")])
        assert model.partition()["decoder.4.weight"].group == "other"
        assert model.partition()["decoder.2.weight"].group == "matrix"


class TestCodebooks:
    def test_they_start_as_kmeans_of_what_the_encoder_makes_of_the_first_batch(self):
        model, data = frozen_model(), Clusters(batch_size=200)
        trainer().fit(model, data)
        quantization = model.quantize(data.features())
        left = quantization.vectors
        for level, codebook in enumerate(quantization.codebooks):
            codes = quantization.codes[:, level]
            means = torch.stack([left[codes == code].mean(0) for code in range(4)])
            torch.testing.assert_close(codebook.detach(), means, atol=1e-5, rtol=1e-4)
            left = left - codebook[codes].detach()
        assert bool(model.codebooks_set)

    def test_a_second_fit_keeps_them(self):
        model, data = frozen_model(), Clusters(batch_size=200)
        trainer().fit(model, data)
        codebooks = model.quantizer.codebooks.clone()
        model.counts.fill_(1)
        trainer().fit(model, data)
        assert torch.equal(model.quantizer.codebooks, codebooks)

    def test_codes_that_no_item_took_move_to_what_is_left_of_items(self):
        model, data = frozen_model(), Clusters(batch_size=200)
        trainer().fit(model, data)
        with torch.no_grad():
            model.quantizer.layers[1].codebook[2] = 1000.0
        model.counts[1] = torch.tensor([9, 9, 0, 9])
        model.counts[[0, 2]] = 9
        before = model.quantizer.codebooks.clone()
        first_level = before[0][model.codes(data.features())[:, 0]]
        residuals = model.encoder(data.features()).detach() - first_level
        trainer().fit(model, data)
        after = model.quantizer.codebooks.detach()
        changed = (before != after).any(2)
        assert changed.nonzero().tolist() == [[1, 2]]
        assert torch.isclose(residuals, after[1, 2], atol=1e-6).all(1).any()
        assert (model.counts.sum(1) == 200).all()

    def test_a_small_first_batch_gets_a_sentence(self):
        with pytest.raises(
            ValueError, match=r"first batch has 3 items, but codebook_size=4 needs as many: set a larger"
        ):
            trainer().fit(small_model(), Clusters(batch_size=3))


class TestTraining:
    def test_it_explains_the_features_and_uses_its_codes(self):
        model, data = RQVAE(7, codebook_size=8, code_width=4, hidden_sizes=(32,)), Clusters(batch_size=50)
        model.matrix_optimizer, model.other_optimizer = partial(Muon, lr=2e-2), partial(torch.optim.AdamW, lr=2e-2)
        run = trainer(max_epochs=40, limit_val_batches=1.0, check_val_every_n_epoch=40)
        run.fit(model, data)
        metrics = {name: float(value) for name, value in run.callback_metrics.items()}
        assert metrics["val/explained"] > 0.8
        assert metrics["val/reconstruction"] == pytest.approx(1 - metrics["val/explained"], abs=1e-4)
        assert min(metrics[f"val/use_{level}"] for level in (1, 2, 3)) > 0.9

    def test_validation_reports_all_items_whatever_the_batches(self):
        model, data = small_model(), Clusters(eval_batch_size=64)
        (metrics,) = trainer(limit_val_batches=1.0).validate(model, data, verbose=False)
        features = data.features()
        codes, decoded = model.codes(features), model.losses(features).decoded.detach()
        rows = [tuple(row) for row in codes.tolist()]
        error = float((features - decoded).square().mean())
        assert metrics["val/collisions"] == sum(rows.count(row) > 1 for row in rows)
        assert metrics["val/reconstruction"] == pytest.approx(error, rel=1e-5)
        assert metrics["val/explained"] == pytest.approx(
            1 - error / float(features.var(0, correction=0).mean()), rel=1e-4
        )
        assert [metrics[f"val/use_{level + 1}"] for level in range(3)] == [
            len(codes[:, level].unique()) / 4 for level in range(3)
        ]
        assert metrics["val/commitment"] == pytest.approx(float(model.losses(features).commitment), rel=1e-5)

    def test_a_checkpoint_knows_its_codebooks_and_their_use(self, tmp_path):
        model, data = small_model(), Clusters(batch_size=50)
        run = trainer(max_epochs=2)
        run.fit(model, data)
        run.save_checkpoint(tmp_path / "two.ckpt")
        loaded = RQVAE.load_from_checkpoint(tmp_path / "two.ckpt", weights_only=True)
        assert bool(loaded.codebooks_set)
        assert loaded.counts.sum(1).tolist() == [200] * 3
        assert torch.equal(loaded.codes(data.features()), model.codes(data.features()))

    def test_training_goes_on_after_a_validation_that_loaded_features_and_weights(self, tmp_path):
        model, data = small_model(), Clusters()
        run = trainer(limit_val_batches=1.0, max_epochs=2)
        run.strategy.connect(model)
        run.save_checkpoint(tmp_path / "start.ckpt")
        run.validate(model, data, ckpt_path=tmp_path / "start.ckpt", weights_only=True, verbose=False)
        run.fit(model, data)
        assert run.global_step == 2
        assert model.counts.sum(1).tolist() == [200] * 3

    @pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
    def test_every_precision_trains_and_validates_the_codes_that_it_gives(self, precision):
        model, data = small_model(), Clusters(batch_size=50)
        run = trainer(precision=precision, limit_val_batches=1.0, max_epochs=2)
        run.fit(model, data)
        features = data.features()
        quantization = model.quantize(features)
        decoded = model.decode(quantization.codes)
        assert run.callback_metrics["val/collisions"] == SemanticIds(quantization.codes).collisions()
        assert quantization.vectors.dtype == quantization.codebooks.dtype == decoded.dtype == torch.float32
        error = float((features - decoded).square().mean())
        assert float(run.callback_metrics["val/reconstruction"]) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("levels", 0, "levels must be 1 or more, got 0"),
        ("codebook_size", 0, "codebook_size must be 1 or more, got 0"),
        ("hidden_sizes", (8, 0), "hidden_sizes must be 1 or more, got 0"),
        ("commitment", -0.1, "commitment must be 0 or more, got -0.1"),
    ],
)
def test_bad_arguments_get_a_sentence(argument, value, message):
    with pytest.raises(ValueError, match=message):
        RQVAE(**{"num_features": 7, **SMALL, argument: value})


def test_the_library_looks_for_the_nearest_code():
    """Assumptions about ResidualVQ: greedy codes, and codebooks as parameters that only the optimizer updates."""
    quantizer = ResidualVQ(dim=3, num_quantizers=2, codebook_size=5, learnable_codebook=True, ema_update=False)
    before = quantizer.codebooks.clone()
    quantizer(torch.randn(50, 3))
    assert torch.equal(quantizer.codebooks, before)
    assert [tuple(parameter.shape) for parameter in quantizer.parameters()] == [(1, 5, 3)] * 2
