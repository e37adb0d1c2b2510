"""Heads in the space of the data, in both directions: what ends in it, and what only looks as if it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from lightning_muon.partition import partition_parameters
from tests.partition.modules import Block, Parts, mlp, roles


def heads(module: nn.Module) -> set[str]:
    """Names of the layers that are heads; those with one output are vectors by their shape, or heads."""
    return {name.removesuffix(".weight") for name, role in roles(module).items() if role == "head"}


def encoder(width: int = 200, latent: int = 8) -> nn.Module:
    return Parts(trunk=mlp(width, 64), mean=nn.Linear(64, latent), logvar=nn.Linear(64, latent))


def conv_encoder(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1))


def conv_decoder(channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, channels, 4, 2, 1))


def softplus(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(*widths), nn.Softplus())


class Residual(nn.Module):
    """A residual block on the data itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Cross(nn.Module):
    """A low-rank cross layer of DCN-v2: back to the width that it reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(width, 8), nn.Linear(8, width)


class TokenMixer(nn.Module):
    """Mixes patches first, then channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.tokens = mlp(patches, 4 * patches, patches)
        self.channels = mlp(width, 4 * width, width)


CAUGHT: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "decoder heads beside two encoders": (
        lambda: Parts(
            z=mlp(200, 64, 8),
            lib=mlp(200, 64, 1),
            dec=mlp(8, 64),
            rate=nn.Linear(64, 200),
            drop=nn.Linear(64, 200),
        ),
        {"rate", "drop"},
    ),
    "decoder heads with activations around them": (
        lambda: Parts(
            z_encoder=encoder(),
            l_encoder=encoder(200, 1),
            decoder=Parts(trunk=mlp(8, 64), scale=softplus(64, 200), r=nn.Linear(64, 200), dropout=nn.Linear(64, 200)),
        ),
        {"decoder.scale.0", "decoder.r", "decoder.dropout"},
    ),
    "encoder that reads covariates with the data": (
        lambda: Parts(
            encoder=encoder(203),
            decoder=Parts(trunk=mlp(11, 64), scale=softplus(64, 200), r=nn.Linear(64, 200), mixture=nn.Linear(64, 5)),
        ),
        {"decoder.scale.0", "decoder.r", "decoder.mixture"},
    ),
    "heads of other widths beside those in data space": (
        lambda: Parts(enc=mlp(200, 64, 8), dec=mlp(8, 64), mean=nn.Linear(64, 200), mixture=nn.Linear(64, 10)),
        {"mean", "mixture"},
    ),
    "a classifier beside the autoencoder": (
        lambda: Parts(a=mlp(200, 64, 8), b=mlp(8, 64, 200), c=mlp(8, 16, 3)),
        {"b.2", "c.2"},
    ),
    "one decoder a modality": (
        lambda: Parts(
            encoders=nn.ModuleDict({"rna": mlp(200, 64, 8), "protein": mlp(30, 64, 8)}),
            decoders=nn.ModuleDict({"rna": mlp(8, 64, 200), "protein": mlp(8, 64, 30)}),
        ),
        {"decoders.rna.2", "decoders.protein.2"},
    ),
    "a second encoder behind the decoder of each modality": (
        lambda: Parts(
            z_encoder_expression=mlp(200, 64, 8),
            z_decoder_expression=mlp(8, 64, 200),
            l_encoder_expression=mlp(200, 64, 2),
            z_encoder_accessibility=mlp(150, 64, 8),
            z_decoder_accessibility=mlp(8, 64, 150),
            l_encoder_accessibility=mlp(150, 64, 2),
        ),
        {"z_decoder_expression.2", "z_decoder_accessibility.2"},
    ),
    "decoder registered before the encoder": (
        lambda: Parts(decoder=mlp(8, 64, 200), encoder=mlp(200, 64, 8)),
        {"decoder.2"},
    ),
    "narrow data": (lambda: Parts(enc=mlp(5, 64, 32, 2), dec=mlp(2, 32, 64, 5)), {"dec.4"}),
    "recurrent autoencoder": (
        lambda: Parts(reader=nn.LSTM(10, 64), writer=nn.LSTM(64, 64), out_proj=nn.Linear(64, 10), aux=mlp(64, 16, 3)),
        {"out_proj", "aux.2"},
    ),
    "images": (lambda: Parts(down=conv_encoder(), up=conv_decoder(), cls=mlp(32, 16, 5)), {"up.2", "cls.2"}),
    "images, decoder by name": (lambda: Parts(encoder=conv_encoder(1), decoder=conv_decoder(2)), {"decoder.2"}),
    "GAN": (
        lambda: Parts(generator=mlp(16, 64, 784), discriminator=mlp(784, 64, 2)),
        {"generator.2", "discriminator.2"},
    ),
    "GAN, discriminator first": (lambda: Parts(D=mlp(784, 64, 2), G=mlp(16, 64, 784)), {"D.2", "G.2"}),
    "GAN of networks": (
        lambda: Parts(
            net_g=Parts(main=mlp(16, 64, 30)),
            critic=Parts(body=mlp(30, 64), adv=nn.Linear(64, 2), aux=nn.Linear(64, 7)),
        ),
        {"net_g.main.2", "critic.adv", "critic.aux"},
    ),
    "conditional GAN": (lambda: Parts(gen=mlp(26, 64, 784), disc=mlp(794, 64, 2)), {"gen.2", "disc.2"}),
    "two translators": (
        lambda: Parts(netG_A=mlp(30, 64, 30), netG_B=mlp(30, 64, 30), netD_A=mlp(30, 64, 2), netD_B=mlp(30, 64, 2)),
        {"netG_A.2", "netG_B.2", "netD_A.2", "netD_B.2"},
    ),
    "convolutional GAN": (
        lambda: Parts(
            generator=nn.Sequential(nn.ConvTranspose2d(16, 32, 4), *conv_decoder()),
            discriminator=nn.Sequential(*conv_encoder(), nn.Conv2d(32, 4, 4)),
        ),
        {"generator.3", "discriminator.3"},
    ),
    "actor and critics": (
        lambda: Parts(actor=mlp(8, 64, 64, 4), critic_1=mlp(12, 64, 2), critic_2=mlp(12, 64, 2)),
        {"actor.4", "critic_1.2", "critic_2.2"},
    ),
    "VAE of flat layers": (
        lambda: Parts(
            fc1=nn.Sequential(nn.Linear(200, 64)),
            fc21=nn.Linear(64, 8),
            fc22=nn.Linear(64, 8),
            fc3=nn.Linear(8, 64),
            fc4=nn.Linear(64, 200),
        ),
        {"fc4"},
    ),
    "VAE-GAN": (
        lambda: Parts(encoder=encoder(), decoder=mlp(8, 64, 200), discriminator=mlp(200, 64, 2)),
        {"decoder.2", "discriminator.2"},
    ),
    "adversarial autoencoder": (
        lambda: Parts(encoder=mlp(200, 64, 8), decoder=mlp(8, 64, 200), discriminator=mlp(8, 64, 2)),
        {"decoder.2", "discriminator.2"},
    ),
}

