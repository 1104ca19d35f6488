import numpy as np
import pytest
import torch
import torch.nn.functional as F

import attribution
from attribution import METHODS, attribute, forward_pass
from models import CNN, ViT

MAP_METHODS = ["grad-cam", "layer-cam", "occlusion", "input-x-gradient"]
TARGETS = torch.tensor([0, 3, 9, 1, 1, 7])


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    model = CNN(stem=8, widths=(16, 24), depths=(1, 1))
    for module in model.modules():  # statistics other than 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return ViT(dim=24, depth=3, heads=3).eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- other implementations


@pytest.mark.parametrize("layer", [0, 1])
def test_captums_grad_cam(cnn, images, layer):
    attr = pytest.importorskip("captum.attr")
    theirs = attr.LayerGradCam(cnn, cnn.stages[layer]).attribute(
        images, target=TARGETS, relu_attributions=True
    )
    ours = attribute(cnn, images, TARGETS, layer=layer).relu()
    assert ours.max() > 1e-5
    torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-5, atol=1e-7 * ours.max().item())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("method", "theirs"), [("grad-cam", "GradCAM"), ("layer-cam", "LayerCAM")])
def test_pytorch_grad_cams(cnn, images, method, theirs, layer):
    cam = pytest.importorskip("pytorch_grad_cam")
    targets = [cam.utils.model_targets.ClassifierOutputTarget(t.item()) for t in TARGETS]
    expected = getattr(cam, theirs)(cnn, [cnn.stages[layer]])(images, targets)
    ours, compared = attribute(cnn, images, TARGETS, method, layer=layer).relu(), 0
    for heat, map_ in zip(ours, expected, strict=True):
        if heat.max() > 0:
            compared += 1
            small = (heat - heat.min()) / (heat.max() - heat.min())
            big = F.interpolate(small[None, None], 32, mode="bilinear")[0, 0]
            big = (big - big.min()) / (big.max() - big.min())
            np.testing.assert_allclose(big, map_, atol=1e-4)
    assert compared >= 3


@pytest.mark.parametrize(("method", "theirs"), [("grad-cam", "GradCAM"), ("layer-cam", "LayerCAM")])
def test_torchcams(cnn, images, method, theirs):
    methods = pytest.importorskip("torchcam.methods")
    with getattr(methods, theirs)(cnn, target_layer=cnn.stages[0]) as extractor:
        (expected,) = extractor(TARGETS.tolist(), cnn(images), normalized=False)
    ours = attribute(cnn, images, TARGETS, method, layer=0).relu()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_captums_occlusion_and_input_x_gradient(cnn, vit, images):
    attr = pytest.importorskip("captum.attr")
    for model in (cnn, vit):
        theirs = attr.InputXGradient(model).attribute(images.clone(), target=TARGETS).sum(1)
        ours = attribute(model, images, TARGETS, "input-x-gradient")
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        shape = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)}
        theirs = attr.Occlusion(model).attribute(images, target=TARGETS, **shape)[:, 0, ::4, ::4]
        ours = attribute(model, images, TARGETS, "occlusion")
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_vit_grad_cam_has_the_gradients_that_captum_finds(vit, images):
    attr = pytest.importorskip("captum.attr")
    raw = attr.LayerGradientXActivation(vit, vit.blocks[-1].norm1).attribute(images, target=TARGETS)
    tokens = forward_pass(vit, images).layers["tokens"][-1].detach()
    gradient, A = attribution.token_map(raw / tokens), attribution.token_map(tokens)
    expected = (gradient.mean((2, 3), keepdim=True) * A).sum(1)
    ours = attribute(vit, images, TARGETS)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)
    expected = (gradient.relu() * A).sum(1)
    torch.testing.assert_close(
        attribute(vit, images, TARGETS, "layer-cam"), expected, rtol=1e-3, atol=1e-6
    )


# ---------------------------------------------------------------- closed forms


def test_grad_cam_equals_the_closed_form_class_map(cnn, images):
    """A map, its average, a linear layer: dz_c/dA is W_c / (h w), so the sum is W_c . A / (h w)."""
    A = cnn.forward_features(images)
    closed = torch.einsum("ck,bkhw->bchw", cnn.head.weight, A) / 64
    run = forward_pass(cnn, images)
    ours = attribute(cnn, images, TARGETS)
    torch.testing.assert_close(ours, closed[torch.arange(6), TARGETS], rtol=1e-5, atol=1e-7)
    # Completeness: the cells of a map add up to the logit without its bias.
    torch.testing.assert_close(closed.sum((2, 3)) + cnn.head.bias, run.logits, rtol=1e-5, atol=1e-5)


def test_the_difference_of_two_classes(cnn, vit, images):
    others = (TARGETS + 1) % 10
    for model in (cnn, vit):
        a, b = (attribute(model, images, classes) for classes in (TARGETS, others))
        ours = attribute(model, images, TARGETS, versus=others)
        torch.testing.assert_close(ours, a - b, rtol=1e-4, atol=1e-6)


