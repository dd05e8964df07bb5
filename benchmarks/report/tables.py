"""The tables of the README and of docs/, each from the rows of its suite."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, decibels, read_rows
from benchmarks.rows import newest
from benchmarks.suites import demo as bench_demo
from benchmarks.suites import engine as bench_engine
from benchmarks.suites import peers as bench_peers
from benchmarks.suites import scaling as bench_scaling
from benchmarks.suites import scenes as bench_scenes
from benchmarks.suites import strategies as bench_strategies
from benchmarks.suites import waterfall as bench_waterfall
from hires.checkpoints.few_step.profiles import PROFILES
from hires.options.table import option_table

Rows = Sequence[Mapping[str, str]]
FAMILY_NAMES = {"cosxl": "CosXL", "pixart-sigma-1024": "PixArt-Σ 1024", "pixart-sigma-2k": "PixArt-Σ 2K"}
WRITTEN = {".png": "PNG", ".tif": "BigTIFF with pyramid"}


def rows_of(name: str, folder: Path = RESULTS) -> list[dict[str, str]]:
    """The rows of a suite's file. FileNotFoundError says which command makes them."""
    found = read_rows(folder / f"{name}.csv")
    if not found:
        raise FileNotFoundError(f"no rows yet: python -m benchmarks {name.replace('_', ' ')}")
    return found


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in body)])


def plans() -> str:
    """What `hires plan` says of CosXL on cards that are not here: a square picture, its peak and seconds."""
    from benchmarks.full_size import full_spec
    from hires.devices import machines
    from hires.options.render import RenderRequest
    from hires.planning import planner
    from hires.tiling.geometry import Size
    from hires.units import gib, parse_bytes

    spec, budgets, body = full_spec("cosxl"), ("8GB", "12GB", "24GB"), []
    for side in (2048, 4096, 8192):
        request = RenderRequest(prompt="", size=Size(side, side))
        made = [planner.plan(request, spec, machines.described_card(parse_bytes(budget))) for budget in budgets]
        tiles = [" in tiles" if plan.stages[-1].grid.count > 1 else "" for plan in made]
        said = zip(made, tiles, strict=True)
        cells = [f"{gib(plan.peak_bytes)}, {plan.seconds:.0f} s{t}, decoded by `{plan.decode.policy}`" for plan, t in said]
        body.append([f"{side}²", *cells])
    return markdown(["CosXL", *(budget.replace("GB", " GB") for budget in budgets)], body)


def demo() -> str:
    """`make demo` beside earlier versions."""
    return bench_demo.table(newest(rows_of("demo"), bench_demo.SUITE.key))


def engine(part: str) -> Callable[[], str]:
    """One part of what an engine that stays is worth."""

    def table() -> str:
        rows = [row for row in newest(rows_of("engine"), bench_engine.SUITE.key) if row["part"] == part]
        if not rows:
            raise FileNotFoundError(f"no rows yet: python -m benchmarks engine --parts {part}")
        return bench_engine.TABLES[part](rows)

    return table


def hotspots() -> str:
    """The costliest operators of the newest render, with their distance to the floor."""
    rows = rows_of("hotspots")
    body = []
    for row in newest([row for row in rows if row["side"] == rows[-1]["side"]], ("place",)):
        over = f"{float(row['over_floor']):.1f}" if row["over_floor"] else ""
        body.append([f"`{row['operator']}`", row["shapes"], row["calls"], f"{float(row['share']):.1%}", over])
    return markdown(("operator", "shapes", "calls", "share", "times its floor"), body)


def choices() -> str:
    """How much a choice changes the picture."""
    rows = newest(rows_of("choices"), ("choice", "size"))
    body = [[row["choice"], row["largest"], decibels(row["psnr_db"])] for row in rows]
    return markdown(("against the default", "largest difference", "PSNR"), body)


