import importlib
import importlib.util
import os
import socket
import sys
import types

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from sivae_fast.evaluation import features, fid
from sivae_fast.evaluation.features import (
    WEIGHTS,
    RandomNetwork,
    check_published,
    load_features,
    prepared,
)
from sivae_fast.evaluation.fid import (
    METRICS,
    Moments,
    compare,
    frechet_distance,
    gather,
    kernel_distance,
    moments,
    neighbourhoods,
)

RANDOM = load_features("random")


def images(count, seed, dark=1.0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=generator) * dark
    return (torch.nn.functional.interpolate(small, 16) * 255).to(torch.uint8)


def vectors(count, size, seed, shift=0.0):
    return (
        torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    )


def test_moments_are_those_of_all_rows_however_they_arrive():
    x = vectors(100, 5, 0, shift=1e3)  # far from zero: sums of squares would lose digits
    found = Moments(5)
    for part in (x[:1], x[1:40], x[40:]):
        found.update(part)
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.covariance, torch.from_numpy(np.cov(x.numpy().T)), rtol=1e-9, atol=1e-9)
    for value in ("nan", "inf"):
        with pytest.raises(ValueError, match="not finite"):
            found.update(x.index_fill(1, torch.tensor([3]), float(value)))
    with pytest.raises(ValueError, match="at least 2 images"):
        moments(x[:1]).covariance  # noqa: B018 (the property raises)


