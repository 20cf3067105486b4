"""Swap errors of image translation runs against the ground truth, beside a shuffled baseline.

    python launch/train.py --config launch/configs/translation_small.yaml
    python launch/train.py --config launch/configs/translation_small.yaml objective.kind=vae
    run.name=translation_vae python bench/translation.py soft_introvae=runs/00000-translation_small
    vae=runs/00001-translation_vae

Every run is measured at its newest snapshot. Writes translation.json and translation_<name>.png under
bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
from torch import Tensor

from sivae_fast.checkpoint import load
from sivae_fast.data.factors import Factors, load_factors
from sivae_fast.evaluation import translation
from sivae_fast.files import write_text

RESULTS = Path(__file__).parent / "results"


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="name=run folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, _, folder in (run.partition("=") for run in options.runs):
        model = load(sorted((Path(folder) / "snapshots").glob("*.safetensors"))[-1])
        factors = load_factors(model.config.data.path, model.resolution)
        rows[name] = measure(model, factors)
        draw(model, factors, options.out / f"translation_{name}.png")
        print(name, json.dumps(rows[name], indent=1), flush=True)
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "baselines": baselines(factors),
        "runs": rows,
    }
    write_text(options.out / "translation.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["baselines"], indent=1))


def measure(model, factors: Factors) -> dict:
    z = torch.cat([model.encode(part).mean for part in images(factors.images).split(256)])
    givers, others, truth = pairs(factors)
    class_code, content_code = model.split(z)
    return {
        "images": model.images,
        "objective": model.config.objective.model_dump(mode="json"),
        "swap": errors(decode(model, model.swap(z[givers], z[others])), truth),
        "reconstruction": errors(decode(model, z[factors.test]), images(factors.images[factors.test])),
        "probe": {
            f"{factor} from {code}": translation.probe_accuracy(values, labels, factors.test)
            for code, values in (("class code", class_code), ("content code", content_code))
            for factor, labels in (("class", factors.classes), ("content", factors.contents))
        },
    }


def baselines(factors: Factors) -> dict:
    givers, others, truth = pairs(factors)
    return {
        "pairs": len(givers),
        "truth of another pair": errors(translation.shuffled(truth), truth),
        "image that gives the class": errors(images(factors.images[givers]), truth),
        "image that gives the content": errors(images(factors.images[others]), truth),
        "mean image": errors(images(factors.images).mean(0).expand_as(truth), truth),
        "probe by chance": {
            "class": translation.chance(factors.classes, factors.test),
            "content": translation.chance(factors.contents, factors.test),
        },
    }


def pairs(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """(class givers [n], content givers [n], the images that hold both [n, C, R, R])."""
    givers, others = translation.swap_pairs(factors.classes, factors.contents, factors.test)
    truth = factors.find(factors.classes[givers], factors.contents[others])
    known = truth >= 0
    return givers[known], others[known], images(factors.images[truth[known]])


def images(stored: Tensor) -> Tensor:
    return stored.permute(0, 3, 1, 2).float() / 255


def decode(model, z: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in z.split(256)])


def errors(made: Tensor, truth: Tensor) -> dict[str, float]:
    return {
        "mse": translation.mse(made, truth).mean().item(),
        "ssim": translation.ssim(made, truth).mean().item(),
    }


def draw(model, factors: Factors, path: Path) -> None:
    test = images(factors.images[factors.test])
    step = len(test) // 11
    chosen = test[step // 2 :: step][:10]

    def translate(class_of: Tensor, content_of: Tensor) -> Tensor:
        return model.decode(model.swap(model.encode(class_of).mean, model.encode(content_of).mean))

    translation.draw_translations(path, chosen[::2], chosen[1::2], translate)


if __name__ == "__main__":
    main()
