"""The model, where its first weights come from, and the file they are kept in."""

import json
import os
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import get_model, get_model_weights

import utils.model
from utils.model import (
    FACE_NORM,
    LOSSES,
    OLDEST,
    STRIDES,
    WIDTHS,
    AgeRegressor,
    FaceMobileNet,
    build_model,
    load_weights,
    save_weights,
)
from utils.settings import get_settings

SETTINGS = replace(get_settings("sample"), backbone="mobilenet_v3_small", image_size=64)
PRETRAINED = replace(SETTINGS, pretrained=True)
FACE = replace(PRETRAINED, backbone="face_mobilenet")
GIVEN = os.environ.get("AGE_FACE_WEIGHTS")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain_state() -> dict:
    return get_model("mobilenet_v3_small", weights=None).state_dict()


@pytest.mark.parametrize("head", LOSSES)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "convnext_tiny"])
def test_networks_of_torchvision(name, head, images, tmp_path, monkeypatch):
    """The classifier of 1,000 classes is dropped, everything else loaded, the file readable."""
    state = get_model(name, weights=None, num_classes=1000).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "weights.pth"))
    settings = replace(PRETRAINED, backbone=name, head=head)
    model = build_model(settings, age_mean=40, age_scale=10).eval()
    key = next(key for key, value in state.items() if value.ndim == 4)
    assert torch.equal(model.backbone.state_dict()[key], state[key])
    ages = model(images)
    assert ages.shape == (3,) and ((ages - 40).abs() < 15).all(), "first answers are near the mean"
    save_weights(model, tmp_path / "model.safetensors")
    again = load_weights(tmp_path / "model.safetensors")[0](images)
    assert torch.allclose(again, ages, atol=0.02), "rounded to float16"