def _reduce(rank, world, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    x = vectors(50, 4, 0)
    mine = x[:20] if rank == 0 else x[20:]
    found = moments(mine, block=7)
    torch.save((found.count, found.mean, found.covariance, gather(mine)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_measure_what_one_measures(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_reduce, (2, port, str(tmp_path)), nprocs=2)
    x = vectors(50, 4, 0)
    for rank in range(2):
        count, mean, covariance, rows = torch.load(tmp_path / f"{rank}.pt")
        assert count == 50 and torch.equal(rows, x)
        torch.testing.assert_close(mean, x.mean(0))
        torch.testing.assert_close(covariance, moments(x).covariance)


def test_frechet_distance_has_its_closed_forms():
    x = vectors(200, 6, 0)
    assert frechet_distance(moments(x), moments(x)) == pytest.approx(0, abs=1e-9)
    shift = torch.arange(6.0).double()
    assert frechet_distance(moments(x), moments(x + shift)) == pytest.approx(55.0)
    # C and 9 C: tr(C + 9 C - 6 C) = 4 tr C about the same mean
    wide = x.mean(0) + 3 * (x - x.mean(0))
    expected = 4 * moments(x).covariance.trace().item()
    assert frechet_distance(moments(x), moments(wide)) == pytest.approx(expected)


def test_frechet_distance_agrees_with_the_matrix_square_root_also_where_it_is_singular():
    linalg = pytest.importorskip("scipy.linalg")
    for size, count in [(6, 200), (30, 20)]:
        x, y = vectors(count, size, 1), vectors(count, size, 2, 0.3) * 1.5
        a, b = moments(x), moments(y)
        root = linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
        apart = (a.mean - b.mean).square().sum()
        expected = apart + a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
        assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5)


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = vectors(12, 3, 0), vectors(12, 3, 1, 0.5)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (12 * 11)
    across = sum(kernel(x[i], y[j]) for i, j in pairs) / 144
    expected = (within - 2 * across).item()
    assert kernel_distance(x, y, subsets=3, size=1000) == pytest.approx(expected)
    same = [kernel_distance(vectors(500, 4, i), vectors(500, 4, 100 + i), 1, 500) for i in range(30)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))  # zero in expectation
    with pytest.raises(ValueError, match="KID needs at least 2 images"):
        kernel_distance(x, y[:1])


def test_kid_draws_the_subsets_of_torch_fidelity(monkeypatch):
    drawn = []

    class Recorded(np.random.RandomState):
        def __init__(self, seed):
            drawn.append(seed)
            super().__init__(seed)

        def choice(self, count, size, replace):
            drawn.append((count, size, replace))
            return super().choice(count, size, replace)

    monkeypatch.setattr(np.random, "RandomState", Recorded)
    kernel_distance(vectors(1001, 1, 0), vectors(1100, 1, 1), subsets=1)
    assert drawn == [2020, (1100, 1000, False), (1001, 1000, False)]
    real, fake = images(12, 0), images(8, 1)
    drawn.clear()
    found = compare(RANDOM, [real], [fake], ["kid"])
    assert drawn == [2020, *[(8, 8, False), (12, 8, False)] * 100]
    assert found == {"kid": kernel_distance(RANDOM(real), RANDOM(fake))}


def plain_neighbourhoods(real, fake, near, far):
    def radius(points, point, k):
        return sorted((point - other).norm().item() for other in points)[k]

    def inside(points, k, point):
        return [(point - other).norm().item() <= radius(points, other, k) for other in points]

    hits = [inside(real, far, point) for point in fake]
    return {
        "precision": sum(any(inside(real, near, point)) for point in fake) / len(fake),
        "recall": sum(any(inside(fake, near, point)) for point in real) / len(real),
        "density": sum(map(sum, hits)) / far / len(fake),
        "coverage": sum(any(row[i] for row in hits) for i in range(len(real))) / len(real),
    }


def test_neighbourhood_metrics_follow_their_definitions_block_by_block():
    real, fake = vectors(30, 2, 0), vectors(25, 2, 1, 0.8)
    expected = plain_neighbourhoods(real, fake, 3, 5)
    assert neighbourhoods(real, fake) == pytest.approx(expected)
    assert neighbourhoods(real, fake, block=7) == pytest.approx(expected)
    assert 0.1 < expected["precision"] < 0.95  # the case is neither empty nor full
    with pytest.raises(ValueError, match="need over 5 images, got 5"):
        neighbourhoods(real, fake[:5])


def test_compare_gives_every_metric_and_near_zero_for_equal_sets():
    same = compare(RANDOM, images(64, 0).split(10), images(64, 0).split(16))
    assert list(same) == list(METRICS)
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    apart = compare(RANDOM, images(64, 0).split(10), images(64, 1, dark=0.5).split(16), ["fid", "coverage"])
    assert list(apart) == ["fid", "coverage"]
    assert apart["fid"] > 0.1 and apart["coverage"] < 0.5
    with pytest.raises(ValueError, match="metric 'is': must be one of fid, kid"):
        compare(RANDOM, [], [], ["is"])
    with pytest.raises(ValueError, match="no images"):
        compare(RANDOM, [], [images(4, 0)])


def test_random_features_repeat_say_what_they_are_and_take_any_size():
    assert not RANDOM.comparable and "not comparable" in RANDOM.name
    x = images(3, 0)
    assert torch.equal(RANDOM(x), load_features("random")(x))
    for size in (4, 7, 64):
        assert RANDOM(torch.zeros(2, 3, size, size, dtype=torch.uint8)).shape == (2, 64)
    grey = x[:, :1]
    assert torch.equal(RANDOM(grey), RANDOM(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="must be uint8"):
        RANDOM(x.float())


def test_missing_and_wrong_inception_weights_say_where_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"download https://github.com/.*{WEIGHTS}"):
        load_features("inception")
    with pytest.raises(FileNotFoundError, match="does not exist: download https"):
        load_features("inception", tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not the published file"):
        load_features("inception", tmp_path)
    with pytest.raises(ValueError, match="must be one of inception, inception-train, random"):
        load_features("vgg")


def test_a_downloaded_file_is_held_against_the_digits_in_its_name(tmp_path):
    path = tmp_path / "of any name"
    path.write_bytes(b"abc")  # whose SHA-256 is in the standard: ba7816bf...
    check_published(path, "https://somewhere/alexnet-owt-ba7816bf.pth")
    with pytest.raises(ValueError, match=r"any name is not .* \(sha256 ba7816bf\.\.\., not 7be5be79\.\.\.\)"):
        check_published(path, "https://somewhere/alexnet-owt-7be5be79.pth")


def test_images_are_prepared_as_published_fids_prepare_them():
    """Pixel i of 299 is read at (i + 1/2) n / 299 - 1/2 of n, or the nearest centre; 0 to 255 is -1 to 1.

    TensorFlow 1 reads it at i n / 299, which moves small images by half of one of their pixels.
    """
    pixels = torch.tensor([0, 51, 255, 102])
    row = lambda place: (
        pixels[int(place)] + (place % 1) * (pixels[min(int(place) + 1, 3)] - pixels[int(place)])
    )
    places = [min(max((i + 0.5) * 4 / 299 - 0.5, 0.0), 3.0) for i in range(299)]
    expected = torch.tensor([2 * row(place) / 255 - 1 for place in places])
    for image in (pixels.expand(1, 3, 4, 4), pixels.view(1, 1, 4, 1).expand(1, 3, 4, 4)):
        found = prepared(image.to(torch.uint8))
        assert found.shape == (1, 3, 299, 299) and found.dtype == torch.float32
        along = found[0, 0, 7] if image[0, 0, 0, 1] else found[0, 0, :, 7]
        torch.testing.assert_close(along, expected, rtol=0, atol=2e-6)
        assert torch.equal(found[0, 0], found[0, 2])
    # By hand: the first 37 lie before the first centre, the middle one halfway between the second and third.
    assert expected[0] == expected[36] == -1 and expected[37] > -1
    assert expected[149] == pytest.approx(2 * (51 + 255) / 2 / 255 - 1)


def test_images_that_shrink_are_not_smoothed():
    """598 -> 299 takes the mean of the two centres about each, and leaves out nothing between."""
    images = torch.randint(0, 256, (1, 3, 598, 598), generator=torch.Generator().manual_seed(0)).byte()
    expected = torch.nn.functional.avg_pool2d(images.float(), 2) / 127.5 - 1
    torch.testing.assert_close(prepared(images), expected, rtol=0, atol=1e-5)
    dots = torch.zeros(1, 3, 897, 897, dtype=torch.uint8)
    dots[..., ::3, ::3] = 255  # between the centres that 897 -> 299 reads
    assert (prepared(dots) == -1).all()


@pytest.fixture
def inception_module(monkeypatch):
    """torch-fidelity's file of the network, also where torchvision is missing: only other files need it."""
    package = importlib.util.find_spec("torch_fidelity")
    if package is None:
        pytest.skip("torch-fidelity is not installed")
    bare = types.ModuleType("torch_fidelity")
    bare.__path__ = list(package.submodule_search_locations)
    if importlib.util.find_spec("torchvision") is None:
        sys.modules["torch_fidelity"] = bare
    yield importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    if sys.modules["torch_fidelity"] is bare:  # other tests find out that it is incomplete
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch_fidelity"]:
            del sys.modules[name]


@pytest.fixture
def inception(inception_module, monkeypatch, tmp_path):
    """Our features and torch-fidelity's network, with the same random weights; the real are large."""
    network, path = inception_module.FeatureExtractorInceptionV3, tmp_path / WEIGHTS
    torch.manual_seed(0)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", lambda *args, **options: None)
        patched.setattr(network, "load_state_dict", lambda self, state: None)
        theirs = network("any", ["2048"], feature_extractor_weights_path=str(path))
    torch.save(theirs.state_dict(), path)
    monkeypatch.setattr(features, "_weights_file", lambda weights: path)
    return load_features("inception"), theirs


def test_inception_is_all_layers_of_torch_fidelity_after_the_published_preparation(
    inception, inception_module, monkeypatch
):
    ours, theirs = inception
    pictures = images(2, 0)
    assert ours.comparable and ours.name == "inception-v3 2048, as pytorch-fid"
    as_tensorflow = theirs(pictures)[0]
    # Their pass resizes and then scales by (x - 128) / 128: with this as its resizing it has our input.
    monkeypatch.setattr(
        inception_module,
        "interpolate_bilinear_2d_like_tensorflow1x",
        lambda x, **options: prepared(x.to(torch.uint8)) * 128 + 128,
    )
    found, expected = ours(pictures), theirs(pictures)[0]
    assert found.shape == (2, 2048) and found.dtype == torch.float32
    scale = expected.std(0).mean().item()
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 * scale)
    assert (as_tensorflow - expected).abs().mean() > 0.01 * expected.abs().mean()


def test_inception_in_train_mode_normalises_batches_as_the_published_residual_fid_did(inception):
    ours, _ = inception
    pictures = images(4, 0)
    alone, together = ours(pictures[:2]), ours(pictures)[:2]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-6)
    ours = load_features("inception-train")
    assert not ours.comparable and ours.name == "inception-v3 2048, in train mode"
    alone, together = ours(pictures[:2]), ours(pictures)[:2]
    assert (alone - together).norm() > 0.05 * together.norm()


def test_agrees_with_torch_fidelity_on_two_folders(tmp_path):
    """Both sides see the same random network: Inception's weights are too large to have here."""
    library = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.network = RandomNetwork()

        get_provided_features_list = staticmethod(lambda: ("64",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "64")
        can_be_compiled = staticmethod(lambda: False)

        def forward(self, x):
            return (self.network(x),)

    if "random-network" not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor("random-network", Extractor)
    sets = {"fake": images(80, 1, dark=0.7), "real": images(90, 0)}
    for name, pictures in sets.items():
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:03d}.png")
    theirs = library.calculate_metrics(
        input1=str(tmp_path / "fake"),
        input2=str(tmp_path / "real"),
        feature_extractor="random-network",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=50,
        cuda=False,
        cache=False,
        verbose=False,
    )
    ours = compare(RANDOM, sets["real"].split(32), sets["fake"].split(32), ["fid", "precision", "recall"])
    real, fake = (fid.collect(RANDOM, [sets[name]]) for name in ("real", "fake"))
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-3)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-3)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-3)
    found = kernel_distance(real, fake, size=50)
    assert found == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
