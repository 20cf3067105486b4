"""Turns pictures of any kind into an image set: each resized once, checked, and listed in a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import PIL

from sivae_fast.data.archive import FORMAT, LABELS, MANIFEST, ImageSet
from sivae_fast.data.convert import FORMATS, Converted, Recipe, convert
from sivae_fast.data.parallel import cores, ordered
from sivae_fast.data.published import open_source
from sivae_fast.data.sources import Source
from sivae_fast.data.writer import FolderWriter, ZipWriter
from sivae_fast.files import locked, make_folder
from sivae_fast.progress import progress_bar

log = logging.getLogger(__name__)
#: Up to this side an image of a published set is converted sooner than it is handed to another process.
SMALL = 64


@dataclass(frozen=True)
class Manifest:
    """What an image set holds and how it was made; stored in it as manifest.json, written last."""

    images: int
    channels: int
    recipe: dict[str, object]
    source: str  # the last part of the source's path
    source_key: str  # changes with the names and sizes of the source's files
    split: str | None
    skipped: list[list[str]]  # [name, reason] of every file that is no image of the set
    checksum: str  # SHA-256 over the lines "name crc32"
    crc32: dict[str, str]  # by name, eight hexadecimal digits
    versions: dict[str, str]
    format: str = field(default=f"{FORMAT} 1")


def prepare(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    resolution: int | None = None,
    fit: str = "crop",
    filter: str = "lanczos",
    format: str = "png",
    quality: int = 95,
    grey: bool | None = None,
    background: str = "white",
    split: str | None = None,
    hold_out: int | None = None,
    allow_bad: float = 0.01,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Makes the image set `dest` (a .zip, else a folder) from the folder, zip or tar `source`.

    `resolution` is the side in pixels, a power of two; None keeps the size of a published set that has
    one. See convert.Recipe for `fit`, `filter`, `format`, `quality` and `background`; `grey` stores one
    channel, by default where the source is a grey published set. Published sets (published.py) have their
    own splits, "train" is meant unless `split` is given; of other sources `split` takes "train" or "test"
    where `hold_out` pictures, the last by name, are the test split.

    Files that are no readable pictures are skipped, listed in the manifest and logged; more than the fraction
    `allow_bad` of them is an error. An interrupted run goes on where it stopped when called again; `dest`
    appears only when it is complete. A `dest` made from the same source by the same recipe is left as it is.

    Messages name options as the command line does (--allow-bad for `allow_bad`).
    Raises ValueError for options that are out of range, a source without pictures, too many bad files, and
    a `dest` that holds something else; OSError where the disk fails, naming what to do.
    """
    recipe = Recipe(resolution, fit, filter, format, quality, bool(grey), background)
    if not 0 <= allow_bad <= 1:
        raise ValueError(f"--allow-bad must lie in 0 ... 1, got {allow_bad}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    source, dest = Path(source), Path(dest)
    if source.resolve() in (dest.resolve(), *dest.resolve().parents):
        raise ValueError(f"{dest} lies inside its source {source}: name a place outside")
    pictures = open_source(source, split, hold_out, resolution)
    if grey is None:
        recipe = replace(recipe, grey=pictures.grey)
    job = {"recipe": asdict(recipe), "source_key": pictures.key, "split": pictures.split}
    if (finished := _finished(dest, job)) is not None:
        log.info("%s is there already, made from %s by the same recipe", dest, source.name)
        if pictures.changed > (dest / MANIFEST if dest.is_dir() else dest).stat().st_mtime:
            log.warning("files of %s were written after %s: delete it if they changed", source.name, dest)
        return finished
    with _workplace(dest, job | {"changed": pictures.changed}) as place:
        if (finished := _finished(dest, job)) is not None:  # by another process, in the meantime
            return finished
        writer = (ZipWriter if _is_zip_name(dest) else FolderWriter)(place / "images")
        try:
            skipped = _convert_all(pictures, writer, recipe, workers or cores(), progress)
            _check_skipped(skipped, pictures, allow_bad, source, place)
            manifest = _describe(writer.done, pictures, recipe, source, skipped)
            _write_lists(writer, pictures, recipe, manifest)
            writer.finish()
        except ChildProcessError as error:
            raise ChildProcessError(
                f"{error}: run the same command again with fewer --workers, it goes on from {place}"
            ) from None
        except OSError as error:
            kept = len(writer.done.keys() - {LABELS, MANIFEST})
            raise OSError(
                error.errno,
                f"{error.strerror} while writing to {place}, where {kept} finished images are kept: "
                f"make room and run the same command again, or delete that folder",
            ) from error
        finally:
            with contextlib.suppress(OSError):
                writer.close()
        os.rename(writer.path, dest)
    log.info("%s: %d images, %d files skipped", dest, manifest.images, len(skipped))
    return manifest


def check_set(path: str | os.PathLike, *, progress: bool = True) -> None:
    """Reads every image of a set, compares it with the manifest where there is one, and logs the verdict.

    Raises ValueError naming all that are damaged, and for what ImageSet refuses.
    """
    images = ImageSet(path, any_size=True, damaged=True)
    expected = (images.manifest or {}).get("crc32", {})
    damaged = []
    with progress_bar(len(images), "check", progress) as bar:
        for index, name in enumerate(images.names):
            try:
                images.decode(index)
                if expected and expected.get(name) != f"{zlib.crc32(images.read(index)):08x}":
                    damaged.append(f"{name} is not the file that was prepared")
            except ValueError as error:
                damaged.append(str(error).partition("; ")[0])  # without the advice that each of them has
            bar.update()
    if damaged:
        listed = "".join(f"\n  {problem}" for problem in damaged)
        raise ValueError(f"{len(damaged)} of {len(images)} images of {path} are damaged:{listed}")
    compared = "all as the manifest says" if expected else "there is no manifest to compare them with"
    log.info("%s: %d images, none damaged; %s", path, len(images), compared)


def _convert_all(
    pictures: Source, writer: FolderWriter | ZipWriter, recipe: Recipe, workers: int, progress: bool
) -> list[list[str]]:
    """Adds every picture that is missing to the writer; returns [name, reason] of what is no picture."""
    total = len(pictures.names)
    if pictures.size and max(pictures.size, recipe.resolution or 0) <= SMALL:
        workers = 1
    skipped = [[name, "not a picture"] for name in pictures.others]
    done = {i for i in range(total) if stored_name(i, recipe) in writer.done}
    enlarged = 0
    work = ((index, picture, recipe) for index, picture in pictures.items(done))
    with progress_bar(total, "prepare", progress, len(done)) as bar:
        for index, result in ordered(_convert_one, work, total - len(done), workers):
            if result.problem is None:
                writer.add(stored_name(index, recipe), result.data)
                enlarged += result.enlarged
            else:
                skipped.append([pictures.names[index], result.problem])
                log.warning("skipped %s: %s", pictures.names[index], result.problem)
            bar.update()
    if enlarged:
        log.warning("%d pictures were smaller than %d pixels and were enlarged", enlarged, recipe.resolution)
    return sorted(skipped)


def stored_name(index: int, recipe: Recipe) -> str:
    """The name of picture `index` inside a set, as StyleGAN's tools write it."""
    return f"{index // 1000:05d}/img{index:08d}{FORMATS[recipe.format]}"


def _convert_one(picture, recipe: Recipe) -> Converted:
    if isinstance(picture, OSError):
        return Converted(problem=picture.strerror or str(picture))  # without the path that str has
    return convert(picture, recipe)


def _check_skipped(skipped: list, pictures: Source, allow_bad: float, source: Path, place: Path) -> None:
    files = len(pictures.names) + len(pictures.others)
    if len(skipped) == files:
        raise ValueError(
            f"none of the {files} files in {source} is a readable picture, for example "
            f"{': '.join(skipped[0])}"
        )
    if len(skipped) > allow_bad * files:
        listed = "".join(f"\n  {name}: {reason}" for name, reason in skipped[:20])
        more = f"\n  and {len(skipped) - 20} more" if len(skipped) > 20 else ""
        raise ValueError(
            f"{len(skipped)} of {files} files in {source} ({len(skipped) / files:.1%}) are no readable "
            f"pictures, more than --allow-bad {allow_bad:g} allows; the others are kept in {place}, so the "
            f"same command with a larger --allow-bad finishes at once:{listed}{more}"
        )


def _describe(
    crc32: dict[str, int], pictures: Source, recipe: Recipe, source: Path, skipped: list
) -> Manifest:
    sums = {name: f"{crc32[name]:08x}" for name in sorted(crc32) if name not in (LABELS, MANIFEST)}
    lines = "".join(f"{name} {crc}\n" for name, crc in sums.items())
    return Manifest(
        images=len(sums),
        channels=1 if recipe.grey else 3,
        recipe=asdict(recipe),
        source=source.name or source.resolve().name,
        source_key=pictures.key,
        split=pictures.split,
        skipped=skipped,
        checksum=hashlib.sha256(lines.encode()).hexdigest(),
        crc32=sums,
        versions={"sivae-fast": version("sivae-fast"), "pillow": PIL.__version__},
    )


def _write_lists(
    writer: FolderWriter | ZipWriter, pictures: Source, recipe: Recipe, manifest: Manifest
) -> None:
    labels = [
        [stored_name(i, recipe), pictures.labels[name]]
        for i, name in enumerate(pictures.names)
        if name in pictures.labels and stored_name(i, recipe) in manifest.crc32
    ]
    if len(labels) == manifest.images:
        writer.add(LABELS, json.dumps({"labels": labels}).encode())
    elif labels:
        log.warning("labels left out: only %d of %d images have one", len(labels), manifest.images)
    writer.add(MANIFEST, json.dumps(asdict(manifest), indent=1).encode())


def _is_zip_name(dest: Path) -> bool:
    return dest.suffix.lower() == ".zip"


def _finished(dest: Path, job: dict) -> Manifest | None:
    """The manifest of `dest` where it is a finished set of this job, None where nothing is there."""
    if not dest.exists() or (dest.is_dir() and not _is_zip_name(dest) and not any(dest.iterdir())):
        return None
    with contextlib.suppress(ValueError):
        found = ImageSet(dest, any_size=True).manifest
        if found and all(found.get(k) == v for k, v in job.items()):
            return Manifest(**found)
    raise ValueError(
        f"{dest} exists and was not made from this source by this recipe: delete it or name another"
    )


@contextlib.contextmanager
def _workplace(dest: Path, job: dict) -> Iterator[Path]:
    """The folder DEST.partial, held by this process alone and emptied where it belongs to another job."""
    place = Path(f"{dest}.partial")
    make_folder(place)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(place, wait=False))
        except (BlockingIOError, FileNotFoundError):  # it writes, or has just cleared the folder away
            raise ValueError(f"another process is writing {dest} at this moment") from None
        state = place / "job.json"
        if not state.exists() or state.read_text() != json.dumps(job):
            shutil.rmtree(place / "images", ignore_errors=True)
            (place / "images").unlink(missing_ok=True)
            state.write_text(json.dumps(job))
        yield place
        shutil.rmtree(place)
