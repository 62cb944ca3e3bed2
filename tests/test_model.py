"""The model, where its weights come from, and the file they are kept in."""

import json
import urllib.error
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model

import utils.model
from utils.model import (
    HEADS,
    OLDEST,
    AgeRegressor,
    add_facts,
    build_model,
    load_weights,
    save_weights,
)
from utils.settings import get_settings

SETTINGS = replace(
    get_settings("sample"), backbone="mobilenet_v3_small", image_size=64, head="regression"
)
FAMILIES = (
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "densenet121",
    "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_x_400mf", "convnext_tiny", "googlenet",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_puts_out_ages(name, head, images, tmp_path, monkeypatch):
    """Head found, classifier of 1,000 classes dropped, everything else loaded, file readable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        options = {"aux_logits": True, "init_weights": True} if name == "googlenet" else {}
        state = get_model(name, weights=None, num_classes=1000, **options).state_dict()
    if name == "densenet121":  # as torchvision's published file spells it
        state = {key.replace(".norm1.", ".norm.1."): value for key, value in state.items()}
    torch.save(state, tmp_path / "weights.pth")
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "weights.pth"))
    settings = replace(SETTINGS, backbone=name, pretrained=True, head=head)
    if (name, head) == ("squeezenet1_1", "ordinal"):
        with pytest.raises(ValueError, match="linear layer"):
            build_model(settings)
        return
    model = build_model(settings, age_mean=40, age_scale=10).eval()
    key = next(key for key, value in state.items() if value.ndim == 4)
    assert torch.equal(model.backbone.state_dict()[key.replace(".norm.1.", ".norm1.")], state[key])
    ages = model(images)
    assert ages.shape == (3,) and ages.dtype == torch.float32
    assert ((ages - 40).abs() < 15).all(), "untrained, the answer is near the mean age"
    save_weights(model, tmp_path / "model.safetensors")
    assert torch.equal(load_weights(tmp_path / "model.safetensors")[0](images), ages)


def test_normalisation_is_inside(images):
    model = build_model(SETTINGS).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(2, 3, 64, 64))
    assert seen[0].abs().max() < 1e-6
    model(torch.ones(1, 3, 64, 64))
    assert torch.allclose(seen[1][0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.6400]), atol=1e-4)
    with pytest.raises(TypeError, match="floats in 0-1"):
        model((images * 255).to(torch.uint8))


def test_output_is_in_years(images):
    model = AgeRegressor("mobilenet_v3_small", 64, age_mean=30, age_scale=5).eval()
    raw = model.backbone((images - model.mean) / model.std)
    assert torch.allclose(model(images), 30 + 5 * raw[:, 0])


def test_a_distribution_becomes_its_mean():
    model = AgeRegressor("resnet18", 64, age_mean=30, age_scale=5, head="distribution")
    outputs = torch.full((2, OLDEST + 1), -50.0)
    outputs[0, [20, 30]] = 0.0
    outputs[1, OLDEST] = 0.0
    assert torch.allclose(model.ages(outputs), torch.tensor([25.0, float(OLDEST)]), atol=1e-3)
    start = model.eval().outputs(torch.zeros(1, 3, 64, 64)).softmax(1)[0]
    mean = start @ model.years
    spread = (start @ (model.years - mean) ** 2).sqrt()
    assert mean.item() == pytest.approx(30, abs=1) and spread.item() == pytest.approx(5, abs=0.5)


def test_ages_and_spreads_of_every_head():
    """From outputs that say: surely between 20 and 40, half and half."""
    outputs = {
        "distribution": torch.full((1, OLDEST + 1), -50.0),
        "groups": torch.full((1, 8), -50.0),
        "ordinal": torch.full((1, OLDEST), -50.0),
    }
    outputs["distribution"][0, [20, 40]] = 0.0
    outputs["groups"][0, [1, 4]] = 0.0  # centres 15 and 45
    outputs["ordinal"][0, :20], outputs["ordinal"][0, 20:40] = 50.0, 0.0
    wanted = {"distribution": (30, 10), "groups": (30, 15), "ordinal": (30, 10)}
    for head, (age, spread) in wanted.items():
        model = AgeRegressor("resnet18", 64, head=head)
        answer = model.ages_and_spreads(outputs[head])[0].tolist()
        assert answer == pytest.approx([age, spread], abs=1e-3), head
        assert model.ages(outputs[head]).item() == pytest.approx(age, abs=1e-3)
    answer = AgeRegressor("resnet18", 64).ages_and_spreads(torch.zeros(2, 1))
    assert answer.shape == (2, 2) and answer[:, 1].isnan().all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_views_start_from_the_weights_and_keep_apart_what_they_see(name, tmp_path, monkeypatch):
    state = get_model(name, weights=None).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "weights.pth"))
    images = torch.rand(2, 3, 96, 96)
    border = images.clone()
    border[:, :, :8] = 0  # outside of the tight view
    for views, sees_border in (("face", False), ("face+chip", True)):
        settings = replace(SETTINGS, backbone=f"{name}:{views}", image_size=96, pretrained=True)
        model = build_model(settings).eval()
        first = next(value for value in state.values() if value.ndim == 4)
        assert torch.equal(next(model.backbone.features.parameters()), first)
        with torch.inference_mode():  # with statistics of the batch: untrained ones let little by
            moved = (model.train()(images) - model(border)).abs().max().item()
        assert (moved > 1e-4) == sees_border
        model.eval()
        save_weights(model, tmp_path / "model.safetensors")
        again = load_weights(tmp_path / "model.safetensors")[0]
        assert torch.allclose(again(images), model(images))
    model(images).sum().backward()
    assert all(p.grad is not None for p in model.backbone.attend.parameters())
    for wrong in (f"{name}:body", "densenet121:face"):
        with pytest.raises(ValueError, match="views"):
            build_model(replace(SETTINGS, backbone=wrong))


def test_facts_are_added_to_a_file_and_its_weights_stay(tmp_path, images):
    model = build_model(SETTINGS).eval()
    save_weights(model, tmp_path / "model.safetensors", epochs=3)
    add_facts(tmp_path / "model.safetensors", intervals={"level": 0.9})
    again, facts = load_weights(tmp_path / "model.safetensors")
    assert facts["epochs"] == 3 and facts["intervals"] == {"level": 0.9}
    assert torch.equal(again(images), model(images))


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


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="resnet1.*not a torchvision classifier.*resnet18"):
        build_model(replace(SETTINGS, backbone="resnet1"))
    with pytest.raises(ValueError, match="not a torchvision classifier"):
        build_model(replace(SETTINGS, backbone="fcn_resnet50"))
    with pytest.raises(ValueError, match="vit_b_16 cannot be built for 100 px"):
        build_model(replace(SETTINGS, backbone="vit_b_16", image_size=100))
    with pytest.raises(ValueError, match="alexnet cannot take images of 32 px"):
        build_model(replace(SETTINGS, backbone="alexnet", image_size=32))
    with pytest.raises(ValueError, match="head 'dex'.*regression"):
        AgeRegressor("resnet18", 64, head="dex")


@pytest.mark.fault("a checkpoint of another model", "refused; names the tensors that differ")
def test_weights_file_good_wrong_and_damaged(tmp_path, monkeypatch):
    pretrained = replace(SETTINGS, pretrained=True)
    state = get_model("mobilenet_v3_small", weights=None).state_dict()

    def give(name, write):
        write(tmp_path / name)
        monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / name))

    give("good.safetensors", lambda path: save_file(state, path))
    model = build_model(pretrained)
    key = "features.0.0.weight"
    assert torch.equal(model.backbone.state_dict()[key], state[key])
    assert model.origin == "file good.safetensors"
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.training
    # So does a file of this course, with its head and its normalisation.
    trained = AgeRegressor("mobilenet_v3_small", 48, (0.1,) * 3, (0.2,) * 3, 41.0, 17.0)
    give("trained.safetensors", lambda path: save_weights(trained, path))
    model = build_model(pretrained)
    ours, theirs = model.state_dict(), trained.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other_head = build_model(replace(pretrained, head="distribution"))
    assert torch.equal(other_head.backbone.state_dict()[key], theirs[f"backbone.{key}"])
    assert other_head.mean.flatten().tolist() == pytest.approx([0.1] * 3)
    with pytest.raises(ValueError, match=r"trained\.safetensors\) are not those of a resnet18"):
        build_model(replace(pretrained, backbone="resnet18"))
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "good.safetensors"))

    # A run that does not ask for pretrained weights does not read the file.
    assert build_model(SETTINGS).origin == "random"

    monkeypatch.setenv("AGE_BACKBONE_MEAN_STD", "0.5, 0.25")
    model = build_model(pretrained)
    assert model.mean.flatten().tolist() == [0.5] * 3 and model.std.flatten().tolist() == [0.25] * 3
    for text in ("0.5", "0.5,0", "a,b"):
        monkeypatch.setenv("AGE_BACKBONE_MEAN_STD", text)
        with pytest.raises(ValueError, match="AGE_BACKBONE_MEAN_STD is .*mean,std"):
            build_model(pretrained)
    monkeypatch.delenv("AGE_BACKBONE_MEAN_STD")

    other = get_model("shufflenet_v2_x0_5", weights=None).state_dict()
    give("other.pth", lambda path: torch.save(other, path))
    with pytest.raises(ValueError, match=r"other\.pth.*mobilenet_v3_small.*features.0.0.weight is"):
        build_model(pretrained)
    give("fewer.pth", lambda path: torch.save({k: v for k, v in state.items() if k != key}, path))
    with pytest.raises(ValueError, match=r"fewer\.pth.*1 tensors.*features.0.0.weight is missing"):
        build_model(pretrained)
    give("shape.pth", lambda path: torch.save(state | {key: state[key][:, :1]}, path))
    with pytest.raises(ValueError, match=r"1 tensors.*\[16, 1, 3, 3\] instead of \[16, 3, 3, 3\]"):
        build_model(pretrained)
    for name in ("cut.pth", "cut.safetensors"):
        whole = tmp_path / f"good{(tmp_path / name).suffix}"
        if not whole.exists():
            torch.save(state, whole)
        give(name, lambda path, whole=whole: path.write_bytes(whole.read_bytes()[:-1000]))
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            build_model(pretrained)
    give("page.pth", lambda path: path.write_text("<html>not found</html>"))
    with pytest.raises(ValueError, match=r"page\.pth cannot be read"):
        build_model(pretrained)
    give("wrapped.pth", lambda path: torch.save({"model": state, "epoch": 3}, path))
    with pytest.raises(ValueError, match=r"wrapped\.pth is not a plain state dict"):
        build_model(pretrained)
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_model(pretrained)


@pytest.mark.fault("no network")
def test_torchvision_weights_and_the_way_out_offline(monkeypatch):
    real, full = get_model, get_model("mobilenet_v3_small", weights=None)

    def download(name, weights=None, **options):
        return full if weights is not None else real(name, weights=None, num_classes=1)

    monkeypatch.setattr(utils.model, "get_model", download)
    model = build_model(replace(SETTINGS, pretrained=True))
    key = "features.0.0.weight"
    assert torch.equal(model.backbone.state_dict()[key], full.state_dict()[key])
    assert "MobileNet_V3_Small_Weights.IMAGENET1K_V1" in model.origin

    def offline(name, weights=None, **options):
        if weights is not None:
            raise urllib.error.URLError("no route")
        return real(name, weights=None, num_classes=1)

    monkeypatch.setattr(utils.model, "get_model", offline)
    with pytest.warns(UserWarning, match="no route.*random weights.*AGE_BACKBONE_WEIGHTS"):
        model = build_model(replace(SETTINGS, pretrained=True))
    assert model.origin == "random"


def test_saved_file_is_exact_and_tells_all(tmp_path, images):
    path = tmp_path / "model.safetensors"
    model = AgeRegressor("mobilenet_v3_small", 64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 41.3, 17.7)
    with torch.no_grad():
        model.train()(images)  # moves the batch-norm buffers
    model = model.to(memory_format=torch.channels_last).eval()
    save_weights(model, path, split_digest="abc", training={"epochs": 3})
    torch.manual_seed(5)
    loaded, metadata = load_weights(path)
    assert not loaded.training
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(loaded(images), model.to(memory_format=torch.contiguous_format)(images))
    wanted = dict(backbone="mobilenet_v3_small", head="regression", image_size=64, version=1)
    wanted |= dict(split_digest="abc", training={"epochs": 3})
    assert wanted.items() <= metadata.items()
    assert metadata["mean"] == pytest.approx([0.1, 0.2, 0.3])
    assert metadata["std"] == pytest.approx([0.4, 0.5, 0.6])
    assert metadata["age_mean"] == pytest.approx(41.3)
    assert metadata["libraries"]["torch"] == torch.__version__.split("+")[0]
    assert "eyes" in metadata["crop"]
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.fault("disk full while training")
def test_a_failed_save_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(build_model(SETTINGS), path, note="first")

    def broken(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(utils.model.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save_weights(build_model(SETTINGS), path, note="second")
    assert load_weights(path)[1]["note"] == "first"


@pytest.mark.parametrize("start", [b"\x80", b"PK"])
def test_a_file_that_only_begins_like_a_pickle(start, tmp_path):
    """The first bytes of a safetensors file are the length of its header: any value may come."""
    path, model, note = tmp_path / "model.safetensors", build_model(SETTINGS), ""
    save_weights(model, path, note=note)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    modulus = 256 ** len(start)
    note = "x" * ((int.from_bytes(start, "little") - size) % modulus)
    save_weights(model, path, note=note)
    assert path.read_bytes().startswith(start)
    assert load_weights(path)[1]["note"] == note


@pytest.mark.fault("a checkpoint truncated, or a pickle")
def test_refused_files(tmp_path):
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    model = build_model(SETTINGS)
    save_weights(model, good)
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors is not there"):
        load_weights(tmp_path / "nowhere.safetensors")
    for old in (True, False):
        torch.save(model.state_dict(), bad, _use_new_zipfile_serialization=old)
        with pytest.raises(ValueError, match="bad.safetensors is a pickle"):
            load_weights(bad)
    whole = good.read_bytes()
    for part in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", b"version https://git-lfs"):
        bad.write_bytes(part)
        with pytest.raises(ValueError, match="bad.safetensors is damaged"):
            load_weights(bad)
    for metadata in (None, {"format": json.dumps("pt")}, {"format": "pt"}):
        save_file({"weight": torch.zeros(2)}, bad, metadata)
        with pytest.raises(ValueError, match="bad.safetensors is a .* not an age model"):
            load_weights(bad)
    save_weights(model, bad, version=2)
    with pytest.raises(ValueError, match="bad.safetensors has format version 2.*update"):
        load_weights(bad)
    save_weights(model, bad, backbone="resnet18")
    with pytest.raises(ValueError, match="bad.safetensors does not fit a resnet18"):
        load_weights(bad)
