"""Image translation on the made pictures: a plain VAE and Soft-IntroVAE, same networks, same processor time.

    python bench/translation.py [--only soft_introvae] [--lpips FOLDER]

Trains both on one thread from launch/configs/translation_small.yaml, then swaps codes of test images and
compares with the pictures that really have that class and that content, beside baselines. Writes
translation.json and translation_<name>.png (contents on top, classes at the left) under bench/results/. With
--only the other rows stay as they are; --lpips adds that distance (see docs/evaluation.md for its weights).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from measure import machine
from torch import Tensor

from sivae_fast.config import load_config
from sivae_fast.data.factors import Factors
from sivae_fast.data.made_images import ACROSS, AWAY, COLOURS, SHAPES, TURNS
from sivae_fast.evaluation import reconstruction, translation
from sivae_fast.evaluation.reconstruction import error_functions
from sivae_fast.files import write_text
from sivae_fast.inference import Inference
from sivae_fast.measure_translation import CODES, ERRORS, Functions, Swaps, to_float
from sivae_fast.training.loop import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CONFIG = ROOT / "launch" / "configs" / "translation_small.yaml"

#: Images are chosen so that every run takes about the same processor time.
RUNS = {
    "vae": ["objective.kind=vae", "train.images=49600", "run.name=translation_vae"],
    "soft_introvae": [],
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--lpips", type=Path, help="folder of AlexNet's weights")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine("cpu")  # before pictures change the tree
    functions = error_functions(ERRORS if options.lpips else ("mse", "ssim"), options.lpips)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "translation.json"
    rows = json.loads(path.read_text())["runs"] if path.is_file() else {}
    for name in options.only:
        seconds, folder = trained([*RUNS[name], *options.set])
        snapshot = sorted((folder / "snapshots").glob("*.safetensors"))[-1]
        run = Inference.load(snapshot, device="cpu", batch=256, show=False)
        swaps = Swaps(run, run.factors())
        with torch.no_grad():
            rows[name] = {"processor_seconds": seconds, **measure(swaps, functions)}
            draw(run.model, swaps.factors, options.out / f"translation_{name}.png")
            result = {**facts, "baselines": baselines(swaps, functions), "runs": rows}
        write_text(path, json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(rows[name], indent=1), flush=True)


def trained(overrides: list[str]) -> tuple[float, Path]:
    """Processor time of a whole training, writing included, and its folder."""
    config = load_config(CONFIG, ["engine.kind=torch", "run.new=true", *overrides])
    start = time.process_time()
    folder = train(config)
    return time.process_time() - start, folder


def measure(swaps: Swaps, functions: Functions) -> dict:
    config = swaps.run.config
    return {
        "images": swaps.run.images,
        **{name: getattr(config, name).model_dump(mode="json") for name in ("model", "objective", "train")},
        "swap": swaps.errors(functions),
        "reconstruction": swaps.reconstruction_errors(functions),
        "by_factor": by_factor(swaps.run.model, swaps.factors, swaps.z),
        "probe": {
            f"{factor} from {code} code": swaps.probe(factor, code) for code in CODES for factor in CODES
        },
    }


def by_factor(model, factors: Factors, z: Tensor, count: int = 200) -> dict[str, dict[str, float]]:
    """MSE of swaps between made pictures that differ in one factor alone: to the right picture, and to the
    other of the pair. Says which factor goes with the wrong code. z [n, Z]: means of all pictures.
    """
    sizes = {
        "shape": len(SHAPES),
        "colour": len(COLOURS),
        "across": len(ACROSS),
        "away": len(AWAY),
        "direction": len(TURNS),
    }
    values = torch.cartesian_prod(*map(torch.arange, sizes.values()))  # in the order of the made pictures
    strides = torch.tensor([math.prod([*sizes.values()][i + 1 :]) for i in range(len(sizes))])
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i, (name, size) in enumerate(sizes.items()):
        first = torch.randint(len(values), (count,), generator=generator)
        turned = (values[first, i] + torch.randint(1, size, (count,), generator=generator)) % size
        second = first + (turned - values[first, i]) * strides[i]
        right, wrong = (first, second) if name in ("shape", "colour") else (second, first)
        swapped = decode(model, model.swap(z[first], z[second]))
        found[name] = {
            key: reconstruction.mse(swapped, to_float(factors.images[of])).mean().item()
            for key, of in (("to_the_right", right), ("to_the_other", wrong))
        }
    return found


def baselines(swaps: Swaps, functions: Functions) -> dict:
    return {
        "pairs": len(swaps.givers),
        **swaps.baselines(functions),
        "probe by chance": {factor: swaps.chance(factor) for factor in CODES},
    }


def decode(model, z: Tensor) -> Tensor:
    return torch.cat([model.decode(part) for part in z.split(256)])


def draw(model, factors: Factors, path: Path) -> None:
    test = to_float(factors.images[factors.test])
    step = len(test) // 11
    chosen = test[step // 2 :: step][:10]

    def translate(class_of: Tensor, content_of: Tensor) -> Tensor:
        return model.decode(model.swap(model.encode(class_of).mean, model.encode(content_of).mean))

    translation.draw_translations(path, chosen[::2], chosen[1::2], translate)


if __name__ == "__main__":
    main()