def test_relevance_of_each_image_alone_by_equations_5_and_6(vit, images):
    ours = attribute(vit, images, TARGETS, "relevance")
    assert (ours >= 0).all() and ours.max() > 0
    for i in range(2):
        features, found = vit.forward_features(images[i : i + 1], return_intermediates=True)
        score = vit.forward_head(features)[0, TARGETS[i]]
        R = np.eye(65)
        for A in found["attention"]:
            (gradient,) = torch.autograd.grad(score, A, retain_graph=True)
            mean = (gradient * A)[0].clamp(min=0).mean(0).detach().double().numpy()
            R = R + mean @ R
        np.testing.assert_allclose(ours[i].flatten(), R[0, 1:], rtol=1e-4, atol=1e-9)


def test_last_blocks_output_would_give_the_vit_no_gradient(vit, images):
    """The trap that `tokens` avoids: after the last attention patches no longer matter."""
    x, found = vit.forward_features(images, return_intermediates=True)
    score = vit.forward_head(x).gather(1, TARGETS[:, None]).sum()
    after, before = torch.autograd.grad(score, [x, found["tokens"][-1]])
    assert (after[:, 1:] == 0).all() and (before[:, 1:] != 0).any()


def random_attention(L, N=17):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, N, N, generator=generator).softmax(-1) for _ in range(L)]


def test_rollout_rows_sum_to_one_and_equal_numpys_product():
    attentions = random_attention(4)
    R = attribution.rollout(attentions)
    torch.testing.assert_close(R.sum(-1), torch.ones(2, 17), rtol=1e-5, atol=1e-5)
    for b in range(2):
        expected = np.linalg.multi_dot(
            [(a[b].double().mean(0).numpy() + np.eye(17)) / 2 for a in reversed(attentions)]
        )
        np.testing.assert_allclose(R[b], expected, atol=1e-6)


def test_attention_maps_are_the_class_tokens_rows_in_times_uniform(vit, images):
    _, found = vit.forward_features(images, return_intermediates=True)
    for layer in (0, 2):
        ours = attribute(vit, images, TARGETS, "attention", layer=layer)
        expected = 65 * found["attention"][layer][:, :, 0, 1:].mean(1)
        for y, x in ((0, 0), (0, 7), (5, 2)):
            torch.testing.assert_close(ours[:, y, x], expected[:, 8 * y + x])
    rolled, whole = (
        attribute(vit, images, TARGETS, "rollout"),
        attribution.rollout(found["attention"]),
    )
    for y, x in ((0, 0), (0, 7), (5, 2)):
        unit = 65 / (1 - 0.5 ** len(found["attention"]))
        torch.testing.assert_close(rolled[:, y, x], unit * whole[:, 0, 1 + 8 * y + x])
    uniform = torch.full((1, 1, 65, 65), 1 / 65)
    assert (attribution.class_token_maps(uniform) - 1).abs().max() < 1e-6
    for layers in (1, 2, 6):
        forward = attribution.ForwardPass(None, None, None, {"attention": [uniform] * layers})
        assert (attribution.attention_rollout(forward) - 1).abs().max() < 1e-5


def test_distance_and_entropy_of_known_attention():
    uniform, identity = torch.full((1, 2, 65, 65), 1 / 65), torch.eye(65).expand(1, 2, 65, 65)
    run = attribution.ForwardPass(
        None, torch.zeros(1, 3, 32, 32), None, {"attention": [uniform, identity]}
    )
    distance, entropy = attribution.attention_statistics(run)
    torch.testing.assert_close(distance[0, :, 0], torch.tensor([16.55, 0.0]), rtol=0, atol=0.01)
    torch.testing.assert_close(entropy[0, :, 1], torch.tensor([65.0, 1.0]).log(), rtol=0, atol=1e-5)


def test_position_similarity_is_the_cosine():
    positions = torch.randn(1, 17, 8)
    found = attribution.position_similarity(positions)
    expected = F.cosine_similarity(positions[0, 1 + 4 * 2 + 3], positions[0, 1 + 4 * 0 + 1], dim=0)
    torch.testing.assert_close(found[2, 3, 0, 1], expected)


def test_rank_correlation_equals_scipys():
    from scipy.stats import spearmanr

    a, b = torch.randn(3, 4, 4), torch.randint(4, (3, 4, 4)).float()  # b has ties
    found = attribution.rank_correlation(a, b)
    for i in range(3):
        expected = spearmanr(a[i].flatten(), b[i].flatten()).statistic
        assert found[i] == pytest.approx(expected, abs=1e-12)
    assert np.isnan(attribution.rank_correlation(torch.ones(1, 2, 2), torch.rand(1, 2, 2))[0])


# ---------------------------------------------------------------- every method