NOT_CAUGHT: dict[str, Callable[[], nn.Module]] = {
    "two towers": lambda: Parts(user=mlp(16, 32, 24), item=mlp(12, 32, 24)),
    "two towers that return to the width of their inputs": lambda: Parts(user=mlp(16, 32, 16), item=mlp(16, 32, 16)),
    "residual blocks on the data": lambda: nn.ModuleList(Residual(32) for _ in range(3)),
    "transformer blocks without an embedding": lambda: nn.ModuleList(Block(16) for _ in range(2)),
    "token mixers": lambda: nn.ModuleList(TokenMixer(49, 32) for _ in range(2)),
    "one token mixer": lambda: nn.ModuleList([TokenMixer(49, 32)]),
    "transformer of torch": lambda: nn.Transformer(16, 2, 1, 1, 64),
    "encoder and decoder of blocks": lambda: Parts(
        encoder=nn.ModuleList(Block(16) for _ in range(2)), decoder=nn.ModuleList(Block(16) for _ in range(2))
    ),
    "encoder and decoder of one block": lambda: Parts(encoder=Block(16), decoder=Block(16)),
}

ONLY_THE_HEAD: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "an autoencoding block inside a network": (
        lambda: Parts(squeeze=mlp(32, 8), expand=mlp(8, 32), rest=mlp(32, 64, 5)),
        {"rest.2"},
    ),
    "residual blocks and a head": (lambda: Parts(a=Residual(32), b=Residual(32), out=nn.Linear(32, 5)), {"out"}),
    "cross layers over embeddings": (
        lambda: Parts(
            items=nn.Embedding(50, 16),
            users=nn.Embedding(50, 16),
            cross=nn.ModuleList(Cross(32) for _ in range(3)),
            deep=mlp(32, 24),
            top=nn.Linear(56, 2),
        ),
        {"top"},
    ),
    "cross layers in two lists": (
        lambda: Parts(
            items=nn.Embedding(50, 16),
            v=nn.ModuleList(nn.Linear(32, 8) for _ in range(2)),
            u=nn.ModuleList(nn.Linear(8, 32) for _ in range(2)),
            top=nn.Linear(40, 2),
        ),
        {"top"},
    ),
    "latents of feature maps": (
        lambda: Parts(
            down=conv_encoder(), mean=nn.Linear(32 * 4, 8), lift=nn.Linear(8, 32 * 4), up=conv_decoder(), cls=mlp(8, 3)
        ),
        {"up.2", "cls.0"},
    ),
    "latents of feature maps, lifted by the layer that is registered last": (
        lambda: Parts(down=conv_encoder(), up=conv_decoder(), mean=nn.Linear(32 * 4, 8), lift=nn.Linear(8, 32 * 4)),
        {"up.2"},
    ),
    "a trunk and a head without names that say so": (lambda: Parts(a=mlp(16, 64, 128), b=mlp(128, 64, 3)), {"b.2"}),
    "U-Net with a segmentation head": (
        lambda: Parts(
            encoder=conv_encoder(),
            decoder=nn.Sequential(nn.ConvTranspose2d(32, 16, 2), nn.Conv2d(16, 16, 3)),
            segmentation=nn.Conv2d(16, 5, 1),
        ),
        {"segmentation"},
    ),
    "decoder whose output is fused with a skip": (
        lambda: Parts(encoder=mlp(20, 64, 8), decoder=mlp(8, 40), fuse=mlp(104, 30, 5)),
        {"fuse.2"},
    ),
    "seq2seq with a scoring layer": (
        lambda: Parts(
            words=nn.Embedding(90, 16), encoder=nn.GRU(16, 32), decoder=nn.GRU(16, 32), score=nn.Linear(32, 90)
        ),
        {"score"},
    ),
}


