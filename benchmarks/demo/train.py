"""Train the small model that ships inside the package, on a CPU or a GPU.

    python -m benchmarks.train_demo ae    --out runs/demo --minutes 40
    python -m benchmarks.train_demo unet  --out runs/demo --minutes 90
    python -m benchmarks.train_demo export --out runs/demo

Each stage writes a checkpoint and a row of `train_log.csv` every few minutes; `--resume` goes on from the last checkpoint.
The scenes come from `benchmarks.scenes`; captions and seeds of `held_out.json` are never drawn (asserted at every draw).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.demo.data import Pool, ae_batches, ae_crop, interesting_box, native_view, small_picture, spoken
from benchmarks.demo.held_out import held_out_scenes
from benchmarks.demo.model import (
    NATIVE_CELLS,
    SIGMA_MAX,
    SIGMA_MIN,
    TOKENS,
    TextEncoders,
    make_tokenizer,
    make_unet,
    make_vae,
    save_folder,
)
from benchmarks.demo.muon import Muon, matrices
from benchmarks.demo.pinned_norm import fold_norms, hold_gradients, pin_norms, start_scales
from benchmarks.demo.scenes import Scene, draw
from hires.images.boxes import luma
from hires.metrics.fidelity import band_energy
from hires.metrics.seams import lattice_score
from hires.models.loading import load_autoencoder as load_saved
from hires.models.loading import read_weights
from hires.tiling.geometry import Box, Size

LOG = ("stage", "step", "images", "wall_s", "loss", "metric", "value", "lr", "device")


@dataclass
class Log:
    """Rows of the training log: one per checkpoint, with wall seconds since the stage began (earlier runs counted in)."""

    path: Path

    def row(self, **values: object) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, LOG)
            if new:
                writer.writeheader()
            writer.writerow(values)
        print(" ".join(f"{k}={v}" for k, v in values.items()), flush=True)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Replace a checkpoint in one step, so that a kill leaves the old one or the new one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """A checkpoint of any machine, on the CPU."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Ema:
    """Exponential moving average of a module's parameters, float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone().float() for k, v in module.state_dict().items()}

    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            self.values[key].lerp_(value.detach().to(self.values[key]), 1 - decay)


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared and absolute error plus the absolute error of both spatial gradients (edges stay crisp)."""
    edges = sum(((a - b).abs().mean() for a, b in zip(gradient(output), gradient(target), strict=True)), torch.tensor(0.0))
    return 4 * F.mse_loss(output, target) + 0.5 * F.l1_loss(output, target) + 0.5 * edges


def held_out_psnr(vae: nn.Module, device: torch.device) -> dict[str, float]:
    """PSNR in dB of 256 px crops of held-out scenes, by canvas side, on the ridge line and the disk; and of whole pictures.

    `fine_energy`: energy beyond 1/8 cycles per pixel over the scene's own. `lattice`: how much the decoder's cells are seen.
    """

    fine: list[float] = []
    cells: list[float] = []

    def round_trip(drawn: Scene, canvas: Size, box: Box | None = None) -> float:
        pixels = torch.from_numpy(draw(drawn, canvas, box)).permute(2, 0, 1)[None] * 2 - 1
        with torch.no_grad():
            output = vae.decode(vae.encode(pixels.to(device)).latent_dist.mean).sample.cpu()
        energies = [band_energy(luma(((p[0].permute(1, 2, 0) + 1) / 2).numpy()), 0.125) for p in (output, pixels)]
        fine.append(energies[0] / energies[1])
        cells.append(lattice_score(luma(((output[0].permute(1, 2, 0) + 1) / 2).numpy()), 8))
        return F.mse_loss(output.clamp(-1, 1) / 2, pixels / 2).item()

    errors: dict[str, list[float]] = {}
    for side in (256, 512, 1024, 2048, 4096):
        for drawn in held_out_scenes(8):
            rng = np.random.default_rng([drawn.seed, side])
            box = interesting_box(drawn, Size(side, side), 256, rng)
            errors.setdefault(f"psnr_db_{side}", []).append(round_trip(drawn, Size(side, side), box))
    errors["psnr_db_whole_1024"] = [round_trip(drawn, Size(1024, 1024)) for drawn in held_out_scenes(4)]
    psnrs = {name: -10 * math.log10(float(np.mean(values))) for name, values in errors.items()}
    ranges = {"min": min(fine), "median": float(np.median(fine)), "max": max(fine)}
    return (
        psnrs | {f"fine_energy_{name}": value for name, value in ranges.items()} | {"lattice_median": float(np.median(cells))}
    )