def weights() -> str:
    """Weights in 8 and 4 bits against float32: the picture, the bytes, and the errors of single layers."""
    layers, body = newest(rows_of("weights_layers"), ("layer",)), []
    for row in newest(rows_of("weights"), ("weights", "side")):
        name, cells = row["weights"], ["", "", ""]
        if row["median_weight_error"]:
            cells = [f"{float(row[f'{which}_weight_error']):.2%}" for which in ("median", "worst")]
            found = [float(layer[f"{name}_output_error"]) for layer in layers if layer["layer"].startswith("network")]
            cells.append(f"{statistics.median(found):.2%}, {max(found):.2%}")
        held, planned = (f"{int(row[which]) / 1e6:.1f}" for which in ("held_bytes", "planned_bytes"))
        body.append([f"`{name}`", decibels(row["psnr_db"]), held, planned, *cells, row["peak_mib"], row["seconds"]])
    head = ("weights", "PSNR", "MB in memory", "MB planned", "a weight, median", "a weight, worst",
            "a layer's output, median and worst", "peak MiB", "s")  # fmt: skip
    return markdown(head, body)


def full_size_weights() -> str:
    """What plans say that full-size networks and the VAE take in each storage, in bf16 where they are not packed."""
    from benchmarks.full_size import full_spec
    from hires.options.declarations import WEIGHTS
    from hires.planning.costs.weights import storage_of, stored_bytes

    body = []
    for family in ("cosxl", "pixart-sigma-1024"):
        spec = full_spec(family)
        sizes = [
            sum(
                stored_bytes(count, storage_of(storage, part), 2)
                for part, count in (("network", spec.network_count), ("vae", spec.vae_count))
            )
            for storage in (None, *WEIGHTS)
        ]
        body.append([FAMILY_NAMES[family], *(f"{size / 1e9:.2f}" for size in sizes)])
    return markdown(("network and VAE, GB", "bf16", *(f"`{name}`" for name in WEIGHTS)), body)


def presets() -> str:
    """PFLOP of every preset, and the stages of `balanced` at 4096 px."""
    rows = newest(rows_of("presets"), ("family", "preset", "side"))
    at = {(row["family"], row["preset"], int(row["side"])): row for row in rows}
    sides, body = sorted({side for _, _, side in at}), []
    for family, preset in dict.fromkeys((row["family"], row["preset"]) for row in rows):
        numbers = [f"{float(at[family, preset, side]['counted_pflop']):.2f}" for side in sides]
        said = at[family, preset, 4096]["stages"] if preset == "balanced" else ""
        body.append([f"{FAMILY_NAMES[family]}, `{preset}`", *numbers, said])
    return markdown(["PFLOP on 24 GB", *(f"{side}²" for side in sides), "stages of `balanced` at 4096²"], body)


SCENES = (
    "strategy", "size", "pictures", "one disk, right third", "disks drawn, mean", "seam, max", "bands, p", "detail ÷ Lanczos",
    "detail ÷ truth", "texture ÷ truth, median", "sky detail ÷ truth, max", "s, median", "GiB, max",
)  # fmt: skip


def scenes() -> str:
    """Held-out captions by every strategy and size."""
    rows = newest(rows_of("scenes"), ("strategy", "side", "seed"))
    order = ("progressive", "tiled", "direct")
    keys = sorted({(order.index(row["strategy"]), int(row["side"])) for row in rows})
    return markdown(SCENES, [scene_line([r for r in rows if (r["strategy"], int(r["side"])) == (order[at], side)])
                             for at, side in keys])  # fmt: skip


def scene_line(part: Rows) -> list[str]:
    def values(name: str) -> list[float]:
        return [float(row[name]) for row in part]

    def span(name: str, digits: int) -> str:
        ends = [f"{end:.{digits}f}" for end in (min(values(name)), max(values(name)))]
        return ends[0] if ends[0] == ends[1] else "–".join(ends)

    summed = bench_scenes.summary([dict(row) for row in part])[0]
    right = sum(int(row["one_disk_right_third"]) for row in part)
    return [
        part[0]["strategy"],
        f"{part[0]['side']}²",
        str(len(part)),
        str(right),
        f"{summed['mean_disks']:.1f}",
        f"{max(values('seam_over_control')):.2f}",
        f"{summed['band_p_value_mean']:.2f}",
        span("energy_over_lanczos", 0),
        span("energy_over_truth", 2),
        f"{summed['texture_over_truth_median']:.2f}",
        f"{max(values('sky_energy_over_truth')):.2f}",
        f"{statistics.median(values('seconds')):.0f}",
        f"{max(values('peak_rss_gib')):.2f}",
    ]


