"""Tokenizers: the small one of one's own, and DALL-E's, read from a file like the published one."""

from __future__ import annotations

import sys
import types
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mae_core import load_tokenizer
from mae_core.errors import UserError
from mae_core.tokenizers import DalleEncoder, DiscreteVAE
from mae_core.training.target_files import TOKENIZER_FORMAT
from mae_core.weights.files import write_weights


def small_vae(stride: int = 4, channels: int = 3, vocabulary: int = 12) -> DiscreteVAE:
    torch.manual_seed(0)
    statistics = {"mean": [0.5] * channels, "std": [0.2] * channels}
    return DiscreteVAE(vocabulary=vocabulary, stride=stride, width=16, depth=1, **statistics)


@given(rows=st.integers(1, 4), cols=st.integers(1, 4), stride=st.sampled_from([2, 5, 7]), channels=st.integers(1, 13))
def test_one_token_a_patch_for_any_grid_patch_and_number_of_channels(rows, cols, stride, channels):
    tokenizer = small_vae(stride, channels)
    ids = tokenizer(torch.rand(2, channels, rows * stride, cols * stride))
    assert ids.shape == (2, rows * cols) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < tokenizer.vocabulary
    assert tokenizer.decode(ids.unflatten(1, (rows, cols))).shape == (2, channels, rows * stride, cols * stride)


def test_tokens_are_in_raster_order():
    tokenizer = small_vae()
    tokenizer.encoder = nn.Sequential()  # no convolutions: each token is of its own patch
    images = torch.rand(1, 3, 8, 12)
    alone = [tokenizer(images[:, :, y : y + 4, x : x + 4]).item() for y in (0, 4) for x in (0, 4, 8)]
    assert tokenizer(images)[0].tolist() == alone and len(set(alone)) > 1


def test_a_tokenizer_learns_what_tells_patches_apart():
    """Patches of four plain colours: each gets a token of its own, which gives its colour back."""
    tokenizer = small_vae(vocabulary=8)
    colours = torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.1, 0.2], [0.1, 0.8, 0.1], [0.9, 0.9, 1.0]])
    images = colours[torch.randint(0, 4, (8, 2, 3))].permute(0, 3, 1, 2)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=5e-3)
    for step in range(80):
        losses = tokenizer.loss(images, temperature=1.0 - step / 90, divergence_weight=0.05)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tokenizer.parameters())
    with torch.no_grad():
        ids = tokenizer(images)
        back = tokenizer.decode(ids.unflatten(1, (2, 3)))
    assert (back - images).square().mean() < 0.02 < images.var()
    patches = images[:, :, ::4, ::4].permute(0, 2, 3, 1).reshape(-1, 3)
    of_colour = [set(ids.flatten()[(patches == colour).all(dim=1)].tolist()) for colour in colours]
    assert all(one.isdisjoint(other) for one in of_colour for other in of_colour if one is not other)


def test_divergence_is_0_where_all_tokens_are_used_alike():
    tokenizer, images = small_vae(vocabulary=8), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        tokenizer.log_scale.fill_(-30.0)  # every token as likely as any other
        even = tokenizer.loss(images, temperature=1.0, divergence_weight=2.0)
        tokenizer.log_scale.fill_(3.0)
        uneven = tokenizer.loss(images, temperature=1.0, divergence_weight=2.0)
    assert even.divergence.abs() < 1e-5 < uneven.divergence
    torch.testing.assert_close(uneven.loss, uneven.reconstruction + 2 * uneven.divergence)
    assert 1 <= uneven.used <= 8 + 1e-3


def test_an_own_tokenizer_comes_back_from_its_file(tmp_path):
    tokenizer = small_vae()
    metadata = {"format": TOKENIZER_FORMAT, "tokenizer": tokenizer.describe()}
    write_weights(tmp_path / "tokenizer.safetensors", tokenizer.state_dict(), metadata)
    images = torch.rand(2, 3, 8, 8)
    for path in (tmp_path, tmp_path / "tokenizer.safetensors"):
        again = load_tokenizer(path)
        assert torch.equal(again(images), tokenizer(images)) and not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())


class Encoder(nn.Module):
    """Holds what a module of DALL-E's package holds: convolutions with ``w`` and ``b`` in named groups."""


class EncoderBlock(nn.Module):
    pass


class Conv2d(nn.Module):
    pass


def convolution(channels: int, width: int, kernel: int, generator: torch.Generator) -> Conv2d:
    made = Conv2d()
    made.n_in, made.n_out, made.kw, made.device = channels, width, kernel, torch.device("cpu")
    weight = torch.randn(width, channels, kernel, kernel, generator=generator) / (channels * kernel**2) ** 0.5
    made.w = nn.Parameter(weight, requires_grad=False)
    made.b = nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
    return made


