"""The command `sivae-fast`: everything in the life of a model but its training."""

from __future__ import annotations

import argparse
import logging
import re
import sys

# Each command imports what it needs: --help is there at once, Ctrl-C while PyTorch is loaded ends quietly.

_RESIZE = "accept pictures of another size, and draw points from clouds of another size"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. Wrong input ends in one line on standard error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("sivae_fast").setLevel(logging.INFO)  # and of other packages only the warnings
    arguments = sys.argv[1:] if arguments is None else arguments
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        command(**options)
    except ModuleNotFoundError as error:
        print(f"error: a package is missing ({error}): pip install 'sivae-fast[train,eval]'", file=sys.stderr)
        return 1
    except (ImportError, ValueError, OSError) as error:
        print(f"error: {_as_typed(str(error), arguments)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _as_typed(message: str, arguments: list[str]) -> str:
    """The message; where it begins with an argument, as in "count is 0", with the option that gave it."""
    found = re.match(r"(\w+)(?= is | are |=)", message)
    if not found:
        return message
    option = f"--{found[1].replace('_', '-')}"
    given = any(argument.partition("=")[0] == option for argument in arguments)
    return option + message[found.end() :] if given else message


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sivae-fast", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=_Command)
    _add_doctor(commands)
    _add_prepare(commands)
    _add_check(commands)
    _add_sample(commands)
    _add_reconstruct(commands)
    _add_interpolate(commands)
    _add_mix(commands)
    _add_translate(commands)
    _add_evaluate(commands)
    _add_report(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_card(commands)
    _add_push(commands)
    _add_pull(commands)
    return top


def _command(commands, name: str, function, summary: str) -> argparse.ArgumentParser:
    added = commands.add_parser(name, help=summary, description=summary, formatter_class=_Help)
    added.set_defaults(command=function)
    return added


class _Command(argparse.ArgumentParser):
    """Takes options also between positional arguments, as launch/train.py does."""

    _inside = False

    def parse_known_args(self, args=None, namespace=None):
        if self._inside:  # argparse's own passes over the options and over the rest
            return super().parse_known_args(args, namespace)
        self._inside = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._inside = False


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults that are values; what None means is said by the help itself where it is not plain."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = action.default is False or action.default in (None, ())
        return action.help if plain else super()._get_help_string(action)


def _add_doctor(commands) -> None:
    add = _command(
        commands, "doctor", _doctor, "Check this machine, or all ranks of a launch, before training."
    ).add_argument
    add("--config", help="YAML file that is to be trained; without it: only what needs none")
    add("--timeout", type=float, default=60, help="seconds to wait for other ranks")
    add("overrides", nargs="*", metavar="section.key=value", help="as for training")


def _doctor(config, timeout, overrides) -> None:
    import os

    from sivae_fast.commands.doctor import doctor

    failed = 0
    for finding in doctor(config, overrides, timeout):
        failed += finding.verdict == "failed"
        alone = finding.check == "ranks" and finding.verdict == "failed"  # nobody else can say it
        if alone or os.environ.get("RANK", "0") == "0":
            print(finding, flush=True)
    if failed:
        raise SystemExit(1)


def _add_prepare(commands) -> None:
    add = _command(
        commands, "prepare", _prepare, "Turn pictures or a published archive into an image set, once."
    ).add_argument
    add("source", help="folder, zip, tar, or archive of a published set")
    add("dest", help="NAME.zip, or a folder")
    add("--resolution", type=int, help="pixels of a side, a power of two")
    add("--fit", default="crop", help="crop: cut the centre; fit: keep everything, with borders")
    add("--filter", default="lanczos", help="antialiasing filter")
    add("--format", default="png", help="png or jpeg")
    add("--quality", type=int, default=95, help="of jpeg")
    add("--grey", action="store_true", default=None, help="one channel")
    add("--background", default="white", help="behind transparent pixels and borders")
    add("--split", help="train or test, where the source has both or --hold-out is given")
    add("--hold-out", type=int, help="this many pictures, the last by name, are the test split")
    add("--allow-bad", type=float, default=0.01, help="share of unreadable files that is skipped")
    add("--workers", type=int, help="processes (default: the cores)")


def _prepare(**options) -> None:
    from sivae_fast.data.prepare import prepare

    prepare(**options)


def _add_check(commands) -> None:
    add = _command(commands, "check", _check, "Read every image of a set and name the damaged ones.")
    add.add_argument("path", help="a set made by `prepare`")


def _check(path: str) -> None:
    from sivae_fast.data.prepare import check_set

    check_set(path)


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", help="run folder, checkpoint or snapshot")
    add("--raw", action="store_true", help="the weights of the optimizer, not their average")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--precision", default="fp32", help="fp32 or bf16")
    add("--batch", type=int, default=64, help="images or clouds in one pass")
    add("--batch-norm", help="running, batch or recalibrated, for models that have batch norm")
    add("--data", help="the data, where they are not where the run found them; of points, a name")
    add("--seed", type=_seed, default=0, help="of all that is drawn")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**62:  # what torch's generators take, with room to count up
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2^62 - 1")
    return int(text)


def _loaded(options: dict):
    """The model itself; takes its options out of `options`."""
    from sivae_fast.checkpoint import load
    from sivae_fast.trained import pick_device

    device = pick_device(options.pop("device"))
    return load(options.pop("model"), not options.pop("raw"), device)


def _opened(options: dict, model=None):
    """(the model, that of `_loaded` where it is given, ready for use; the options left for the command)."""
    from sivae_fast.commands.opening import run_of

    model = _loaded(options) if model is None else model
    names = ("precision", "batch", "batch_norm", "data")
    return run_of(model, **{name: options.pop(name) for name in names}), options


def _pictures(run):
    """The module that makes pictures of that kind of model."""
    from sivae_fast.commands import clouds, pictures
    from sivae_fast.inference_clouds import CloudInference

    return clouds if isinstance(run, CloudInference) else pictures


def _add_sample(commands) -> None:
    command = _command(
        commands, "sample", _sample, "Pictures of prior samples; clouds also as files, densities as a figure."
    )
    _add_model(command)
    command.add_argument(
        "--out",
        default="samples.png",
        help="a .png grid, or a folder of files; clouds: also .npy, .ply, .xml",
    )
    command.add_argument(
        "--count", type=int, default=argparse.SUPPRESS, help="default: 64, 1 for a file of one cloud"
    )
    command.add_argument("--columns", type=int)
    command.add_argument("--truncation", type=float, default=1.0, help="below 1: closer to the average style")
    _add_noise(command)
    command.add_argument(
        "--mixing", action="store_true", help="mix styles as in training, one draw of the layers a batch"
    )


def _add_noise(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--noise",
        default="sample",
        help="of style models: sample, own noise for each; batch, one for all; bump, what published models "
        "have in place of noise; none",
    )


def _sample(**options) -> None:
    model = _loaded(options)
    if model.config.model.kind == "mlp":
        return print(_density_figure(model, **options))
    run, options = _opened(options, model)
    print(_pictures(run).sample(run, **options))


def _density_figure(model, out, precision, batch, batch_norm, data, seed, **others):
    from sivae_fast.commands.densities import check_unused, sample

    for name in ("count", "columns"):
        if others.get(name) is not None:
            raise ValueError(
                f"{name} is {others[name]}: the figure of a density has neither count nor columns"
            )
    for name, usual in (("truncation", 1.0), ("noise", "sample"), ("mixing", False)):
        if others[name] != usual:
            raise ValueError(f"{name}={others[name]}: this model is of kind mlp, styles need style")
    check_unused(precision=precision, batch=batch, batch_norm=batch_norm)
    return sample(model, out, data=data, seed=seed)


def _add_reconstruct(commands) -> None:
    command = _command(
        commands, "reconstruct", _reconstruct, "Pictures, or clouds, above their reconstructions."
    )
    _add_model(command)
    command.add_argument(
        "files", nargs="*", help="pictures; .ply or .npy clouds (default: the run's test or training data)"
    )
    command.add_argument(
        "--out", default="reconstructions.png", help="clouds: also .npy, .ply, .xml or a folder"
    )
    how_many = "default: 16; into a file of one cloud: 1; of clouds in files: all"
    command.add_argument("--count", type=int, default=argparse.SUPPRESS, help=how_many)
    command.add_argument("--columns", type=int, default=8)
    command.add_argument("--resize", action="store_true", help=_RESIZE)
    _add_noise(command)


def _reconstruct(files, **options) -> None:
    from sivae_fast.commands.numbers import as_json

    run, options = _opened(options)
    print(as_json(_pictures(run).reconstruct(run, options.pop("out"), files, **options)))


def _add_interpolate(commands) -> None:
    command = _command(
        commands, "interpolate", _interpolate, "Pictures between pictures or clouds, or an animation."
    )
    _add_model(command)
    command.add_argument("files", nargs="*", help="pictures; .ply or .npy clouds (default: samples)")
    command.add_argument("--out", default="interpolation.png", help=".png, .gif or .mp4; clouds: also .npy")
    command.add_argument("--steps", type=int, default=7)
    command.add_argument("--space", default="z", help="z, or w of style models")
    command.add_argument("--milliseconds", type=int, default=60, help="of one picture of an animation")
    command.add_argument("--resize", action="store_true", help=_RESIZE)


def _interpolate(files, **options) -> None:
    run, options = _opened(options)
    print(_pictures(run).interpolate(run, options.pop("out"), files, **options))


def _add_mix(commands) -> None:
    command = _command(commands, "mix", _mix, "A grid of mixed styles.")
    _add_model(command)
    command.add_argument("--out", default="mix.png")
    command.add_argument(
        "--layers",
        nargs="+",
        default="coarse",
        help="coarse, middle, fine, or a range such as 2-5: one, or one for each destination",
    )
    command.add_argument("--sources", nargs="*", default=(), help="files (default: samples)")
    command.add_argument("--destinations", nargs="*", default=(), help="files (default: samples)")
    command.add_argument("--count", type=int, default=6)
    command.add_argument("--resize", action="store_true", help=_RESIZE)


def _mix(**options) -> None:
    from sivae_fast.commands.pictures import mix

    run, options = _opened(options)
    print(mix(run, **options))


def _add_translate(commands) -> None:
    command = _command(
        commands,
        "translate",
        _translate,
        "A grid of the classes of some pictures with the contents of others.",
    )
    _add_model(command)
    command.add_argument("--classes", nargs="*", default=(), help="files (default: test images)")
    command.add_argument("--contents", nargs="*", default=(), help="files (default: test images)")
    command.add_argument("--out", default="translations.png")
    command.add_argument("--count", type=int, default=5, help="test images of each")
    command.add_argument("--resize", action="store_true", help=_RESIZE)


def _translate(**options) -> None:
    from sivae_fast.commands.translate import translate

    run, options = _opened(options)
    print(translate(run, **options))


def _add_evaluate(commands) -> None:
    command = _command(commands, "evaluate", _evaluate, "Measure a model; a run folder keeps the results.")
    _add_model(command)
    command.add_argument("--metrics", nargs="+", help="by kind of model, see docs/evaluation.md")
    command.add_argument("--features", help="network of fid and its kin: inception, inception-train, random")
    command.add_argument("--weights", help="file or folder of the networks' weights")
    command.add_argument("--count", type=int, help="at most so many images or clouds (default: 50000)")
    command.add_argument(
        "--mirror",
        action="store_true",
        default=argparse.SUPPRESS,
        help="fid and its kin, as published: mirror each real image with probability 1/2",
    )
    command.add_argument(
        "--round-down",
        action="store_true",
        default=argparse.SUPPRESS,
        help="fid and its kin, as published: round samples down to 8 bits, not to the nearest",
    )
    command.add_argument("--ood", nargs="+", metavar="SET", help="image sets to be told from the model's own")
    command.add_argument("--own", help="held-out images of the model's kind, for --ood")
    command.add_argument("--out", help="folder of the results of --ood (default: a run folder, or here)")
    add = command.add_argument_group("log-likelihood, in --ood and in the metric log_likelihood").add_argument
    add("--samples", type=int, default=argparse.SUPPRESS, help="draws of an estimate (default: 5)")
    add("--variance", type=float, default=argparse.SUPPRESS, help="of a pixel in [0, 1] (default: 1)")
    add(
        "--proposal",
        default=argparse.SUPPRESS,
        help="what is drawn from, of posterior deviations sigma: posterior, variance sigma^2; published, "
        "variance sigma (default: posterior)",
    )


def _evaluate(**options) -> None:
    from sivae_fast.commands.evaluate import evaluate
    from sivae_fast.commands.numbers import as_json

    estimate = {name: options.pop(name) for name in ("samples", "variance", "proposal") if name in options}
    protocol = {name: options.pop(name) for name in ("mirror", "round_down") if name in options}
    print(as_json(evaluate(**options, protocol=protocol, estimate=estimate), indent=1))


def _add_report(commands) -> None:
    command = _command(commands, "report", _report, "One page about a run, to be opened in a browser.")
    command.add_argument("folder", help="run folder")
    command.add_argument("--out", help="HTML file (default: report.html in the run folder)")
    command.add_argument("--pictures", type=int, default=8, help="sample grids that are shown")


def _report(**options) -> None:
    from sivae_fast.commands.report import report

    print(report(**options))


def _add_convert(commands) -> None:
    command = _command(
        commands, "convert", _convert, "A published checkpoint as a snapshot, or as a run that goes on."
    )
    command.add_argument("source", help="published file; nothing in it is executed")
    command.add_argument("dest", nargs="?", help="snapshot to write, NAME.safetensors")
    command.add_argument("--raw", action="store_true", help="the weights of the optimizer, not their average")
    command.add_argument("--config", help="instead of a snapshot: make a run of this configuration")
    command.add_argument("--set", nargs="*", default=(), metavar="key=value", help="changes to --config")
    command.add_argument(
        "--no-optimizer", action="store_true", help="with --config: begin with fresh moments"
    )
    command.add_argument(
        "--images",
        type=int,
        default=argparse.SUPPRESS,
        help="with --config: images seen at the start (default: by the epochs that the file counts)",
    )


def _convert(source, dest, raw, config, set, no_optimizer, images=None) -> None:
    from sivae_fast.config import load_config
    from sivae_fast.convert import convert, start_run

    if (dest is None) == (config is None):
        raise ValueError("convert takes either DEST, for a snapshot, or --config, for a run")
    if dest:
        given = {"--set": set, "--no-optimizer": no_optimizer, "--images": images is not None}
        for option in filter(given.get, given):
            raise ValueError(f"{option} is for a run: give --config in place of {dest}")
        return print(convert(source, dest, raw=raw))
    if raw:
        raise ValueError("--raw is for a snapshot: a run has both weights")
    if images is not None and images < 0:
        raise ValueError(f"images is {images}, must be at least 0")
    settings = load_config(config, set)
    print(start_run(source, settings, optimizer=not no_optimizer, images=images))


def _add_export(commands) -> None:
    command = _command(commands, "export", _export, "Encoder and decoder as ONNX or torch.export files.")
    command.add_argument("source", help="run folder, checkpoint or snapshot")
    command.add_argument("folder", help="where the files go")
    command.add_argument("--format", default="onnx", help="onnx or torch")
    command.add_argument("--noise", default="none", help="of style models: none or bump")
    command.add_argument("--raw", action="store_true", help="the weights of the optimizer, not their average")


def _export(source, folder, format, noise, raw) -> None:
    from sivae_fast.export import export

    for path in export(source, folder, format=format, noise=noise, averaged=not raw):
        print(path)


def _add_card(commands) -> None:
    command = _command(commands, "card", _card, "A model card in Markdown: what a model is, how to load it.")
    command.add_argument("source", help="run folder, checkpoint or snapshot")
    command.add_argument("--out", help="file, such as README.md (default: standard output)")
    command.add_argument("--raw", action="store_true", help="of the optimizer's weights, not their average")


def _card(source, out, raw) -> None:
    from sivae_fast.commands.card import card
    from sivae_fast.files import write_text

    text = card(source, averaged=not raw)
    if out:
        write_text(out, text)
    print(out or text)


def _add_push(commands) -> None:
    command = _command(
        commands, "push", _push, "Upload weights, model card and samples to the Hugging Face Hub."
    )
    command.add_argument("source", help="run folder, checkpoint or snapshot")
    command.add_argument("repo_id", help="owner/name; `hf auth login` or HF_TOKEN says who you are")
    command.add_argument("--private", action="store_true", help="if the repository is made")
    command.add_argument("--raw", action="store_true", help="the weights of the optimizer, not their average")


def _push(source, repo_id, private, raw) -> None:
    from sivae_fast.commands.publish import push

    print(push(source, repo_id, private=private, averaged=not raw))


def _add_pull(commands) -> None:
    command = _command(commands, "pull", _pull, "Fetch a model from the Hugging Face Hub.")
    command.add_argument("repo_id", help="owner/name or owner/name@revision")
    command.add_argument("dest", nargs="?", help="folder (default: the cache)")


def _pull(repo_id, dest) -> None:
    from sivae_fast.hub import pull

    print(pull(repo_id, dest))


if __name__ == "__main__":
    sys.exit(main())
