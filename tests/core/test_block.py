"""What is done for speed changes no result: attention, blocks, the decoder's last one, the embedding; and the cost."""

from __future__ import annotations

from functools import partial

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from mae_core import build_mae
from mae_core.models import block as block_module
from mae_core.models.block import Block, attend, products
from mae_core.models.timm_trunk import compile_blocks

WIDTH, HEADS = 32, 4


def gradients_of(outputs, inputs):
    weights = torch.linspace(-1, 1, outputs.numel()).view_as(outputs).to(outputs)
    return torch.autograd.grad((outputs * weights).sum(), list(inputs))


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm(), tolerance


def of_width(kind, **options):
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, qkv_bias=True, **options)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale, width, bias", [(None, 8, False), (1.0, 8, True), (None, 5, True), (0.5, 5, False)])
def test_attention_as_products_is_attention(dtype, tolerance, scale, width, bias):
    """In values and gradients, those of biases that all images share included; values may be narrower than keys."""
    torch.manual_seed(0)
    exact = [torch.randn(2, HEADS, n, d, dtype=torch.float64) for n, d in ((5, 8), (9, 8), (9, width))]
    exact += [torch.randn(1, HEADS, 5, 9, dtype=torch.float64)] if bias else []
    plain = [x.clone().requires_grad_() for x in exact]
    ours = [x.to(dtype).requires_grad_() for x in exact]
    logits = plain[0] @ plain[1].mT * (8**-0.5 if scale is None else scale)
    output = (logits + plain[3] if bias else logits).softmax(dim=-1) @ plain[2]
    expected = [output, *gradients_of(output, plain)]
    found = products(*ours, scale=8**-0.5 if scale is None else scale)
    assert found.dtype == dtype
    close([found, *gradients_of(found, ours)], expected, tolerance)
    if dtype == torch.float32:
        fused = attend(*ours[:3], ours[3] if bias else None, scale)
        close([fused, *gradients_of(fused, ours)], expected, tolerance)


def test_the_table_chooses_the_kernel(monkeypatch):
    used = []
    monkeypatch.setattr(
        block_module.AttentionProducts, "apply", lambda q, k, v, _, grid, *biases: used.append((len(q[0, 0]), biases))
    )

    def of(length, dtype=torch.bfloat16, **more):
        x = torch.zeros(1, 1, length, 8, dtype=dtype)
        attend(x, x, more.get("value", x), more.get("bias"))

    of(256)
    of(257)
    of(17, torch.float32)
    assert used == [(256, ())], "bf16 on a CPU, short"
    for dtype in (torch.bfloat16, torch.float32):
        used.clear()
        bias = torch.zeros(1, 1, 300, 300, dtype=dtype)
        of(300, dtype, bias=bias)
        of(300, dtype, value=torch.zeros(1, 1, 300, 5, dtype=dtype))
        of(1281, dtype, value=torch.zeros(1, 1, 1281, 5, dtype=dtype))
        assert used == [(300, (bias,)), (300, ())]


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5}, {"drop_path": 0.5}])
def test_a_block_computes_what_timms_does(options):
    ours, theirs = of_width(Block, **options), of_width(timm_vit.Block, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 7, WIDTH)
    results = []
    for block in (ours, theirs):
        torch.manual_seed(1)
        output = block(x)
        results.append([output, *gradients_of(output, block.parameters())])
    close(*results, 1e-6)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(ours.eval()(x, attn_mask=mask), theirs.eval()(x, attn_mask=mask))


@pytest.mark.parametrize("bias", [True, False])
def test_a_block_at_some_places_alone(bias):
    torch.manual_seed(0)
    block = Block(WIDTH, HEADS, qkv_bias=bias, init_values=0.5)
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    ids = torch.tensor([[1, 4, 8], [0, 2, 3]])
    whole = block(x).gather(1, ids[:, :, None].expand(-1, -1, WIDTH))
    some = block.only_at(x, ids)
    inputs = [x, *block.parameters()]
    close([some, *gradients_of(some, inputs)], [whole, *gradients_of(whole, inputs)], 1e-5)


