"""Image translation on the made pictures: Soft-IntroVAE, a VAE of as many images and one of as much time.

    python bench/translation.py [--only vae soft_introvae] [--seeds 0] [--lpips FOLDER]

Trains the same networks on one thread from launch/configs/translation_small.yaml (on a core 10 minutes, 2
and 10 for a seed), then swaps codes of test images and compares with the pictures that really have that class
and that content, beside baselines. Writes translation.json and translation_<name>.png of the first seed
(contents on top, classes at the left) under bench/results/. What --only and --seeds leave out stays as it is;
--lpips adds that distance (see docs/evaluation.md for its weights).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from measure import machine
from torch import Tensor

from sivae_fast.config import load_config
from sivae_fast.data.factors import Factors
from sivae_fast.data.made_images import ACROSS, AWAY, COLOURS, SHAPES
from sivae_fast.evaluation import reconstruction, translation
from sivae_fast.evaluation.reconstruction import error_functions
from sivae_fast.files import write_text
from sivae_fast.inference import Inference
from sivae_fast.measure_translation import CODES, ERRORS, Functions, Swaps, to_float
from sivae_fast.training.loop import train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
CONFIG = ROOT / "launch" / "configs" / "translation_small.yaml"

RUNS = {
    "vae": ["objective.kind=vae", "run.name=translation_vae"],
    "vae_as_long": ["objective.kind=vae", "train.images=180000", "run.name=translation_vae_as_long"],
    "soft_introvae": [],
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=RUNS, nargs="+", default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for every run")
    parser.add_argument("--lpips", type=Path, help="folder of AlexNet's weights")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: the committed results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    facts = machine("cpu")  # before pictures change the tree
    functions = error_functions(ERRORS if options.lpips else ("mse", "ssim"), options.lpips)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "translation.json"
    for seed, name in itertools.product(options.seeds, options.only):
        seconds, folder = trained([*RUNS[name], f"train.seed={seed}", *options.set])
        snapshot = sorted((folder / "snapshots").glob("*.safetensors"))[-1]
        run = Inference.load(snapshot, device="cpu", batch=256, show=False)
        swaps = Swaps(run, run.factors())
        with torch.no_grad():
            row = {"processor_seconds": seconds, **measure(swaps, functions)}
            if seed == options.seeds[0]:
                draw(run.model, swaps.factors, options.out / f"translation_{name}.png")
            # Read again, since another process may train other seeds.
            runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
            runs[name] = dict(sorted({**runs.get(name, {}), str(seed): row}.items()))
            result = {**facts, "baselines": baselines(swaps, functions), "means": means(runs), "runs": runs}
        write_text(path, json.dumps(result, indent=1) + "\n")
        print(name, seed, json.dumps(row, indent=1), flush=True)


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


def means(runs: dict) -> dict[str, dict]:
    """Of each run over its seeds: errors of swaps and reconstructions, with the least and the most."""
    found = {}
    for name, by_seed in runs.items():
        found[name] = {"seeds": len(by_seed), "images": next(iter(by_seed.values()))["images"]}
        for what in ("swap", "reconstruction"):
            for error in next(iter(by_seed.values()))[what]:
                values = [row[what][error] for row in by_seed.values()]
                found[name][f"{what}_{error}"] = [sum(values) / len(values), min(values), max(values)]
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
