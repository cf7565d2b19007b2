"""The report of a CapFilt run: counts, histograms of scores, and pictures with their kept and dropped texts.

It is computed from the index of texts, one shard at a time. Only histograms and a few examples are in memory.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip_fast.capfilt.folder import OPTIONS, TEXTS, CleanFolder, Done
from blip_fast.data.shards.tars import LocalTar
from blip_fast.media.images import SUFFIXES, StoredImage
from blip_fast.report.page import Card, Line, Report
from blip_fast.report.plot import Bars

SHOWN = 12  # images per section
LINES = 6  # most texts per image
MANY_CUT = 0.05  # above this share of synthetic texts cut off, the page gives advice
ITM_BINS, ITC_BINS = np.linspace(0, 1, 11), np.linspace(-1, 1, 21)
ORIGINS = ("web", "synthetic")
SECTIONS = {
    "changed": ("Most changed captions",
                "No web text of these images was kept, a synthetic one was: those whose best kept text is "
                "ahead of the best web text by most."),
    "dropped": ("Dropped web texts", "Some images of which a web text was dropped, drawn at random."),
    "kept": ("Kept web texts", "Some images of which a web text was kept, drawn at random."),
}


@dataclass(frozen=True, order=True)
class Example:
    """An image to show. Examples with the lowest `rank` come first."""

    rank: float
    file: str
    key: str
    texts: list[dict[str, Any]] = field(compare=False)


@dataclass
class Summary:
    """Counts of texts and kept texts by origin and of synthetic texts cut off, histograms of scores, and
    examples for each section."""

    texts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ORIGINS, 0))
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ORIGINS, 0))
    cut: int = 0
    itm: dict[str, NDArray[Any]] = field(
        default_factory=lambda: {o: np.zeros(len(ITM_BINS) - 1, int) for o in ORIGINS})
    itc: dict[str, NDArray[Any]] = field(
        default_factory=lambda: {o: np.zeros(len(ITC_BINS) - 1, int) for o in ORIGINS})
    examples: dict[str, list[Example]] = field(default_factory=lambda: {name: [] for name in SECTIONS})

    def add(self, path: Path, number: int) -> None:
        """Count the texts of shard `number`, whose index is at `path`. The number seeds the choice of
        examples."""
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

        table = parquet.read_table(path)
        if not len(table):
            return
        columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
        self.cut += int(columns["cut"].sum())
        for origin in ORIGINS:
            mine = columns["origin"] == origin
            self.texts[origin] += int(mine.sum())
            self.kept[origin] += int((mine & columns["kept"]).sum())
            self.itm[origin] += np.histogram(columns["itm"][mine].clip(0, 1), ITM_BINS)[0]
            self.itc[origin] += np.histogram(columns["itc"][mine].clip(-1, 1), ITC_BINS)[0]
        self._choose_examples(columns, np.random.default_rng(number))

    def _choose_examples(self, columns: dict[str, NDArray[Any]], rng: np.random.Generator) -> None:
        key, web, kept = columns["key"], columns["origin"] == "web", columns["kept"].astype(bool)
        starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
        ends = np.append(starts[1:], len(key))

        def best(which: NDArray[np.bool_]) -> NDArray[np.float64]:
            """The highest ITM probability of each image's texts in `which`; −1 if it has none."""
            return np.maximum.reduceat(np.where(which, columns["itm"], -1.0), starts)

        drawn, best_web, best_made = rng.random(len(starts)), best(web), best(~web & kept)
        ranks = {
            "changed": np.where((best_web >= 0) & (best(web & kept) < 0) & (best_made >= 0),
                                best_web - best_made, 1.0),
            "dropped": np.where(best(web & ~kept) >= 0, drawn, 1.0),
            "kept": np.where(best(web & kept) >= 0, drawn, 1.0),
        }  # 1 and above: not shown
        for name, rank in ranks.items():
            chosen = [image for image in np.argsort(rank, kind="stable")[:SHOWN].tolist() if rank[image] < 1]
            found = [(float(rank[image]), [{name: values[i] for name, values in columns.items()}
                                           for i in range(starts[image], ends[image])]) for image in chosen]
            self.examples[name] = heapq.nsmallest(SHOWN, [*self.examples[name], *(
                Example(rank, texts[0]["file"], texts[0]["key"], texts) for rank, texts in found)])


