"""`python -m benchmarks weights`: what weights in 8 and 4 bits cost in pictures, and what they save in bytes.

    python -m benchmarks weights                  # the shipped model at 1024 px against float32, all layers
    python -m benchmarks weights --layers         # the relative error of every layer's output in one evaluation, printed

Rows go to results/weights.csv (by storage) and results/weights_layers.csv (by layer). `output_error` is the relative error
of a layer's output where the whole network is packed, so it holds what came from the layers before. Exit code 1 where a picture
is below 35 dB, or a plan's bytes are further than a twentieth from those in memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hires
from benchmarks.common import EQUAL_DB, append_row, stamp
from benchmarks.rows import timed
from hires.checkpoints.spec import load_spec
from hires.models.loading import load_network, load_vae
from hires.models.storage.layers import packing_errors, relative_error
from hires.options.declarations import WEIGHTS
from hires.planning.costs.weights import storage_of

PROMPT, SEED = "a red circle on a blue ground", 3
LEAST_DB, AGREE = 35.0, 0.05
CPU = torch.device("cpu")


def psnr(found: Any, exact: Any) -> float:
    """Decibels between two pictures of 8 bits."""
    error = float(np.mean((np.asarray(found, dtype=np.float64) - np.asarray(exact, dtype=np.float64)) ** 2))
    return EQUAL_DB if not error else 10 * np.log10(255**2 / error)


def pictures(side: int) -> list[dict[str, Any]]:
    """A row for float32 and one for every storage; the first render of the process is not counted."""
    size, exact, rows = f"{side}x{side}", None, []
    hires.render(PROMPT, size="256x256", steps=1, dtype="fp32")
    for weights in (None, *WEIGHTS):

        def run(weights: str | None = weights) -> Any:
            return hires.render(PROMPT, size=size, seed=SEED, dtype="fp32", weights=weights)

        result, taken = timed(run, 1)
        pixels = np.asarray(result.image)
        exact = pixels if exact is None else exact
        held = sum(held_bytes(weights).values())
        rows.append({
            "weights": weights or "fp32", "side": side, "threads": torch.get_num_threads(),
            "psnr_db": round(psnr(pixels, exact), 2), "held_bytes": held,
            "planned_bytes": result.plan.weight_bytes, "peak_mib": taken["peak_mib"], "seconds": taken["p50_s"],
            **{f"{name}_error": value for name, value in errors_of(weights).items()},
        })  # fmt: skip
    return rows


def modules(weights: str | None) -> dict[str, nn.Module]:
    """The shipped model's network and autoencoder in float32, packed as asked for."""
    spec = load_spec("demo")
    return {
        "network": load_network(spec, torch.float32, CPU, storage=storage_of(weights, "network")),
        "vae": load_vae(spec, torch.float32, CPU, storage_of(weights, "vae")),
    }


def held_bytes(weights: str | None) -> dict[str, int]:
    """Bytes of the weights in memory."""
    return {
        name: sum(value.nbytes for value in (*module.parameters(), *module.buffers()))
        for name, module in modules(weights).items()
    }


def errors_of(weights: str | None) -> dict[str, float | str]:
    """The median and the worst relative error of a packed weight."""
    errors = [error for module in modules(weights).values() for error in packing_errors(module).values()]
    return {"median_weight": round(statistics.median(errors), 5) if errors else "",
            "worst_weight": round(max(errors), 5) if errors else ""}  # fmt: skip


def layers() -> list[dict[str, Any]]:
    """A row for every layer of network and autoencoder: the error of its weight, and of its output in one evaluation."""
    exact = outputs(modules(None), None)
    rows: dict[str, dict[str, Any]] = {name: {"layer": name} for name in exact}
    for weights in WEIGHTS:
        packed = modules(weights)
        errors = {f"{part} {name}": error for part, module in packed.items() for name, error in packing_errors(module).items()}
        for name, error in outputs(packed, exact).items():
            own = errors.get(f"{name}.weight")
            rows[name] |= {f"{weights}_weight_error": "" if own is None else round(own, 5),
                           f"{weights}_output_error": round(float(error), 5)}  # fmt: skip
    return list(rows.values())


def outputs(parts: Mapping[str, nn.Module], exact: Mapping[str, Any] | None) -> dict[str, Any]:
    """The output of every layer with weights in one evaluation, or how far it is from `exact`."""
    found: dict[str, Any] = {}
    for part, module in parts.items():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_hook(_noting(found, f"{part} {name}", exact))
        with torch.inference_mode():
            evaluate(part, module)
    return found


def _noting(found: dict[str, Any], name: str, exact: Mapping[str, Any] | None) -> Any:
    def note(module: nn.Module, given: object, output: Tensor) -> None:
        found[name] = output if exact is None else relative_error(output, exact[name])

    return note


def evaluate(part: str, module: Any) -> None:
    """One evaluation at 256 px on seeded values: the network in the middle of its noise levels, the autoencoder both ways."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 32, 32, generator=generator)
    if part == "vae":
        module.decode(module.encode(torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1).latent_dist.mean)
        return
    config = module.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, pooled, generator=generator), "time_ids": torch.full((1, 6), 256.0)}
    tokens = torch.randn(1, 24, config.cross_attention_dim, generator=generator)
    module(x, torch.zeros(1), encoder_hidden_states=tokens, added_cond_kwargs=added)


def outside(row: Mapping[str, Any]) -> bool:
    return bool(row["psnr_db"] < LEAST_DB or abs(row["planned_bytes"] / row["held_bytes"] - 1) > AGREE)


def table(rows: list[dict[str, Any]]) -> str:
    """The layers as lines of text."""
    names = [name for name in rows[0] if name != "layer"]
    lines = [" ".join([f"{'layer':<70}", *(f"{name.replace('_error', ''):>12}" for name in names)])]
    lines += [" ".join([f"{row['layer']:<70}", *(f"{row.get(name, '')!s:>12}" for name in names)]) for row in rows]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks weights", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", action="store_true", help="print the layers alone, no rows")
    parser.add_argument("--csv", type=Path, help="the folder that rows are appended in, such as benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    each = layers()
    print(table(each))
    if options.layers:
        return 0
    rows = pictures(options.side)
    for name, found in (("weights", rows), ("weights_layers", each)) if options.csv else ():
        for row in found:
            append_row(options.csv / f"{name}.csv", stamp() | row)
    wrong = [row for row in rows if outside(row)]
    print(json.dumps({"suite": "weights", "rows": rows, "outside": wrong}))
    return 1 if wrong else 0