ORACLE = {
    "duplicates": "duplicates", "seam_ratio": "seam ratio", "drift": "drift", "detail": "added detail", "windows": "windows",
    "seconds_p50": "s (p50)",
}  # fmt: skip


def oracle_rows() -> list[dict[str, str]]:
    """The strategies at four times the oracle's window."""
    return [row for row in bench_strategies.newest(rows_of("strategies")) if (row["model"], row["side"]) == ("oracle", "256")]


def oracle() -> str:
    body = []
    for row in oracle_rows():
        name = row["strategy"] + (f" from sigma {float(row['relay_sigma']):g}" if row["relay_sigma"] else "")
        body.append([name, *(f"{float(row[column]):.4g}" for column in ORACLE)])
    return markdown(("strategy", *ORACLE.values()), body)


def strategies() -> str:
    """The strategies on the shipped model's scenes, a table per size."""
    rows = [row for row in bench_strategies.newest(rows_of("strategies")) if row["model"] == "scenes"]
    text = bench_strategies.table(rows).strip()
    return "\n".join(f"*{line}*" if line.startswith("scenes,") else line for line in text.splitlines())


def guides() -> str:
    """Low-passes and ramps of structure guidance on the oracle."""
    rows = newest(rows_of("guides"), ("low_pass", "ramp", "side", "relay_sigma"))
    body = [[r["low_pass"], r["ramp"], r["duplicates"], r["seam_ratio"], r["drift"], r["detail"]] for r in rows]
    return markdown(("low-pass", "ramp", "duplicates", "seam ratio", "drift", "added detail"), body)


def planner_ratios() -> str:
    """How predicted bytes compare with allocated ones, per model."""
    rows = newest(rows_of("planner"), ("model", "size", "batch", "policy", "dtype"))
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        ratios = [float(row["ratio"]) for row in rows if row["model"] == model]
        spread = (min(ratios), statistics.median(ratios), max(ratios))
        body.append([model, str(len(ratios)), *(f"{ratio:.3f}" for ratio in spread)])
    return markdown(("model", "cases", "least predicted ÷ allocated", "median", "most"), body)


def autoencoder() -> str:
    """Every storage policy of the full SDXL autoencoder beside diffusers' tiling."""
    rows = newest(rows_of("vae"), ("side", "way", "against"))
    body = []
    for row in rows:
        same = "equal" if row["psnr_db"] == "inf" else f"{row['psnr_db']} dB"
        predicted = row["predicted_mib"] if float(row["predicted_mib"]) else ""
        numbers = f"{float(row['seconds']):.1f}", row["peak_mib"], predicted, row["gflop"], same
        small = row["way"] == "diffusers tiling" and row["side"] == "1024x1024"
        way = row["way"] + (" told to take tiles of 512 px" if small else "")  # by default it does not tile up to 1024 px
        body.append([way, row["side"], *numbers, f"{float(row['seam_over_control']):.2f}", row["against"]])
    return markdown(("way", "px", "s", "MiB", "MiB predicted", "GFLOP", "PSNR", "seam", "against"), body)


def upscale_quality() -> str:
    """Networks whole and in tiles, beside bicubic and Lanczos."""
    rows = newest(rows_of("upscale_quality"), ("upscaler", "way"))
    body = []
    for name in dict.fromkeys(row["upscaler"] for row in rows):
        own = [row for row in rows if row["upscaler"] == name]
        whole, tiled = own[0], own[1:]
        label = {"bicubic": "bicubic", "lanczos": "Lanczos"}.get(name) or upscaler_label(name, tiled[0])
        decibels = [f"{float(row['y_psnr_db']):.2f}" for row in tiled]
        said = f"{', '.join(decibels)} dB" if decibels else ""
        body.append([label, f"{float(whole['y_psnr_db']):.2f} dB", said])
    tiles = sorted({int(row["way"].split()[1]) for row in rows if row["way"].startswith("tile")})
    return markdown(("", "whole", f"tiles of {', '.join(map(str, tiles))} px"), body)


