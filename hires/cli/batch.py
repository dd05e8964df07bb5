"""Several pictures of one `hires render`: their files, which of them are finished already, and drawing them on one engine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hires.cli.display import in_flags, numbered, progress_display, summary
from hires.errors import Cancelled, HiresError, OutputError, RequestError
from hires.options.declarations import LoadOptions
from hires.options.fields import declared
from hires.options.render import RenderOptions

if TYPE_CHECKING:
    from hires.engine.job import RenderJob
    from hires.engine.results import RenderResult

SLUG_BYTES = 60
"""The longest part of a file's name that is made of a prompt; with a seed and a journal's ending it fits any file system."""
DEFAULT_SUFFIX = ".png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture of several."""

    prompt: str
    seed: int
    path: Path
    """Its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where several pictures go: into files of a folder, or into files whose name gets numbers."""

    path: Path
    is_folder: bool
    suffix: str | None = None
    """The ending of files in a folder; None for PNG."""

    @staticmethod
    def of(output: str, suffix: str | None) -> Place:
        """A folder is one that is there, or a name without an ending.

        RequestError for a suffix that is no ending, or that is given with a file.
        """
        from hires.engine.output import path_of

        path = path_of(output)
        is_folder = output.endswith(("/", os.sep)) or not path.suffix or os.path.isdir(path)  # noqa: PTH112  never an OSError
        if suffix is not None and not is_folder:
            raise RequestError(f"suffix {suffix}: applies to the files of a folder; give the name's own ending with `output`")
        if suffix is not None and not re.fullmatch(r"\.\w+", suffix):
            raise RequestError(f"suffix {suffix}: give an ending such as .tif")
        return Place(path=path, is_folder=is_folder, suffix=suffix)

    def numbered(self, number: int) -> Path:
        """The file with a number before its ending."""
        return self.path.with_name(f"{self.path.stem}-{number}{self.path.suffix}")


def pictures_of(prompts: Sequence[str], seeds: Sequence[int], place: Place) -> list[Picture]:
    """Every prompt with every seed, and the files that they go into. RequestError for a prompt that is given twice."""
    again = next((prompt for prompt, times in Counter(prompts).items() if times > 1), None)
    if again is not None:
        raise RequestError(f"PROMPT {again[:80]!r}: is given more than once; give it once, and `count` for more seeds")
    asked = [(prompt, seed) for prompt in prompts for seed in seeds]
    if place.is_folder:
        stems, ending = slugs(prompts), place.suffix or DEFAULT_SUFFIX
        files = [place.path / f"{stems[prompt]}-{seed}{ending}" for prompt, seed in asked]
    else:
        files = [place.numbered(number) for number in range(1, len(asked) + 1)]
    return [Picture(prompt=prompt, seed=seed, path=file) for (prompt, seed), file in zip(asked, files, strict=True)]


def slugs(prompts: Sequence[str]) -> dict[str, str]:
    """A part of a file's name for each prompt; those that would get the same one are told apart by a digest of the prompt."""
    plain = {prompt: slug(prompt) for prompt in prompts}
    shared = Counter(plain.values())
    return {prompt: name if shared[name] == 1 else f"{name}-{_digest(prompt)}" for prompt, name in plain.items()}


