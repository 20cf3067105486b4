"""Point clouds as scenes of Mitsuba 3 (https://mitsuba-renderer.org); the published figures used Mitsuba 2.

Writing them needs nothing; docs/point-clouds.md says how a scene becomes a picture.
"""

from __future__ import annotations

import os

from torch import Tensor

from sivae_fast.evaluation.pointcloud_figures import camera, colours
from sivae_fast.files import write_text

_SCENE = """<scene version="3.0.0">
<default name="spp" value="128"/>
<default name="width" value="800"/>
<default name="height" value="600"/>
<integrator type="path"><integer name="max_depth" value="6"/></integrator>
<sensor type="perspective">
 <float name="fov" value="25"/>
 <transform name="to_world"><lookat origin="{origin}" target="0, 0, 0" up="0, 0, 1"/></transform>
 <sampler type="independent"><integer name="sample_count" value="$spp"/></sampler>
 <film type="hdrfilm"><integer name="width" value="$width"/><integer name="height" value="$height"/></film>
</sensor>
<shape type="rectangle">
 <transform name="to_world"><scale value="20"/><translate z="{floor:.5f}"/></transform>
 <bsdf type="diffuse"><rgb name="reflectance" value="0.8, 0.8, 0.8"/></bsdf>
</shape>
<shape type="rectangle">
 <transform name="to_world">
  <scale value="2"/><lookat origin="{light}" target="0, 0, 0" up="0, 1, 0"/>
 </transform>
 <emitter type="area"><rgb name="radiance" value="8, 8, 8"/></emitter>
</shape>
<emitter type="constant"><rgb name="radiance" value="0.25, 0.25, 0.25"/></emitter>
{spheres}
</scene>
"""
_SPHERE = """<shape type="sphere">
 <point name="center" x="{:.5f}" y="{:.5f}" z="{:.5f}"/><float name="radius" value="{:.5f}"/>
 <bsdf type="diffuse"><rgb name="reflectance" value="{:.3f}, {:.3f}, {:.3f}"/></bsdf>
</shape>"""


def scene(cloud: Tensor, azimuth: float = 240, elevation: float = 18) -> str:
    """A Mitsuba 3 scene (XML) of a cloud [points, 3]: spheres coloured by position on a floor, the z axis up.

    The cloud is brought into the unit cube around the origin. The camera looks from where `render` of
    `pointcloud_figures` does. spp, width and height are parameters of the scene.
    """
    cloud = cloud.detach().float().cpu()
    low, high = cloud.amin(0), cloud.amax(0)
    cloud = (cloud - (low + high) / 2) / (high - low).amax().clamp(min=1e-6)
    radius = 0.015 * (2048 / len(cloud)) ** 0.25
    right, up, near = camera(azimuth, elevation)
    numbers = lambda vector: ", ".join(f"{x:.5f}" for x in vector.tolist())
    return _SCENE.format(
        origin=numbers(3.9 * near),
        light=numbers(5 * (up + 0.4 * near - 0.5 * right)),
        floor=cloud[:, 2].amin() - radius,
        spheres="\n".join(
            _SPHERE.format(*place, radius, *colour)
            for place, colour in zip(cloud.tolist(), colours(cloud).tolist(), strict=True)
        ),
    )


def write_scene(path: str | os.PathLike, cloud: Tensor) -> None:
    """Writes `scene(cloud)`, atomically."""
    write_text(path, scene(cloud))