def upscaler_label(name: str, tiled: Mapping[str, str]) -> str:
    known = {"RealESRGAN_General_x4_v3.safetensors": "RealESRGAN General x4 v3", "craft_x4.pth": "CRAFT x4"}
    kind = "exact" if tiled["exact"] == "1" else "approximation"
    return f"{known.get(name, name)}, halo {tiled['halo_px']} px, {kind}"


def upscale_memory() -> str:
    """Peak memory of enlarging into a file."""
    rows = newest(rows_of("upscale_memory"), ("upscaler", "format", "bits", "size"))
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    at = {(row["format"], row["bits"], row["size"]): f"{float(row['peak_rss_gib']):.2f} GiB" for row in rows}
    kinds = dict.fromkeys((row["format"], row["bits"]) for row in rows)
    body = [[f"{WRITTEN[form]}, {bits} bits", *(at[form, bits, size] for size in sizes)] for form, bits in kinds]
    return markdown(("", *(size.replace("x", "×") for size in sizes)), body)


def upscale_refine() -> str:
    """What refinement adds to Lanczos and how far it moves the picture."""
    rows = newest(rows_of("upscale_refine"), ("scene", "strength"))
    body = []
    for strength in dict.fromkeys(row["strength"] for row in rows):
        own = [row for row in rows if row["strength"] == strength]
        spans = [(min(v), max(v)) for v in ([float(r[n]) for r in own] for n in ("energy_over_lanczos", "truth_over_lanczos"))]
        moved = max(float(row["worst_tile_de2000"]) for row in own)
        body.append([strength, str(len(own)), *(f"{low:.0f}–{high:.0f}" for low, high in spans), f"{moved:.2f}"])
    return markdown(("strength", "scenes", "energy ÷ Lanczos", "of the truth", "worst tile, CIEDE2000"), body)


def waterfall() -> str:
    return bench_waterfall.table(newest(rows_of("waterfall"), bench_waterfall.SUITE.key))


def scaling() -> str:
    return bench_scaling.table(newest(rows_of("scaling"), bench_scaling.SUITE.key))


def peers(*parts: str) -> Callable[[], str]:
    """Some parts of the peers, or all."""

    def table() -> str:
        rows = newest(rows_of("peers"), bench_peers.SUITE.key)
        return bench_peers.table([row for row in rows if not parts or row["part"] in parts])

    return table


def profiles() -> str:
    """The few-step profiles: names, how each is run, and on which families."""
    lines = [
        "| `--few-step` | what it is | told by names such as | steps | CFG | sampler, schedule | px | models |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for profile in PROFILES.values():
        run, names = profile.defaults, ", ".join(f"`{name}`" for name in profile.names)
        advised = f" ({min(profile.own_steps)}–{max(profile.own_steps)})" if len(profile.own_steps) > 1 else ""
        most = f" (to {profile.guidance_up_to:g})" if profile.guidance_up_to > run.guidance else ""
        side = profile.native_px or "the model's"
        bases = ", ".join(profile.bases)
        lines.append(
            f"| `{profile.name}` | {profile.title} | {names} | {run.steps}{advised} | {run.guidance:g}{most} | "
            f"{run.sampler}, {run.schedule} | {side} | {bases} |"
        )
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "options": option_table,
    "profiles": profiles,
    "plans": plans,
    "presets": presets,
    "choices": choices,
    "weights": weights,
    "weights-full-size": full_size_weights,
    "scenes": scenes,
    "oracle": oracle,
    "strategies": strategies,
    "guides": guides,
    "planner": planner_ratios,
    "vae": autoencoder,
    "upscale-quality": upscale_quality,
    "upscale-memory": upscale_memory,
    "upscale-refine": upscale_refine,
    "waterfall": waterfall,
    "demo": demo,
    "engine-eta": engine("eta"),
    "engine-many": engine("many"),
    "engine-start": engine("start"),
    "hotspots": hotspots,
    "scaling": scaling,
    "peers": peers(),
    "peers-vae": peers("vae", "vae, two pictures", "small vae"),
}