def small_mae(**options):
    torch.manual_seed(0)
    sizes = {"image_size": (48, 32), "patch_size": 8, "decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4}
    return build_mae("nano", **sizes | options)


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("options", [{}, {"mask_tokens_in_encoder": True}, {"decoder_depth": 1, "in_chans": 2}])
def test_the_last_block_on_hidden_patches_alone_gives_the_same_loss_and_gradients(options, precision, tolerance):
    model = small_mae(**options)
    images = torch.randn(3, model.encoder.in_channels, 48, 32)
    mask = model.masker(3, model.encoder.grid, torch.Generator().manual_seed(1))
    results, outputs = [], []
    for visible in (True, False):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            output = model(images, mask=mask, predict_visible=visible)
        learned = [p for p in model.parameters() if p.requires_grad]
        results.append([output.loss, *torch.autograd.grad(output.loss, learned)])
        outputs.append(output)
    whole, part = outputs
    ids = mask.hidden_ids[:, :, None].expand(-1, -1, whole.prediction.shape[2])
    close([part.prediction], [whole.prediction.gather(1, ids)], tolerance)
    close(*results, tolerance)
    with pytest.raises(ValueError, match="predict_visible=True"):
        model.reconstruct(images, part)


def test_a_loss_on_all_patches_predicts_all():
    model = small_mae()
    model.loss_on_all_patches = True
    output = model(torch.randn(2, 3, 48, 32), generator=torch.Generator().manual_seed(0), predict_visible=False)
    assert output.prediction.shape[1] == model.encoder.grid.num_patches


def test_visible_patches_are_embedded_as_the_convolution_embeds_them():
    encoder = small_mae(in_chans=2).encoder
    nn.init.normal_(encoder.patch_embed.proj.bias)
    images = torch.randn(3, 2, 48, 32)
    mask = small_mae().masker(3, encoder.grid, torch.Generator().manual_seed(1))
    tokens = encoder.embed(images)
    tokens = tokens.gather(1, mask.visible_ids[:, :, None].expand(-1, -1, tokens.shape[2]))
    results = []
    for output in (encoder._visible(images, mask), encoder._with_cls(tokens)):
        results.append([output, *gradients_of(output, encoder.patch_embed.parameters())])
    close(*results, 1e-5)


def test_the_cost_of_a_step_is_pinned():
    """Operations and bytes kept for the backward pass: what makes a step dearer shows here, on any machine."""
    model = small_mae(image_size=64)
    images = torch.randn(2, 3, 64, 64)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(images, generator=torch.Generator().manual_seed(0), predict_visible=False).loss
        loss.backward()
    activations = sum(size for place, size in kept.items() if place not in parameters)
    assert counter.get_total_flops() == pytest.approx(278_044_544, rel=0.01)
    assert activations == pytest.approx(2_338_272, rel=0.02)


def test_products_keep_their_dtype_under_autocast():
    x = torch.randn(1, 1, 9, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        attended = attend(x, x, x)
    kept = attended.grad_fn.saved_tensors
    assert attended.dtype == torch.bfloat16 and all(tensor.dtype == torch.bfloat16 for tensor in kept)
    with block_module.kernels_as_on("cpu"):
        meta = x.to("meta")
        assert attend(meta, meta, meta).shape == attended.shape


def test_an_estimate_for_a_gpu_keeps_what_a_gpu_keeps():
    x = torch.zeros(1, 1, 9, 8, dtype=torch.bfloat16, requires_grad=True)
    with block_module.kernels_as_on("cuda"):
        assert "AttentionProducts" not in attend(x, x, x).grad_fn.name()
    assert "AttentionProducts" in attend(x, x, x).grad_fn.name()


def test_the_compiler_meets_nothing_that_it_cannot_look_into():
    """A break of the graph costs more than compiling gains; torch releases differ in what breaks it."""
    model = build_mae({"width": 32, "depth": 2, "heads": 2}, image_size=32, patch_size=8, decoder_width=16,
                      decoder_depth=2, decoder_heads=2)  # fmt: skip
    mask = model.masker(2, model.encoder.grid, None)
    found = torch._dynamo.explain(lambda x: model(x, mask=mask, predict_visible=False).loss)(torch.randn(2, 3, 32, 32))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_compiled_blocks_of_one_shape_share_their_code_and_compute_the_same(monkeypatch):
    compiled = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiled)
    model = build_mae({"width": 32, "depth": 3, "heads": 2}, image_size=32, patch_size=8, decoder_width=16,
                      decoder_depth=3, decoder_heads=2)  # fmt: skip
    images, mask = torch.randn(2, 3, 32, 32), model.masker(2, model.encoder.grid, None)
    expected = model(images, mask=mask, predict_visible=False).loss
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model)
    loss = model(images, mask=mask, predict_visible=False).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert counters["stats"]["unique_graphs"] == 3, "a block of the encoder, one of the decoder, and its last"
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