@pytest.mark.parametrize(("build", "expected"), CAUGHT.values(), ids=CAUGHT)
def test_ends_in_data_space(build, expected):
    module = build()
    assert heads(module) == expected
    first = {name for name, role in roles(module).items() if name.endswith("0.weight") and role == "hidden"}
    assert first, "first layers that read data stay hidden matrices"


@pytest.mark.parametrize("build", NOT_CAUGHT.values(), ids=NOT_CAUGHT)
def test_hidden_states_that_look_like_data(build):
    assert heads(build()) == set()


@pytest.mark.parametrize(("build", "expected"), ONLY_THE_HEAD.values(), ids=ONLY_THE_HEAD)
def test_only_the_head_of_a_network(build, expected):
    assert heads(build()) == expected


def test_latents_stay_hidden():
    module = Parts(encoder=encoder(), decoder=mlp(8, 64, 200))
    assert roles(module)["encoder.mean.weight"] == roles(module)["encoder.logvar.weight"] == "hidden"


def test_the_reason_names_the_layer_that_reads_the_data():
    partition = partition_parameters(Parts(a=mlp(200, 64, 8), b=mlp(8, 64, 200), c=mlp(8, 16, 3)))
    assert "space of the data, as wide as the input of 'a.0'" in partition["b.2.weight"].reason