def published_module(width: int = 8, vocabulary: int = 20) -> Encoder:
    """A tree of modules under the names and in the order of the published encoder, two blocks a group."""
    generator = torch.Generator().manual_seed(5)

    def block(channels: int, after: int) -> EncoderBlock:
        made = EncoderBlock()
        made.n_in, made.n_out, made.post_gain = channels, after, 1 / 64
        made.id_path = nn.Identity() if channels == after else convolution(channels, after, 1, generator)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        thin = after // 4
        sizes = ((channels, thin, 3), (thin, thin, 3), (thin, thin, 3), (thin, after, 1))
        for number, size in enumerate(sizes, start=1):
            path[f"relu_{number}"] = nn.ReLU()
            path[f"conv_{number}"] = convolution(*size, generator)
        made.res_path = nn.Sequential(path)
        return made

    parts: OrderedDict[str, nn.Module] = OrderedDict(input=convolution(3, width, 7, generator))
    for group, (before, after) in enumerate([(1, 1), (1, 2), (2, 4), (4, 8)], start=1):
        blocks = OrderedDict(block_1=block(before * width, after * width), block_2=block(after * width, after * width))
        parts[f"group_{group}"] = nn.Sequential(blocks if group == 4 else OrderedDict(blocks, pool=nn.MaxPool2d(2)))
    output = OrderedDict(relu=nn.ReLU(), conv=convolution(8 * width, vocabulary, 1, generator))
    parts["output"] = nn.Sequential(output)
    encoder = Encoder()
    encoder.n_hid, encoder.use_mixed_precision, encoder.device = width, True, torch.device("cpu")
    encoder.blocks = nn.Sequential(parts)
    return encoder


def formula(module: nn.Module, x: Tensor) -> Tensor:
    """What the published modules compute, written for one of them at a time."""
    if isinstance(module, Conv2d):
        return nn.functional.conv2d(x, module.w, module.b, padding=(module.kw - 1) // 2)
    if isinstance(module, EncoderBlock):
        return formula(module.id_path, x) + module.post_gain * formula(module.res_path, x)
    if isinstance(module, nn.Sequential):
        for part in module:
            x = formula(part, x)
        return x
    return module(x)


@pytest.fixture
def dall_e(monkeypatch):
    """The package of the published file, as far as pickling it needs: gone again when it is read."""
    for name, members in (("encoder", (Encoder, EncoderBlock)), ("utils", (Conv2d,))):
        package = types.ModuleType(f"dall_e.{name}")
        for member in members:
            monkeypatch.setattr(member, "__module__", package.__name__)
            setattr(package, member.__name__, member)
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
    return monkeypatch


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_dalles_published_encoder_is_read_without_its_package(tmp_path, dall_e, zipped):
    module, file = published_module(), tmp_path / "encoder.pkl"
    torch.save(module, file, _use_new_zipfile_serialization=zipped)
    for name in ("dall_e", "dall_e.encoder", "dall_e.utils"):
        dall_e.delitem(sys.modules, name)
    tokenizer = load_tokenizer(file)
    assert isinstance(tokenizer, DalleEncoder) and (tokenizer.vocabulary, tokenizer.stride) == (20, 8)
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    logits = formula(module.blocks, 0.8 * pixels + 0.1)
    assert logits.shape == (2, 20, 2, 3)
    torch.testing.assert_close(tokenizer.blocks(0.8 * pixels + 0.1), logits)
    assert torch.equal(tokenizer(pixels), logits.argmax(dim=1).flatten(1))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dalles_encoder_is_read_as_a_state_dict_too(tmp_path, suffix):
    state, file = DalleEncoder(vocabulary=20, width=8).state_dict(), tmp_path / f"encoder{suffix}"
    if suffix == ".pt":
        torch.save(state, file)
    else:
        write_weights(file, state, {})
    again = load_tokenizer(file)
    assert again.vocabulary == 20 and all(torch.equal(again.state_dict()[name], state[name]) for name in state)


class Trap:
    """Pickled, it would write a file when it is read."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_what_is_no_tokenizer_is_refused_in_one_sentence(tmp_path):
    good = tmp_path / "good.pt"
    torch.save(DalleEncoder(vocabulary=20, width=8).state_dict(), good)
    trapped, old, cut, other, text = (tmp_path / f"{name}.pkl" for name in ("trapped", "old", "cut", "other", "text"))
    torch.save(Trap(tmp_path / "sprung"), trapped)
    torch.save(Trap(tmp_path / "sprung"), old, _use_new_zipfile_serialization=False)
    cut.write_bytes(good.read_bytes()[:2000])
    torch.save({"weight": torch.zeros(2)}, other)
    text.write_text("not a tokenizer")
    messages = {
        tmp_path / "none.pkl": "does not exist; train one with mae train-tokenizer",
        tmp_path: "tokenizer.safetensors does not exist",
        trapped: "loading them could execute code",
        old: "loading them could execute code",
        cut: "truncated or not a torch file",
        other: r"is not a tokenizer: these are not the weights of DALL-E's encoder \('blocks.input.w'\)",
        text: "truncated or not a torch file",
    }
    for path, message in messages.items():
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
