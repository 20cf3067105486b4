"""Pictures of point clouds."""

from xml.etree import ElementTree

import torch
from PIL import Image

from sivae_fast.evaluation.mitsuba import write_scene
from sivae_fast.evaluation.pointcloud_figures import animate, draw_clouds, render


def test_one_point_is_a_ball_at_its_place_over_its_shadow():
    cloud = torch.tensor([[0.0, 0, 0.3]])
    picture = render(cloud, size=96, radius=0.05, azimuth=0, elevation=0)
    assert picture.dtype == torch.uint8 and picture.shape == (3, 96, 96)
    assert (picture[:, :5] == 255).all() and (picture[:, -5:] == 255).all()
    height = 96 / 2 - 0.3 * 96 / 1.1
    dark = (picture.float().mean(0) < 240).nonzero().float()
    assert (dark.mean(0) - torch.tensor([height, 48.0])).abs().max() < 3


def test_the_nearer_point_hides_the_farther():
    # Seen along x: the near one is at high x. Colour tells the position, red along x.
    near_first = torch.tensor([[0.4, 0.0, 0.0], [-0.4, 0.0, 0.0]])
    pictures = [render(cloud, 64, 0.1, azimuth=0, elevation=0) for cloud in (near_first, near_first.flip(0))]
    assert torch.equal(*pictures)
    red, green, _ = pictures[0][:, 32, 32].tolist()
    assert red > 2 * green


def test_files(tmp_path):
    clouds = torch.rand(3, 50, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    drawn = []
    draw_clouds(tmp_path / "rows.png", [clouds, clouds], size=48, drawn=lambda: drawn.append(1))
    assert len(drawn) == 6
    assert Image.open(tmp_path / "rows.png").width > 3 * 48
    animate(tmp_path / "moving.gif", clouds, size=48)
    assert Image.open(tmp_path / "moving.gif").n_frames >= 5


def test_a_scene_for_mitsuba(tmp_path):
    cloud = 3 * torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) + 7
    write_scene(tmp_path / "cloud.xml", cloud)
    scene = ElementTree.parse(tmp_path / "cloud.xml").getroot()
    shapes = [shape.get("type") for shape in scene.findall("shape")]
    assert scene.get("version") == "3.0.0" and shapes == ["rectangle", "rectangle", *["sphere"] * 50]
    spheres = scene.findall("shape[@type='sphere']")
    centres = torch.tensor([[float(s.find("point").get(axis)) for axis in "xyz"] for s in spheres])
    scale = (cloud.amax(0) - cloud.amin(0)).amax()
    middle = (cloud.amax(0) + cloud.amin(0)) / 2
    torch.testing.assert_close(centres, (cloud - middle) / scale, atol=1e-5, rtol=0)
    radius = float(spheres[0].find("float").get("value"))
    floor = float(scene.find("shape[@type='rectangle']/transform/translate").get("z"))
    assert abs(floor - (centres[:, 2].min().item() - radius)) < 1e-4
    colours = {s.find("bsdf/rgb").get("value") for s in spheres}
    assert len(colours) == 50