def some_views(count: int) -> Tensor:
    """Pixels (count, 3, 128, 128) in [-1, 1] at all zooms."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([ae_crop(rng, 128) for _ in range(count)])).float() / 127.5 - 1


def train_ae(args: argparse.Namespace) -> None:
    """Both halves (`ae`), or the decoder alone on latents that stay as they are (`decoder`), slightly noised."""
    device, decoder_only = torch.device(args.device), args.stage == "decoder"
    vae = make_vae()
    if decoder_only:
        load_autoencoder(vae, args)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    elif args.start:
        fold_norms(load_saved(args.start / "vae", torch.float32, torch.device("cpu")), vae, some_views(48))
    else:
        start_scales(vae)
    hold_gradients(vae.to(device))
    trained = [p for p in vae.parameters() if p.requires_grad]
    hidden, rest = matrices(vae)
    adam = torch.optim.AdamW([p for p in rest if p.requires_grad], lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    optimisers = (Muon([p for p in hidden if p.requires_grad], lr=args.lr), adam)
    ema = Ema(vae, 0.999)
    step, images, wall = 0, 0, 0.0
    checkpoint = args.out / f"{args.stage}.pt"
    if args.resume and checkpoint.exists():
        state = load_state(checkpoint)
        vae.load_state_dict(state["vae"])
        for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        ema.values, step, images, wall = state["ema"], state["step"], state["images"], state["wall"]
    log = Log(args.out / "train_log.csv")
    batches = ae_batches(np.random.default_rng([step, decoder_only]), args.pool, args.crop, args.batch)
    next(batches)
    begun, saved, budget = time.monotonic() - wall, time.monotonic(), args.minutes * 60
    running = 0.0
    while (spent := time.monotonic() - begun) < budget:
        lr = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = lr
        batch = next(batches).to(device)
        loss = decoder_loss(vae, batch, args.texture) if decoder_only else autoencoder_loss(vae, batch, args.kl)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        pin_norms(vae)
        step, images = step + 1, images + len(batch)
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        ema.update(vae, step)
        if step % 200 == 0:
            print(f"{args.stage} {step} {spent:.0f}s loss {running:.4f} lr {lr:.1e}", flush=True)
        if time.monotonic() - saved > args.every * 60 or spent + 2 > budget:
            saved, wall = time.monotonic(), time.monotonic() - begun
            state = {"vae": vae.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "ema": ema.values}
            save_state(state | {"step": step, "images": images, "wall": wall}, checkpoint)
            average = make_vae().to(device).eval()
            average.load_state_dict(ema.values)
            for name, value in held_out_psnr(average, device).items():
                row = {"stage": args.stage, "step": step, "images": images, "wall_s": round(wall), "loss": round(running, 4)}
                log.row(**row, metric=name, value=round(value, 2), lr=f"{lr:.2e}", device=args.device)


def autoencoder_loss(vae: nn.Module, batch: Tensor, kl_weight: float) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16):
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample()).sample
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return reconstruction_loss(output.float(), batch) + kl_weight * kl


def decoder_loss(vae: nn.Module, batch: Tensor, texture_weight: float) -> Tensor:
    """Latents keep their meaning for the denoiser; up to 3 % noise and 40 % blur stand for what it gets wrong or leaves out.

    A squared error alone leaves out texture that 4 channels cannot place; its strength is asked for as well.
    """
    with torch.autocast(batch.device.type, torch.bfloat16):
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mean
            smooth = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, 1)
            share = (torch.rand(len(latents), 1, 1, 1) * 0.8 - 0.4).clamp(min=0).to(latents)
            latents = latents.float() + share.float() * (smooth - latents)
            latents = latents + torch.rand(()) * 0.03 * latents.std() * torch.randn_like(latents)
        output = vae.decode(latents).sample.float()
    return reconstruction_loss(output, batch) + texture_weight * texture_loss(output, batch)


def texture_loss(output: Tensor, target: Tensor) -> Tensor:
    """Difference of the logarithms of local gradient energies at three scales, repetition of cells, and their lattice."""
    loss = torch.zeros((), device=output.device)
    out, wanted = output.mean(1, keepdim=True), target.mean(1, keepdim=True)
    for scale in range(3):
        window = 16 >> scale
        for a, b in zip(gradient(out), gradient(wanted), strict=True):
            energies = [(F.avg_pool2d(g.square(), window, window // 2) + 1e-5).log() for g in (a, b)]
            loss = loss + (energies[0] - energies[1]).abs().mean()
        if scale == 0:
            loss = loss + repetition(out, wanted) + 4 * lattice(out, wanted)
        out, wanted = F.avg_pool2d(out, 2), F.avg_pool2d(wanted, 2)
    return loss


def repetition(out: Tensor, wanted: Tensor) -> Tensor:
    """How much more the fine part of a picture resembles itself 8 px further (the decoder's own pitch) than the target does."""
    total = torch.zeros((), device=out.device)
    for axis in (-1, -2):
        likeness = []
        for x in (out, wanted):
            fine = x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
            here, there = fine.narrow(axis, 0, x.shape[axis] - 8), fine.narrow(axis, 8, x.shape[axis] - 8)
            power = (here.square() + there.square()).mean(dim=(1, 2, 3)) / 2
            likeness.append((here * there).mean(dim=(1, 2, 3)) / (power + 1e-6))
        total = total + F.relu(likeness[0].abs() - likeness[1].abs()).mean()
    return total


def lattice(out: Tensor, wanted: Tensor, pitch: int = 8) -> Tensor:
    """What all of the decoder's cells have in common that the target has not: the error's mean per row and per column of a
    cell, in deviations of the target's fine part."""
    fine = wanted - F.avg_pool2d(F.pad(wanted, (2, 2, 2, 2), mode="replicate"), 5, 1)
    error = (out - wanted) / (fine.std(dim=(1, 2, 3), keepdim=True) + 0.004)
    total = torch.zeros((), device=out.device)
    for axis in (-1, -2):
        pattern = error.mean(dim=(1, axis)).unflatten(1, (-1, pitch)).mean(dim=1)  # (B, pitch)
        total = total + (pattern - pattern.mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt().mean()
    return total


def train_unet(args: argparse.Namespace) -> None:
    """First 16x16-cell batches (whole small pictures and crops) for `--small` of the time, then native ones."""
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTokenizer

    device = torch.device(args.device)
    rng = np.random.default_rng(int(time.time()) if args.resume else 1)
    vae = make_vae().to(device).eval()
    load_autoencoder(vae, args)
    scale = latent_scale(args.out, vae)
    vocabulary = args.out / "tokenizer"
    if not vocabulary.exists():
        if args.start:
            shutil.copytree(args.start / "tokenizer", vocabulary)
        else:
            make_tokenizer(vocabulary)
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary)
    unet, text = make_unet().to(device), TextEncoders(len(tokenizer)).to(device)
    if device.type == "cpu":  # the fused kernel's backward is four times slower than plain products over 24 tokens
        plain = {name: AttnProcessor() if "attn2" in name else p for name, p in unet.attn_processors.items()}
        unet.set_attn_processor(plain)
    both = nn.ModuleDict({"unet": unet, "text": text})
    print(f"unet {count(unet):.2f} M, text {count(text):.2f} M, vae {count(vae):.2f} M, scale {scale:.4f}", flush=True)
    hidden, rest = matrices(both)
    optimisers = (
        Muon(hidden, lr=args.lr),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    )
    ema = Ema(both, args.ema)
    step, images, wall = 0, 0, 0.0
    checkpoint = args.out / "unet.pt"
    if args.resume and checkpoint.exists():
        state = load_state(checkpoint)
        both.load_state_dict(state["model"])
        for optimiser, kept in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        ema.values, step, images, wall = state["ema"], state["step"], state["images"], state["wall"]
    elif args.start:
        warm_start(unet, args.start / "unet")
        warm_start(text.one, args.start / "text_encoder")
        warm_start(text.two, args.start / "text_encoder_2")
        ema = Ema(both, args.ema)
    log = Log(args.out / "train_log.csv")
    begun, budget = time.monotonic() - wall, args.minutes * 60
    halves = Pool.empty(small_picture, args.pool, NATIVE_CELLS // 2)
    natives = Pool.empty(native_view, args.pool, NATIVE_CELLS)
    small = wall < args.small * budget
    for _ in range(args.pool // 128 if small else 1):
        halves.refill(16, vae, scale, rng)
    for _ in range(args.pool // (256 if small else 64)):
        natives.refill(16, vae, scale, rng)
    print(f"pools of {len(halves.scenes)}, {len(natives.scenes)} after {time.monotonic() - begun:.0f} s", flush=True)
    saved, running = time.monotonic(), 1.0
    while (spent := time.monotonic() - begun) < budget:
        lr = args.lr * min(1.0, (step + 1) / 200) * (0.03 + 0.97 * min(1.0, 2.0 * (1 - spent / budget)))
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = lr
        small = spent < args.small * budget
        if step % 4 == 0:
            natives.refill(4 if small else 6, vae, scale, rng)
            if small:
                halves.refill(8, vae, scale, rng)
        pool = halves if small and rng.uniform() < 0.7 else natives
        cells = NATIVE_CELLS // 2 if small else NATIVE_CELLS
        x0, ids, scenes = pool.sample(args.batch * (3 if small else 1), cells, rng)
        loss = denoising_loss(unet, text, tokenizer, x0.to(device), ids.to(device), [spoken(s, rng) for s in scenes])
        both.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step, images = step + 1, images + len(scenes)
        running = 0.99 * running + 0.01 * loss.item()
        if step % 4 == 0:
            ema.update(both, step // 4)
        if step % 100 == 0:
            sizes = f"{len(halves.scenes)}+{len(natives.scenes)}"
            print(f"unet {step} {spent:.0f}s loss {running:.4f} lr {lr:.1e} pools {sizes}", flush=True)
        if time.monotonic() - saved > args.every * 60 or spent + 2 > budget:
            saved = time.monotonic()
            wall = time.monotonic() - begun
            state = {"model": both.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "ema": ema.values}
            save_state(state | {"step": step, "images": images, "wall": wall}, checkpoint)
            row = {"stage": "unet", "step": step, "images": images, "wall_s": round(wall), "loss": round(running, 4)}
            log.row(**row, metric="loss", value=round(running, 4), lr=f"{lr:.2e}", device=args.device)


def load_autoencoder(vae: nn.Module, args: argparse.Namespace) -> None:
    """The autoencoder trained here, or that of the exported folder `--start` and the scale its denoiser was trained with."""
    if (args.out / "ae.pt").exists() or not args.start:
        vae.load_state_dict(load_state(args.out / "ae.pt")["ema"])
        return
    warm_start(vae, args.start / "vae")
    kept = json.loads((args.start / "vae" / "config.json").read_text())["scaling_factor"]
    (args.out / "latent_scale.json").write_text(json.dumps(kept))
    torch.save({"ema": vae.state_dict()}, args.out / "ae.pt")


def warm_start(module: nn.Module, folder: Path) -> None:
    """Take over what fits by name and shape from an exported component; the rest stays fresh."""
    wanted, found = module.state_dict(), read_weights(folder)
    fits = {key: value.float() for key, value in found.items() if key in wanted and value.shape == wanted[key].shape}
    module.load_state_dict(fits, strict=False)
    print(f"{folder}: {len(fits)} of {len(wanted)} tensors taken over", flush=True)


def denoising_loss(unet: nn.Module, text: nn.Module, tokenizer: Any, x0: Tensor, ids: Tensor, texts: list[str]) -> Tensor:
    """Squared error of F against v = cos(phi) eps - sin(phi) x0, tan(phi) = sigma (the EDM-v target of CosXL).

    Taken per cell and, so that outlines count, over squares of 2x2 and 4x4 cells.
    """
    batch = x0.shape[0]
    whole = (ids[:, 0].minimum(ids[:, 1]) <= 8 * NATIVE_CELLS).float()
    centre, spread = 0.5 * whole - 0.8 * (1 - whole), 1.5 * whole + 1.3 * (1 - whole)
    sigma = (torch.randn(batch, device=x0.device) * spread + centre).exp().clamp(SIGMA_MIN, SIGMA_MAX)
    cos = (1 / (sigma**2 + 1).sqrt())[:, None, None, None]
    sin = cos * sigma[:, None, None, None]
    noise = torch.randn_like(x0)
    unique = sorted(set(texts))
    tokens = tokenizer(unique, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    rows = torch.tensor([unique.index(line) for line in texts])
    with torch.autocast(x0.device.type, torch.bfloat16):
        states, pooled = text(tokens.to(x0.device))
        output = unet(
            (cos * x0 + sin * noise).contiguous(memory_format=torch.channels_last),
            0.25 * sigma.log(),
            encoder_hidden_states=states[rows],
            added_cond_kwargs={"text_embeds": pooled[rows], "time_ids": ids},
        ).sample
    error = output.float() - (cos * noise - sin * x0)
    whole_loss: Tensor = error.square().mean()
    for side in (2, 4):  # the minimum stays where it is; what is wrong over many cells (a disk's outline) weighs more
        whole_loss = whole_loss + 0.5 * side**2 * F.avg_pool2d(error, side).square().mean()
    return whole_loss


def latent_scale(out: Path, vae: nn.Module) -> float:
    """1 / std of the latents over 128 views, kept in a file so that every later stage uses the same number."""
    file = out / "latent_scale.json"
    if not file.exists():
        probe = Pool.empty(native_view, 128, NATIVE_CELLS)
        for seed in range(8):
            probe.refill(16, vae, 1.0, np.random.default_rng(seed))
        file.write_text(json.dumps(1 / probe.latents.float().std().item()))
    return float(json.loads(file.read_text()))


def count(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as the folder that ships."""
    vae, unet = make_vae(), make_unet()
    decoder = args.out / "decoder.pt"
    vae.load_state_dict(load_state(decoder if decoder.exists() else args.out / "ae.pt")["ema"])
    vae.register_to_config(scaling_factor=latent_scale(args.out, vae))
    vocabulary = json.loads((args.out / "tokenizer" / "vocab.json").read_text())
    text = TextEncoders(len(vocabulary))
    both = nn.ModuleDict({"unet": unet, "text": text})
    if (args.out / "unet.pt").exists():
        both.load_state_dict(load_state(args.out / "unet.pt")["ema"])
    parts = {"unet": unet, "vae": vae, "text_encoder": text.one, "text_encoder_2": text.two}
    print(f"{args.to}: {save_folder(args.to, parts, args.out / 'tokenizer'):.2f} MiB of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("ae", "unet", "decoder", "export"))
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--to", type=Path, default=Path("hires/assets/demo"), help="where export writes the model")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--small", type=float, default=0.3, help="share of the time spent on 16x16-cell crops")
    parser.add_argument("--kl", type=float, default=2e-4)
    parser.add_argument("--texture", type=float, default=0.004, help="weight of the texture's strength in the decoder's loss")
    parser.add_argument("--ema", type=float, default=0.9975, help="decay of the denoiser's average, every 4 steps")
    parser.add_argument("--crop", type=int, default=64, help="side of the training crops of the autoencoder, px")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pool", type=int, default=4000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start", type=Path, help="an exported model folder whose denoiser to go on from")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(int(time.time()) if args.resume else 0)
    {"ae": train_ae, "decoder": train_ae, "unet": train_unet, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