def write_report(folder: CleanFolder, every: Sequence[Done]) -> tuple[dict[str, int], Path]:
    """Write `report.html` for a finished run. Returns the run's counts and the page's path."""
    summary, directory = Summary(), folder.directory
    for number in range(len(every)):
        summary.add(directory / TEXTS / f"{number:06d}.parquet", number)
    shards = [shard for done in every for shard in (done.kept, done.dropped) if shard is not None]
    counts = {"images": sum(shard.samples for shard in shards),
              "images_kept": sum(done.kept.samples for done in every if done.kept is not None),
              **{name: summary.texts[name] for name in ORIGINS},
              **{f"{name}_kept": summary.kept[name] for name in ORIGINS},
              "synthetic_cut": summary.cut,
              "refused": sum(len(done.refused) for done in every)}
    options = json.loads((directory / OPTIONS).read_bytes())
    report = _page(counts, summary, options)
    for name, (heading, text) in SECTIONS.items():
        if examples := summary.examples[name]:
            (report.section(heading, f"{text} Dropped texts are struck through.")
             .cards(_cards(examples, directory)))
    refused = [refused for done in every for refused in done.refused]
    if refused:
        report.section("Images left out", f"{len(refused):,} in all; quarantine.jsonl names each of them.")
        report.table(["Image", "Reason"], [[_printable(each.image), _printable(each.reason)]
                                           for each in refused[:SHOWN]])
    return counts, report.write(directory / "report.html")


def _page(counts: dict[str, int], summary: Summary, options: dict[str, Any]) -> Report:
    generation = options["generation"]
    how = (f"nucleus sampling, p = {generation['top_p']}" if generation["top_p"] is not None
           else f"beam search, {generation['beams']} beams")
    report = Report("CapFilt", "A captioner wrote texts for web images, a filter kept those that match.",
                    facts={"captioner": options["captioner"], "filter": options["filter"], "captions by": how,
                           "seed": str(generation["seed"]), "threshold": str(options["threshold"]),
                           "kept": "each image's best" if options["keep"] == "best" else "all that match"})
    rows = [[origin, counts[origin], counts[f"{origin}_kept"], counts[origin] - counts[f"{origin}_kept"],
             f"{counts[f'{origin}_kept'] / max(1, counts[origin]):.1%}"] for origin in ORIGINS]
    report.section("Counts").table(["Texts", "all", "kept", "dropped", "share kept"], rows)
    report.table(["Images", ""], [["read", counts["images"]], ["with a kept text", counts["images_kept"]],
                                  ["without", counts["images"] - counts["images_kept"]],
                                  ["left out", counts["refused"]]])
    _add_lengths(report, counts, generation["max_length"])
    report.section("Scores", "How many texts of each origin lie in which range.")
    return report.plots([_histogram("ITM: probability that they match", summary.itm, ITM_BINS),
                         _histogram("ITC: cosine", summary.itc, ITC_BINS)])


def _add_lengths(report: Report, counts: dict[str, int], max_length: int) -> None:
    cut, share = counts["synthetic_cut"], share_cut(counts)
    note = (f"{share:.1%} of the synthetic texts were cut off in the middle by the maximum of {max_length} "
            "tokens (the first one and the prompt counted), and texts for training should be whole: "
            "raise --max-length and run again."
            if share > MANY_CUT else f"At most {max_length} tokens, the first one and the prompt counted.")
    rows = [["came to their end", counts["synthetic"] - cut, f"{1 - share:.1%}"],
            ["were cut off", cut, f"{share:.1%}"]]
    report.section("Lengths of synthetic texts", note).table(["Synthetic texts", "", "share"], rows)


def share_cut(counts: dict[str, int]) -> float:
    """The share of a run's synthetic texts that were cut off, 0 to 1. `counts` are those returned by
    `write_report`."""
    return counts["synthetic_cut"] / max(1, counts["synthetic"])


def _histogram(title: str, counts: dict[str, NDArray[Any]], bins: NDArray[Any]) -> Bars:
    """Bars of a histogram, without the empty ranges at both ends."""
    filled = np.flatnonzero(sum(counts.values()))
    shown = range(filled[0], filled[-1] + 1) if len(filled) else range(1)
    groups = {f"{bins[i]:.1f} to {bins[i + 1]:.1f}": {name: float(each[i]) for name, each in counts.items()}
              for i in shown}
    return Bars(title, groups, unit="texts")


def _cards(examples: Sequence[Example], directory: Path) -> list[Card]:
    pictures = _pictures(examples, directory)
    return [Card(pictures[example.file, example.key],
                 [Line(text["text"], text["origin"], f"ITM {text['itm']:.2f} · ITC {text['itc']:.2f}",
                       struck=not text["kept"]) for text in example.texts[:LINES]],
                 alt=example.texts[0]["image"])
            for example in examples]


def _pictures(examples: Iterable[Example], directory: Path) -> dict[tuple[str, str], StoredImage]:
    wanted: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        wanted[example.file].add(example.key)
    return {(file, sample.key): member for file, keys in wanted.items()
            for sample in LocalTar(directory / file).samples() if sample.key in keys
            for member in sample.members.values() if Path(member.name).suffix in SUFFIXES}


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