def reference_outputs(stored: dict, images: torch.Tensor) -> torch.Tensor:
    """Logits of the ages 1 to 100 by the start's own layout: biases, no batch normalisation."""
    conv, pad = torch.nn.functional.conv2d, torch.nn.functional.pad
    means = torch.tensor([123.68, 116.779, 103.939]).view(1, 3, 1, 1)
    x = conv(pad(images * 255 - means, (0, 1, 0, 1)), stored["stem.weight"], stored["stem.bias"], 2)
    for i, stride in enumerate(STRIDES, 1):
        weight, bias = (stored[f"block{i}.depthwise.{kind}"] for kind in ("weight", "bias"))
        x = pad(x.clamp(0, 6), (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
        x = conv(x, weight, bias, stride, groups=len(weight)).clamp(0, 6)
        x = conv(x, *(stored[f"block{i}.pointwise.{kind}"] for kind in ("weight", "bias")))
    feature = x.clamp(0, 6).mean((2, 3)) @ stored["feature.weight"].T + stored["feature.bias"]
    return feature.relu() @ stored["age.weight"].T + stored["age.bias"]


def made_up_start(folder: Path) -> tuple[Path, dict]:
    """A TensorFlow.js pair of random numbers, and the same in PyTorch's layout."""
    rng, stored, listed, data = np.random.default_rng(0), {}, [], []

    def add(name, *shape, scale=1.0):
        values = (scale * rng.standard_normal(shape)).astype("<f4")
        listed.append({"name": name, "shape": list(shape), "dtype": "float32"})
        data.append(values.tobytes())
        return torch.from_numpy(values)

    stored["age.weight"] = add("age_pred/kernel", 256, 100, scale=0.1).T
    stored["age.bias"] = add("age_pred/bias", 100)
    stored["feature.weight"] = add("feats/kernel", 1024, 256, scale=0.05).T
    stored["feature.bias"] = add("feats/bias", 256)
    first = add("conv1/convolution/merged_input", 3, 3, 3, 32, scale=0.01)
    stored["stem.weight"] = first.permute(3, 2, 0, 1).flip(1)
    stored["stem.bias"] = add("conv1_bn/batchnorm_1/sub", 32)
    width = 32
    for i, wide in enumerate(WIDTHS, 1):
        kernel = add(f"conv_dw_{i}/depthwise_kernel", 3, 3, width, 1, scale=0.5)
        scale = add(f"conv_dw_{i}_bn/batchnorm_1/mul", width)
        stored[f"block{i}.depthwise.weight"] = kernel.permute(2, 3, 0, 1) * scale.view(-1, 1, 1, 1)
        stored[f"block{i}.depthwise.bias"] = add(f"conv_dw_{i}_bn/batchnorm_1/sub", width)
        kernel = add(f"conv_pw_{i}/convolution/merged_input", 1, 1, width, wide, scale=0.1)
        stored[f"block{i}.pointwise.weight"] = kernel.permute(3, 2, 0, 1)
        stored[f"block{i}.pointwise.bias"] = add(f"conv_pw_{i}_bn/batchnorm_1/sub", wide)
        width = wide
    (folder / "start.bin").write_bytes(b"".join(data))
    (folder / "start.json").write_text(json.dumps({"weightsManifest": [{"weights": listed}]}))
    return folder / "start.bin", stored


@torch.no_grad()
def check_start(file: Path, stored: dict, images: torch.Tensor, monkeypatch) -> AgeRegressor:
    monkeypatch.setenv("AGE_FACE_WEIGHTS", str(file))
    examples = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = build_model(replace(FACE, head="distribution"), examples=examples).eval()
    wanted = reference_outputs(stored, images)
    close = 1e-4 * float(wanted.abs().max())
    assert torch.allclose(model.outputs(images)[:, 1:101], wanted, atol=close)
    # Batch normalisation is back: a training step on the faces that set it outputs the same.
    model.backbone.dropout.p, running = 0.0, model.outputs(examples)
    of_batch = model.train().outputs(examples)
    assert torch.allclose(of_batch, running, atol=0.02 * float(running.abs().max()))
    assert not torch.equal(of_batch, running)
    return build_model(FACE, examples=examples).eval()


def test_the_face_start_of_a_made_up_pair(tmp_path, images, monkeypatch):
    file, stored = made_up_start(tmp_path)
    model = check_start(file, stored, images, monkeypatch)
    save_weights(model, tmp_path / "model.safetensors")
    again, facts = load_weights(tmp_path / "model.safetensors")
    assert torch.allclose(again(images), model(images), atol=0.2), "rounded to float16"
    assert facts["backbone"] == "face_mobilenet"
    assert facts["origin"].startswith("face start") and facts["mean"][0] == pytest.approx(0.48502)
    assert sum(p.numel() for p in FaceMobileNet(121).parameters()) == 3_500_473


@pytest.mark.skipif(not GIVEN, reason="AGE_FACE_WEIGHTS names no file of the face start")
def test_the_real_face_start(images, monkeypatch):
    reference = Path(GIVEN).with_name("face_mobilenet.safetensors")
    if not reference.is_file():
        pytest.skip("no copy in PyTorch's layout beside the file in AGE_FACE_WEIGHTS")
    check_start(Path(GIVEN), load_file(reference), images, monkeypatch)


def test_the_face_start_is_fetched_once_or_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("AGE_DATA", str(tmp_path))
    asked = []

    def fetch(url, path, sha256, way_out):
        asked.append(url)
        if len(asked) > 2:
            raise ConnectionError(f"{url} cannot be had{way_out}")
        return path

    monkeypatch.setattr(utils.model, "fetch", fetch)
    monkeypatch.delenv("AGE_FACE_WEIGHTS", raising=False)
    assert utils.model.face_start() == tmp_path / "downloads" / "faceres-deep.bin"
    assert [url.rpartition(".")[2] for url in asked] == ["json", "bin"]
    with pytest.raises(ConnectionError, match=r"deep\.json cannot be had.*AGE_FACE_WEIGHTS"):
        utils.model.face_start()
    monkeypatch.setenv("AGE_FACE_WEIGHTS", "nowhere.bin")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin, and there is no such file"):
        utils.model.face_start()


def test_normalisation_is_inside_and_integers_are_refused(images):
    model = AgeRegressor("mobilenet_v3_small", 64, *FACE_NORM, age_mean=30, age_scale=5).eval()
    wanted = images * 255 - torch.tensor([123.68, 116.779, 103.939]).view(1, 3, 1, 1)
    assert torch.allclose(model.normalised(images), wanted, atol=1e-3)
    assert torch.allclose(model(images), 30 + 5 * model.backbone(model.normalised(images))[:, 0])
    with pytest.raises(TypeError, match="floats in 0-1"):
        model((images * 255).to(torch.uint8))


def test_a_distribution_becomes_its_mean_and_spread():
    model = AgeRegressor("resnet18", 64, age_mean=30, age_scale=5, head="distribution").eval()
    outputs = torch.full((1, OLDEST + 1), -50.0)
    outputs[0, [20, 40]] = 0.0
    assert model.ages_and_spreads(outputs)[0].tolist() == pytest.approx([30, 10], abs=1e-3)
    first = model.outputs(torch.zeros(1, 3, 64, 64))
    assert model.ages_and_spreads(first)[0].tolist() == pytest.approx([30, 5], abs=1)
    plain = AgeRegressor("resnet18", 64)
    assert plain.ages_and_spreads(torch.zeros(2, 1))[:, 1].isnan().all()


def test_losses_by_hand():
    model = AgeRegressor("resnet18", 64, head="distribution")
    years, ages = model.years, torch.tensor([25.0, 70.0])
    bell = -((years - ages[:, None]) ** 2) / 8
    perfect = LOSSES["distribution"](model, bell, ages)
    assert perfect.tolist() == pytest.approx([0, 0], abs=1e-3)
    moved = LOSSES["distribution"](model, bell, ages + 4)
    assert moved[0].item() == pytest.approx(4 + 4**2 / (2 * 2**2), abs=0.01), "MAE + divergence"
    plain = AgeRegressor("resnet18", 64, age_mean=30, age_scale=5)
    assert LOSSES["regression"](plain, torch.tensor([[2.0]]), torch.tensor([33.0])).item() == 7


def test_the_seed_decides_the_first_weights_and_nothing_else():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = build_model(SETTINGS), build_model(SETTINGS)
    other = build_model(replace(SETTINGS, seed=1))
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers were used up"
    key = "backbone.features.0.0.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_weights_of_another_kind(tmp_path, monkeypatch, plain_state):
    def give(name, write):
        write(tmp_path / name)
        monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / name))

    give("plain.safetensors", lambda path: save_file(plain_state, path))
    model = build_model(PRETRAINED)
    assert model.origin == "file plain.safetensors" and model.training
    assert build_model(SETTINGS).origin == "random", "read although not asked for"
    # A file of this course: with its normalisation, and with its head where that is the same.
    trained = AgeRegressor("mobilenet_v3_small", 48, (0.1,) * 3, (0.2,) * 3, head="distribution")
    give("trained.safetensors", lambda path: save_weights(trained, path))
    model = build_model(PRETRAINED)
    last = f"backbone.{model.last_layer}.weight"
    assert torch.equal(model.state_dict()[last], trained.state_dict()[last].half().float())
    assert model.mean.flatten().tolist() == pytest.approx([0.1] * 3)
    other = build_model(replace(PRETRAINED, head="regression"))
    key = "backbone.features.0.0.weight"
    assert torch.equal(other.state_dict()[key], trained.state_dict()[key].half().float())
    for name, write in {
        "fewer.pth": lambda path: torch.save({"a": torch.zeros(1)}, path),
        "cut.pth": lambda path: path.write_bytes(b"PK\x03\x04 cut off"),
        "page.safetensors": lambda path: path.write_text("<html>not found</html>"),
    }.items():
        give(name, write)
        with pytest.raises(ValueError, match=name):
            build_model(PRETRAINED)
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_model(PRETRAINED)


