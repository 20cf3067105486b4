"""The geometry behind the made sets."""

import numpy as np
import pytest

from sivae_fast.data.solids import KINDS, Body, intervals, made_cloud, normals, surface_points, yaw

ZERO = np.zeros(3)


def test_intervals_of_known_bodies():
    bodies = [Body(kind, ZERO, np.array([2.0, 1.0, 0.5])) for kind in ("box", "ball", "cylinder")]
    origin = np.array([[-5.0, 0, 0], [0, 0, -5], [1.6, -5, 0.0], [1.9, 0.9, -5]])
    direction = np.array([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]])
    spans = intervals(bodies, origin, direction)
    np.testing.assert_allclose(spans[:, :, 0], [[3, 7]] * 3)
    np.testing.assert_allclose(spans[:, :, 1], [[4.5, 5.5]] * 3)
    np.testing.assert_allclose(spans[:, :, 2], [[4, 6], [4.4, 5.6], [4.4, 5.6]])
    np.testing.assert_allclose(spans[0, :, 3], [4.5, 5.5])
    assert (spans[1:, 0, 3] == np.inf).all() and (spans[1:, 1, 3] == -np.inf).all()


def test_points_are_uniform_by_area():
    box = Body("box", np.array([1.0, 2, 3]), np.array([1, 0.5, 0.1]), yaw(0.7))
    points = surface_points([box], 40_000, np.random.default_rng(0))
    own = np.abs(box.own(points))
    np.testing.assert_allclose(own.max(1), 1)
    areas = np.array([0.5 * 0.1, 1 * 0.1, 1 * 0.5])
    share = (own > 1 - 1e-9).mean(0)
    np.testing.assert_allclose(share, areas / areas.sum(), atol=0.01)


def test_nothing_inside_a_union():
    bodies = [Body("box", ZERO, np.ones(3)), Body("ball", np.array([0.8, 0, 0]), np.array([1.0, 0.6, 0.6]))]
    points = surface_points(bodies, 2000, np.random.default_rng(1))
    in_box = (np.abs(points) < 1 - 1e-9).all(1)
    in_ball = np.linalg.norm(bodies[1].own(points), axis=1) < 1 - 1e-9
    assert not (in_box | in_ball).any()


def test_normals_point_outward():
    rng = np.random.default_rng(2)
    for kind in ("box", "ball", "cylinder"):
        body = Body(kind, np.array([0.3, -0.2, 0.1]), np.array([1.0, 0.7, 0.4]), yaw(0.4))
        points = surface_points([body], 200, rng)
        normal = normals(body, points)
        np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1)
        spans = intervals([body], points + 1e-3 * normal, normal)[0]
        assert (spans[1] < 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_made_clouds(kind):
    first, again, other = (made_cloud(i, 300, (kind,)) for i in (4, 4, 5))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.dtype == np.float32 and first.shape == (300, 3)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1).max(), 0.5, rtol=1e-6)


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"\['boat'\]: made solids are chair"):
        made_cloud(0, 10, ("boat",))