def slug(prompt: str) -> str:
    """Its letters and digits, of any script, in small letters with hyphens between words: 'a red disk, 4K' as a-red-disk-4k."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    name = ""
    for word in words:
        longer = f"{name}-{word}" if name else word
        if len(longer.encode()) > SLUG_BYTES:
            break
        name = longer
    return name or _cut(words[0] if words else "picture")


def _cut(word: str) -> str:
    return word.encode()[:SLUG_BYTES].decode(errors="ignore")


def _digest(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(errors="surrogatepass"), digest_size=4).hexdigest()


@dataclass(slots=True, kw_only=True)
class Report:
    """What several pictures came to, as far as they are known."""

    options: Sequence[type]
    """The declarations whose flags errors name."""
    as_json: bool
    quiet: bool
    total: int = 0
    """How many were asked for; 0 until all of them are checked."""
    done: list[RenderResult] = field(default_factory=list)
    skipped: list[Picture] = field(default_factory=list)
    """Those that an earlier run finished."""
    failed: list[tuple[Picture, str]] = field(default_factory=list)
    """Those that could not be drawn, each with its error."""

    def begin(self, batch: Batch) -> None:
        """Tell how many pictures there are, and which of them are skipped."""
        self.total, self.skipped = len(batch.pictures), [batch.pictures[index] for index in sorted(batch.finished)]
        if not self.quiet:
            first, last = batch.pictures[0].path, batch.pictures[-1].path
            several = f"{self.total} pictures: {first} to {last.name}"
            print(several if self.total > 1 else f"1 picture: {first}", file=sys.stderr)
        for picture in self.skipped:
            print(f"skipped {picture.path}: an earlier run finished it (--overwrite draws it again)", file=sys.stderr)

    def add(self, result: RenderResult) -> None:
        """Tell of a picture that is finished."""
        self.done.append(result)
        if not (self.as_json or self.quiet):
            print(summary(result), flush=True)

    def fail(self, picture: Picture, error: HiresError) -> None:
        """Tell of a picture that could not be drawn."""
        self.failed.append((picture, in_flags(str(error), self.options)))
        print(f"failed {picture.path}: {self.failed[-1][1]}", file=sys.stderr)

    def end(self) -> None:
        """What is printed on stdout in the end; nothing where no picture was begun."""
        if self.total and self.as_json:
            print(json.dumps(self.to_json(), default=str))
        elif self.total and not self.quiet:
            print(f"{len(self.done)} of {self.total} rendered, {len(self.skipped)} skipped, {len(self.failed)} failed")

    def to_json(self) -> dict[str, object]:
        """The results, the files that were skipped, and those that failed."""
        return {
            "done": [result.to_json() for result in self.done],
            "skipped": [_named(picture) | {"reason": "finished by an earlier run"} for picture in self.skipped],
            "failed": [_named(picture) | {"error": error} for picture, error in self.failed],
        }


def _named(picture: Picture) -> dict[str, object]:
    return {"file": str(picture.path), "prompt": picture.prompt, "seed": picture.seed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Pictures whose jobs are all checked."""

    pictures: tuple[Picture, ...]
    jobs: tuple[RenderJob, ...]
    """The job of each picture."""
    finished: frozenset[int]
    """The indices of those that an earlier run finished."""

    def pending(self) -> Iterator[tuple[int, Picture, RenderJob]]:
        """Index, picture and job of those that are to be drawn; each job knows which prompts come after it."""
        from hires.engine.requests import encoded_ahead
        from hires.engine.resident import ENCODED_AHEAD

        left = [index for index in range(len(self.jobs)) if index not in self.finished]
        requests = {self.pictures[index].prompt: self.jobs[index].request for index in reversed(left)}
        prompts = [*dict.fromkeys(self.pictures[index].prompt for index in left)]
        for index in left:
            picture, job = self.pictures[index], self.jobs[index]
            after = prompts.index(picture.prompt) + 1
            later = [requests[prompt] for prompt in prompts[after : after + ENCODED_AHEAD - 1]]
            following = encoded_ahead(job.request, later)
            yield index, picture, replace(job, following=following)