def test_a_file_of_another_backbone_is_left_alone(tmp_path, images, monkeypatch, plain_state):
    """The face MobileNet starts from faces, whatever the torchvision file is good for."""
    torch.save(plain_state, tmp_path / "plain.pth")
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "plain.pth"))
    monkeypatch.setenv("AGE_FACE_WEIGHTS", str(made_up_start(tmp_path)[0]))
    assert build_model(FACE, examples=images).origin.startswith("face start")


def test_torchvision_weights_and_the_way_out_offline(monkeypatch, plain_state):
    weights = type(get_model_weights("mobilenet_v3_small").DEFAULT)
    monkeypatch.setattr(weights, "get_state_dict", lambda *_, **__: plain_state)
    assert "IMAGENET1K_V1" in build_model(PRETRAINED).origin

    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(weights, "get_state_dict", offline)
    with pytest.raises(ConnectionError, match="no route.*AGE_BACKBONE_WEIGHTS.*pretrained=False"):
        build_model(PRETRAINED)


def test_the_file_rounds_to_half_precision_and_tells_all(tmp_path, images):
    path = tmp_path / "model.safetensors"
    model = AgeRegressor("mobilenet_v3_small", 64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 41.5, 17.5)
    with torch.no_grad():
        model.train()(images)  # moves the batch-norm buffers
    save_weights(model.to(memory_format=torch.channels_last), path, training={"epochs": 3})
    save_weights(model, path, **load_weights(path)[1] | {"intervals": {"level": 0.9}})
    loaded, facts = load_weights(path)
    assert not loaded.training
    rounded = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        value = value.half().float() if name in rounded else value
        assert torch.equal(value, loaded.state_dict()[name])
    assert path.stat().st_size < 2.2 * sum(value.numel() for value in model.parameters()) + 1e5
    assert facts["training"] == {"epochs": 3} and facts["intervals"] == {"level": 0.9}
    assert facts["age_mean"] == 41.5 and facts["std"] == pytest.approx([0.4, 0.5, 0.6])
    assert facts["libraries"]["torch"] == torch.__version__.split("+")[0]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_network_of_your_own(tmp_path, images):
    def small():
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        return AgeRegressor(torch.nn.Sequential(*layers, torch.nn.Linear(4, 1)), 64)

    model = small().eval()
    save_weights(model, tmp_path / "model.safetensors")
    again = load_weights(tmp_path / "model.safetensors", small())[0]
    assert torch.allclose(again(images), model(images), atol=0.02), "rounded to float16"


def test_refused_files(tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    model = build_model(SETTINGS)
    save_weights(model, good)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors is not there"):
        load_weights(tmp_path / "nowhere.safetensors")
    torch.save(model.state_dict(), tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match="bad.ckpt is damaged, or no file of weights"):
        load_weights(tmp_path / "bad.ckpt")
    torch.save(model.state_dict(), bad)
    whole = good.read_bytes()
    for part in (bad.read_bytes(), whole[:-1], whole[:5], b"", b"version https://git-lfs"):
        bad.write_bytes(part)
        with pytest.raises(ValueError, match="bad.safetensors is damaged"):
            load_weights(bad)
    for metadata in (None, {"format": json.dumps("pt")}, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, bad, metadata)
        with pytest.raises(ValueError, match="bad.safetensors is no age model"):
            load_weights(bad)
    save_weights(model, bad, version=2)
    with pytest.raises(ValueError, match="in format version 1"):
        load_weights(bad)
    save_weights(model, bad, backbone="resnet18")
    with pytest.raises(ValueError, match="bad.safetensors holds the weights of another network"):
        load_weights(bad)
