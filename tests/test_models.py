import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

from models import CNN, Attention, Block, ViT, build_model, count_multiply_adds, count_parameters
from train_cnn import RECIPE as CNN_RECIPE
from train_vit import RECIPE as VIT_RECIPE


def recipe_model(name):
    recipe = CNN_RECIPE if name == "cnn" else VIT_RECIPE
    keys = ("stem", "widths", "depths") if name == "cnn" else (
        "patch_size", "dim", "depth", "heads", "mlp_ratio", "drop_path")  # fmt: skip
    torch.manual_seed(0)
    return build_model(name, {key: recipe[key] for key in keys})


@pytest.fixture(params=["cnn", "vit"])
def model(request):
    return recipe_model(request.param)


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "parameters", "millions", "most"),
    [("cnn", 551_354, 59, 559_178), ("vit", 1_806_538, 112, 2_700_000)],
)
def test_sizes_are_those_that_readme_says(name, parameters, millions, most):
    model = recipe_model(name).eval()
    assert count_parameters(model) == parameters <= most
    assert round(count_multiply_adds(model, torch.zeros(1, 3, 32, 32)) / 1e6) == millions
    page = (ROOT / "README.md").read_text()
    assert f"{parameters:,}" in page and f"{millions} M" in page


def test_stochastic_depth_grows_with_the_block():
    blocks = ViT(depth=4, drop_path=0.3).blocks
    assert [block.drop_path.p for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_each_half_of_a_block_is_skipped_or_doubled_for_each_image():
    torch.manual_seed(0)
    block, x, found = Block(8, 2, 2.0, drop_path=0.5), torch.randn(64, 5, 8), []
    with torch.no_grad():
        out = block(x)
        for attention, mlp in ((0, 0), (0, 2), (2, 0), (2, 2)):  # 2 = 1 / (1 - .5)
            y = x + attention * block.attention(block.norm1(x))
            y = y + mlp * block.mlp(block.norm2(y))
            found.append((out - y).abs().amax((1, 2)) < 1e-5)
    assert torch.stack(found).sum(0).tolist() == [1] * 64
    assert min(each.sum() for each in found) > 5


def test_positions_are_sines_and_cosines():
    positions = ViT(dim=16, heads=2, patch_size=8).positions[0]  # 1 + 16 tokens
    assert not positions[0].any()
    row = []
    for wave, place in ((math.sin, 1), (math.cos, 1), (math.sin, 2), (math.cos, 2)):  # y = 1, x = 2
        row += [wave(place * 10_000 ** (-i / 4)) for i in range(4)]
    assert positions[1 + 4 + 2].tolist() == pytest.approx(row, abs=1e-6)


def test_batch_gives_what_single_images_give_and_images_differ(model, images):
    model.eval()
    logits = model(images)
    assert logits.shape == (4, 10)
    for i in range(4):
        torch.testing.assert_close(logits[i], model(images[i : i + 1])[0], atol=1e-5, rtol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-4  # ten times the tolerance above


def test_first_loss_is_that_of_guessing(model, images):
    loss = F.cross_entropy(model.train()(images.repeat(8, 1, 1, 1)), torch.arange(32) % 10)
    assert abs(loss.item() - math.log(10)) < 0.5


def test_overfits_one_batch(model, images):
    labels = torch.tensor([3, 1, 4, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_every_parameter_gets_a_gradient(model, images):
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_forward_is_head_of_features_with_or_without_intermediates(model, images):
    model.eval()
    features, _ = model.forward_features(images, return_intermediates=True)
    alone = model.forward_features(images)  # of a ViT the class token
    torch.testing.assert_close(features[:, : alone.shape[1]], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.forward_head(features), model(images), atol=1e-5, rtol=1e-5)


def test_cnns_last_map_is_8_by_8(images):
    model = recipe_model("cnn")
    x, found = model.forward_features(images, return_intermediates=True)
    assert x.shape[2:] == (8, 8) and found["map"][-1] is x
    assert [tuple(m.shape[2:]) for m in found["map"]] == [(16, 16), (8, 8)]


def test_vits_intermediates(images):
    model = recipe_model("vit").eval()
    x, found = model.forward_features(images, return_intermediates=True)
    assert x.shape == (4, 65, 192) and found["tokens"][-1].shape == x.shape
    torch.testing.assert_close(model.forward_features(images), x[:, :1], atol=1e-5, rtol=1e-5)
    assert len(found["attention"]) == len(found["tokens"]) == len(model.blocks)
    for attention in found["attention"]:
        assert attention.shape == (4, VIT_RECIPE["heads"], 65, 65)
        torch.testing.assert_close(attention.sum(-1), torch.ones(4, VIT_RECIPE["heads"], 65))
    score = model.forward_head(x)[:, 0].sum()
    gradients = torch.autograd.grad(score, [*found["attention"], *found["tokens"]])
    assert all(g.abs().sum() > 0 for g in gradients)


@pytest.fixture
def attention_and_tokens():
    torch.manual_seed(0)
    attention, tokens = Attention(48, 4), torch.randn(2, 17, 48)
    nn.init.normal_(attention.qkv.weight, std=0.3)  # far from uniform attention
    return attention, tokens


def test_both_paths_of_attention_agree(attention_and_tokens):
    attention, tokens = attention_and_tokens
    written_out, matrix = attention(tokens, return_attention=True)
    assert matrix.max() > 0.5
    torch.testing.assert_close(written_out, attention(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [17, 145])
def test_attention_in_bfloat16_agrees_with_float32(tokens):
    """Few tokens: two products. Many: the fused kernel. Both with their gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, tokens, 48)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        attention = Attention(48, 4)
        nn.init.normal_(attention.qkv.weight, std=0.15)
        attention.to(dtype)
        out = attention(x.to(dtype))
        out.float().square().sum().backward()
        found.append((out.float(), attention.qkv.weight.grad.float()))
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


def test_attention_equals_multiheadattention(attention_and_tokens):
    ours, tokens = attention_and_tokens
    theirs = nn.MultiheadAttention(48, 4, batch_first=True)
    theirs.in_proj_weight.data = ours.qkv.weight.data
    theirs.in_proj_bias.data = ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.project.state_dict())
    expected, weights = theirs(tokens, tokens, tokens, average_attn_weights=False)
    out, matrix = ours(tokens, return_attention=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matrix, weights, atol=1e-5, rtol=1e-5)


def test_vit_equals_torchvisions_with_copied_weights(images):
    from torchvision.models import VisionTransformer

    ours = recipe_model("vit").eval()
    r = VIT_RECIPE
    theirs = VisionTransformer(
        32, r["patch_size"], r["depth"], r["heads"], r["dim"], int(r["dim"] * r["mlp_ratio"]),
        num_classes=10, norm_layer=nn.LayerNorm,
    ).eval()  # fmt: skip
    theirs.conv_proj.load_state_dict(ours.patchify.state_dict())
    theirs.class_token.data = ours.class_token.data
    theirs.encoder.pos_embedding.data = ours.positions.data
    theirs.encoder.ln.load_state_dict(ours.norm.state_dict())
    theirs.heads.head.load_state_dict(ours.head.state_dict())
    for a, b in zip(ours.blocks, theirs.encoder.layers, strict=True):
        b.ln_1.load_state_dict(a.norm1.state_dict())
        b.ln_2.load_state_dict(a.norm2.state_dict())
        b.self_attention.in_proj_weight.data = a.attention.qkv.weight.data
        b.self_attention.in_proj_bias.data = a.attention.qkv.bias.data
        b.self_attention.out_proj.load_state_dict(a.attention.project.state_dict())
        b.mlp[0].load_state_dict(a.mlp[0].state_dict())
        b.mlp[3].load_state_dict(a.mlp[2].state_dict())
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-4, rtol=1e-4)


def test_patch_dropout_leaves_out_other_patches_of_each_image_in_training_only(images):
    torch.manual_seed(0)
    vit = ViT(dim=16, depth=2, heads=2, patch_dropout=0.25)
    features, found = vit.train().forward_features(images, return_intermediates=True)
    assert features.shape == (4, 1 + 48, 16) and found["attention"][0].shape == (4, 2, 49, 49)
    torch.manual_seed(5)
    kept = torch.rand(4, 64).argsort(dim=1)[:, :48]
    torch.manual_seed(5)
    torch.testing.assert_close(
        vit(images), vit.forward_head(vit.forward_features(images, keep=kept))
    )
    assert len({tuple(sorted(row)) for row in kept.tolist()}) == 4
    assert vit.eval().forward_features(images, return_intermediates=True)[0].shape == (4, 65, 16)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ViT(patch_size=5), "does not divide an image of 32"),
        (lambda: ViT(patch_size=64), "does not divide an image of 32"),
        (lambda: ViT(dim=100, heads=3), "heads 3 does not divide dim 100"),
        (lambda: ViT(depth=0), "at least 1"),
        (lambda: CNN(widths=(8, 8), depths=(1,)), "give one each per stage"),
        (lambda: CNN(widths=(0, 8), depths=(1, 1)), "at least 1"),
        (lambda: CNN(widths=(8,) * 5, depths=(0,) * 5), "widths: 5 stages"),
        (lambda: ViT(mlp_ratio=0.001), "at least 1"),
        (lambda: ViT(dim=30), "multiple of 4"),
        (lambda: build_model("rnn", {}), "unknown model 'rnn'"),
    ],
)
def test_impossible_combinations_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_vit_refuses_as_many_patches_of_another_shape():
    vit = ViT(dim=16, depth=1, heads=2, patch_size=4)
    with pytest.raises(ValueError, match="takes 8×8 patches, not 4×16"):
        vit(torch.zeros(1, 3, 16, 64))