def checked(pictures: Sequence[Picture], options: RenderOptions, place: Place) -> Batch:
    """The jobs of pictures, with everything checked that can be before the first is drawn; then the folder is made.

    RequestError for what no picture can be drawn with; OutputError for a file that is in the way and is not the picture itself.
    """
    from hires.engine.engine import check_runs, render_job
    from hires.images.atomic_file import check_folder, make_folder

    first = render_job(pictures[0].prompt, replace(options, output=None))
    jobs = [*_jobs(first, pictures, options)]
    to_be_made = place.is_folder and not check_folder(place.path).exists()
    finished = [] if to_be_made else [index for index, job in enumerate(jobs) if _is_finished(job)]
    jobs = _with_journals(jobs, finished)
    if len(finished) < len(jobs):
        check_runs(first)
    if to_be_made:
        make_folder(place.path)
    return Batch(pictures=tuple(pictures), jobs=tuple(jobs), finished=frozenset(finished))


def _jobs(first: RenderJob, pictures: Sequence[Picture], options: RenderOptions) -> Iterator[RenderJob]:
    """The job of each picture: as the first one's, but for the prompt, the seed and the file.

    OutputError for a format that cannot hold the picture; RequestError where another request's unfinished render is there.
    """
    from hires.engine.output import Delivery
    from hires.engine.requests import with_captions
    from hires.images.formats import check_fits
    from hires.resume.fingerprint import describe_request, mark_of
    from hires.resume.journal import check_unfinished

    images, bits = first.images, first.output.bits
    described = describe_request(with_captions(first.request), first.spec, (images.init, images.edges, images.mask))
    for picture in pictures:
        check_fits(picture.path, first.request.size, dtype=f"uint{bits}")
        request = replace(first.request, prompt=picture.prompt, seed=picture.seed)
        own = {"prompt": with_captions(request).prompt, "seed": request.seed}
        asked = described | {"request": described["request"] | own}
        if first.journal is not None and not first.journal.restart:
            check_unfinished(picture.path, asked)
        mark = mark_of(asked, first.spec, bits)
        yield replace(first, request=request, output=Delivery(picture.path, options.overwrite, bits, mark))


def _is_finished(job: RenderJob) -> bool:
    """Whether the file of a job is there as an earlier run finished it. OutputError for another file in the way."""
    from hires.engine.output import is_marked
    from hires.images.formats import check_output

    output, path = job.output, job.output.path
    assert path is not None, "each of several pictures has a file"
    if os.path.isfile(path) and not output.overwrite:  # noqa: PTH113  a name that is too long is told below
        if is_marked(path, output.mark, job.request.size):
            return True
        raise OutputError(f"output {path}: exists already, and is another picture than this; give `overwrite` or another name")
    check_output(path, output.overwrite)
    return False


def _with_journals(jobs: Sequence[RenderJob], finished: Sequence[int]) -> list[RenderJob]:
    """The jobs with their journals: `resume` asks for one picture at least that an earlier run finished or began."""
    from hires.resume.journal import folder_of

    journal, paths = jobs[0].journal, [job.output.path for job in jobs]
    if journal is None or not journal.resume:
        return [*jobs]
    if not finished and not any(path is not None and folder_of(path).exists() for path in paths):
        raise RequestError(f"resume: nothing of {paths[0]} and those after it was begun; leave `resume` out to begin")
    return [replace(job, journal=replace(journal, resume=False)) for job in jobs]


def draw(batch: Batch, options: RenderOptions, report: Report, preview: Path | None) -> None:
    """Draw what is not finished, one picture after the other, on one engine that loads its weights once.

    A picture that fails is told and the next one drawn; RequestError where that is the first, for nothing is lost then.
    """
    from hires.engine.resident import load

    shared = declared(LoadOptions).keys() & declared(RenderOptions).keys()
    with load(**{name: getattr(options, name) for name in shared}) as engine:
        for index, picture, job in batch.pending():
            try:
                with progress_display(shown=not report.quiet, preview=preview) as on_event:
                    listener = numbered(on_event, index + 1, len(batch.jobs))
                    result = engine.carry_out(replace(job, on_event=listener))
            except Cancelled:
                raise
            except HiresError as error:
                if isinstance(error, RequestError) and not (report.done or report.failed):
                    raise
                report.fail(picture, error)
            else:
                report.add(result)