def test_methods_of_each_network(cnn, vit):
    default, reasons = attribution.methods_for(cnn, 32)
    assert (
        default == ["grad-cam"] and [name for name in METHODS if name not in reasons] == MAP_METHODS
    )
    assert attribution.methods_for(vit, 32) == (["attention", "relevance"], {})
    assert attribution.methods_for(torch.nn.Sequential(cnn), 32)[0] == ["occlusion"]
    assert attribution.methods_for(cnn, 32, layer=2)[1]["grad-cam"] == "has 2 layers"
    small = CNN(stem=2, widths=(2,) * 4, depths=(0,) * 4, image_size=32).eval()
    assert attribution.methods_for(small, 32)[0] == ["grad-cam"]
    default, reasons = attribution.methods_for(small, 16)
    assert default == ["occlusion"] and "one cell" in reasons["layer-cam"]
    assert attribution.methods_for(small, 16, layer=2)[0] == ["grad-cam"]


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_single_images_and_nothing_is_changed(cnn, vit, images, method, monkeypatch):
    monkeypatch.setattr(attribution, "GRID", 2)  # occlusion takes 64 forward passes at 8
    for model in (cnn, vit) if method in MAP_METHODS else (vit,):
        expected = attribute(model, images, TARGETS, method)
        assert not expected.requires_grad and (expected.flatten(1).std(1) > 0).all()
        order = torch.tensor([3, 1, 0, 5, 4, 2])
        shuffled = attribute(model, images[order], TARGETS[order], method)
        torch.testing.assert_close(shuffled, expected[order], rtol=1e-4, atol=1e-5)
        one = attribute(model, images[2:3], TARGETS[2:3], method)
        torch.testing.assert_close(one[0], expected[2], rtol=1e-4, atol=1e-5)

        # In train mode, frozen in part, without gradients: the same map, and nothing else changes.
        model.train()
        model.head.eval().requires_grad_(False)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        frozen = [p.requires_grad for p in model.parameters()]
        random = torch.get_rng_state()
        for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with mode:
                maps = attribute(model, images.clone(), TARGETS, method)
            torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
        assert modes == [module.training for module in model.modules()]
        assert frozen == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state()) and images.grad is None


def test_a_wrapped_network_gives_the_same_maps(cnn, images):
    expected = attribute(cnn, images, TARGETS)
    wrapped = torch.nn.DataParallel(cnn)
    assert torch.equal(
        attribute(torch.compile(wrapped, backend="eager"), images, TARGETS), expected
    )


@pytest.fixture
def seeing_cnn():
    """A toy CNN that sees nothing but brightness, whatever the class."""
    model = CNN(stem=1, widths=(1, 1), depths=(0, 0)).eval()
    with torch.no_grad():
        for p in (model.stem.weight, model.stages[0].conv.weight, model.stages[1].conv.weight):
            p.zero_()[:, :, 1, 1] = 1
        model.head.weight.fill_(1)
    return model


@pytest.fixture
def seeing_vit():
    """A toy ViT whose class token attends to the one bright patch and copies its brightness."""
    model = ViT(dim=4, depth=1, heads=1, mlp_ratio=1).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for module in (model.blocks[0].norm1, model.norm):
            module.weight.fill_(1)
        model.patchify.weight[0].fill_(1 / 48)  # dimension 0 is brightness
        model.class_token[0, 0, 1] = 3
        attention = model.blocks[0].attention
        attention.qkv.weight[0, 1] = 2  # the query of what has dimension 1: the class token
        attention.qkv.weight[4, 0] = 2  # the key of brightness
        attention.qkv.weight[8, 0] = 1  # its value
        attention.project.weight[0, 0] = 1
        model.head.weight[:, 0] = 1
    return model


@pytest.mark.parametrize("method", METHODS)
def test_planted_evidence_is_found(seeing_cnn, seeing_vit, method):
    """Only one patch matters: the highest value of every method is there, also when mirrored."""
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 20:24, 4:8] = 1
    images = torch.cat([images, images.flip(3)])
    for model in (seeing_cnn, seeing_vit) if method in MAP_METHODS else (seeing_vit,):
        maps = attribute(model, images, torch.tensor([0, 0]), method)
        for heat, place in zip(attribution.on_grid(maps), ((5, 1), (5, 6)), strict=True):
            assert divmod(heat.argmax().item(), 8) == place, model


def test_no_memory_is_kept(cnn, images):
    """No hooks, no graph: after a call no tensor is left."""
    import gc

    def tensors():
        gc.collect()
        return sum(torch.is_tensor(o) for o in gc.get_objects())

    attribute(cnn, images, TARGETS)
    before = tensors()
    for _ in range(3):
        attribute(cnn, images, TARGETS)
    assert tensors() == before
    assert not any(m._forward_hooks or m._backward_hooks for m in cnn.modules())


class Aside(torch.nn.Module):
    """A network with intermediates that its logits do not depend on, or with none."""

    def __init__(self, found):
        super().__init__()
        self.head, self.found = torch.nn.Linear(3, 2), found

    def forward_features(self, x, return_intermediates=False):
        features = x.mean((2, 3))
        return (features, self.found) if return_intermediates else features

    def forward_head(self, x):
        return self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.mark.parametrize("found", [{}, {"attention": [torch.full((1, 2, 5, 5), 0.2)]}])
def test_a_network_that_offers_nothing_that_can_be_used(found):
    default, reasons = attribution.methods_for(Aside(found), 32)
    assert default == (["attention"] if found else ["occlusion"])
    assert ("do not depend" in reasons["relevance"]) == bool(found)
