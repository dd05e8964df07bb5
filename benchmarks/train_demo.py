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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.held_out import FIRST_SEED, held_out_kinds, held_out_scenes
from benchmarks.scenes import HORIZON, Scene, caption, draw, kinds, scene
from hires.tiling.geometry import Box, Size
from hires.weights import read_weights

LOG = ("stage", "step", "images", "wall_s", "loss", "metric", "value", "lr", "device")


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene that is not held out; redrawn until its kind is allowed, then asserted."""
    while True:
        drawn = scene(int(rng.integers(FIRST_SEED)))
        if drawn.kind not in held_out_kinds():
            break
    assert drawn.seed < FIRST_SEED
    assert drawn.kind not in held_out_kinds()
    return drawn


def interesting_box(drawn: Scene, canvas: Size, crop_px: int, rng: np.random.Generator) -> Box:
    """A crop of the canvas: half of them anywhere, half on the disk, the ridges or the shore."""
    centre_x, centre_y = rng.uniform(), rng.uniform()
    if rng.uniform() < 0.5:
        disk = drawn.disks[0]
        angle = rng.uniform(0, 2 * math.pi)
        spots = (
            (disk.x + disk.radius * math.cos(angle), disk.y + disk.radius * math.sin(angle)),
            (centre_x, rng.uniform(0.42, 0.62)),
            (centre_x, HORIZON + rng.normal() * 0.01),
        )
        centre_x, centre_y = spots[int(rng.integers(3))]
    top = int(np.clip(centre_y * canvas.height - crop_px / 2, 0, canvas.height - crop_px))
    left = int(np.clip(centre_x * canvas.width - crop_px / 2, 0, canvas.width - crop_px))
    return Box(top, left, crop_px, crop_px)


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


def make_vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
    ).to(memory_format=torch.channels_last)


def ae_crop(rng: np.random.Generator, crop_px: int) -> np.ndarray:
    """One training crop as uint8 (3, crop_px, crop_px), at a zoom between the whole picture and 8192 px."""
    drawn = training_scene(rng)
    side = int(crop_px * 2 ** rng.uniform(0, math.log2(8192 / crop_px)))
    pixels = draw(drawn, Size(side, side), interesting_box(drawn, Size(side, side), crop_px, rng))
    return (pixels.transpose(2, 0, 1) * 255 + rng.uniform(size=(3, 1, 1))).clip(0, 255).astype(np.uint8)


def ae_batches(rng: np.random.Generator, pool_size: int, crop_px: int, batch_size: int) -> Iterator[Tensor]:
    """Batches (B, 3, h, w) in [-1, 1] from a pool that is filled first and then slowly replaced; flips for free."""
    pool = np.stack([ae_crop(rng, crop_px) for _ in range(pool_size)])
    while True:
        for slot in rng.integers(pool_size, size=2):
            pool[slot] = ae_crop(rng, crop_px)
        batch = torch.from_numpy(pool[rng.integers(pool_size, size=batch_size)]).float() / 127.5 - 1
        if rng.uniform() < 0.5:
            batch = batch.flip(-1)
        yield batch.contiguous(memory_format=torch.channels_last)


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.diff(dim=-1), x.diff(dim=-2)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared and absolute error plus the absolute error of both spatial gradients (edges stay crisp)."""
    edges = sum(((a - b).abs().mean() for a, b in zip(gradient(output), gradient(target), strict=True)), torch.tensor(0.0))
    return 4 * F.mse_loss(output, target) + 0.5 * F.l1_loss(output, target) + 0.5 * edges


def held_out_psnr(vae: nn.Module, device: torch.device) -> dict[int, float]:
    """PSNR in dB of 256 px crops of held-out scenes, by canvas side, on the ridge line and the disk."""
    result = {}
    for side in (256, 512, 1024, 2048, 4096):
        errors = []
        for drawn in held_out_scenes(8):
            rng = np.random.default_rng([drawn.seed, side])
            box = interesting_box(drawn, Size(side, side), 256, rng)
            pixels = torch.from_numpy(draw(drawn, Size(side, side), box)).permute(2, 0, 1)[None] * 2 - 1
            with torch.no_grad():
                output = vae.decode(vae.encode(pixels.to(device)).latent_dist.mean).sample.cpu()
            errors.append(F.mse_loss(output.clamp(-1, 1) / 2, pixels / 2).item())
        result[side] = -10 * math.log10(float(np.mean(errors)))
    return result


def train_ae(args: argparse.Namespace) -> None:
    """Both halves (`ae`), or the decoder alone on latents that stay as they are (`decoder`), slightly noised."""
    device, decoder_only = torch.device(args.device), args.stage == "decoder"
    vae = make_vae().to(device)
    if decoder_only:
        vae.load_state_dict(load_state(args.out / "ae.pt")["ema"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    ema = Ema(vae, 0.999)
    step, images, wall = 0, 0, 0.0
    checkpoint = args.out / f"{args.stage}.pt"
    if args.resume and checkpoint.exists():
        state = load_state(checkpoint)
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        ema.values, step, images, wall = state["ema"], state["step"], state["images"], state["wall"]
    log = Log(args.out / "train_log.csv")
    batches = ae_batches(np.random.default_rng([step, decoder_only]), args.pool, args.crop, args.batch)
    next(batches)
    begun, saved, budget = time.monotonic() - wall, time.monotonic(), args.minutes * 60
    running = 0.0
    while (spent := time.monotonic() - begun) < budget:
        lr = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimiser.param_groups:
            group["lr"] = lr
        batch = next(batches).to(device)
        loss = decoder_loss(vae, batch) if decoder_only else autoencoder_loss(vae, batch, args.kl)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step, images = step + 1, images + args.batch
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        ema.update(vae, step)
        if step % 200 == 0:
            print(f"{args.stage} {step} {spent:.0f}s loss {running:.4f} lr {lr:.1e}", flush=True)
        if time.monotonic() - saved > args.every * 60 or spent + 2 > budget:
            saved, wall = time.monotonic(), time.monotonic() - begun
            state = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema.values, "step": step}
            save_state(state | {"images": images, "wall": wall}, checkpoint)
            average = make_vae().to(device).eval()
            average.load_state_dict(ema.values)
            for side, value in held_out_psnr(average, device).items():
                row = {"stage": args.stage, "step": step, "images": images, "wall_s": round(wall), "loss": round(running, 4)}
                log.row(**row, metric=f"psnr_db_{side}", value=round(value, 2), lr=f"{lr:.2e}", device=args.device)


def autoencoder_loss(vae: nn.Module, batch: Tensor, kl_weight: float) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16):
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample()).sample
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return reconstruction_loss(output.float(), batch) + kl_weight * kl


def decoder_loss(vae: nn.Module, batch: Tensor) -> Tensor:
    """Latents keep their meaning for the denoiser; up to 3 % noise stands for its error."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        with torch.no_grad():
            latents = vae.encode(batch).latent_dist.mean
            latents = latents + torch.rand(()) * 0.03 * latents.std() * torch.randn_like(latents)
        output = vae.decode(latents).sample
    return reconstruction_loss(output.float(), batch)


NATIVE_CELLS = 32
TOKENS = 24
SIGMA_MIN, SIGMA_MAX = 0.002, 20.0


def make_tokenizer(folder: Path) -> Path:
    """Write a CLIP-type BPE vocabulary whose merges come from the scenes' captions; other words fall into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    words = sorted({word for kind in kinds() for word in caption(kind).split()} | {"picture", "of", "the", "and", "with"})
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(words * 50, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in learnt["merges"]]
    entries = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    entries = [*list(dict.fromkeys(entries)), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TOKENS,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


class TextEncoders(nn.Module):
    """The two CLIP text towers of the SDXL layout, small: penultimate states side by side, pooled from the second."""

    def __init__(self, vocabulary: int) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        super().__init__()
        common = {"vocab_size": vocabulary, "max_position_embeddings": TOKENS, "num_hidden_layers": 2}
        common |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
        small = CLIPTextConfig(hidden_size=64, intermediate_size=128, num_attention_heads=2, projection_dim=64, **common)
        large = CLIPTextConfig(hidden_size=128, intermediate_size=256, num_attention_heads=4, projection_dim=128, **common)
        self.one = CLIPTextModel(small)
        self.two = CLIPTextModelWithProjection(large)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        one = self.one(ids, output_hidden_states=True).hidden_states[-2]
        two = self.two(ids, output_hidden_states=True)
        return torch.cat([one, two.hidden_states[-2]], dim=-1), two.text_embeds


def make_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=NATIVE_CELLS,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192, 128),  # 4x4 at the bottom: padding alone tells a cell where it is
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=[1, 1, 2, 1],
        attention_head_dim=[2, 4, 6, 4],
        cross_attention_dim=192,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=128 + 6 * 32,
        flip_sin_to_cos=True,
        freq_shift=0,
    ).to(memory_format=torch.channels_last)


def spoken(drawn: Scene, rng: np.random.Generator) -> str:
    """The caption, mostly whole; sometimes with a clause left out, sometimes empty (for guidance)."""
    disk, third, mountains, ground, at = drawn.kind
    roll = rng.uniform()
    if roll < 0.10:
        return ""
    if roll > 0.25:
        return drawn.caption
    place = "" if rng.uniform() < 0.4 else (" in the middle" if third == "middle" else f" on the {third}")
    over = f" over {mountains} mountains" + (f" and a {ground}" if rng.uniform() < 0.5 else "")
    when = f" at {at}" if rng.uniform() < 0.6 else ""
    return f"a {disk}{place}{over if rng.uniform() < 0.7 else f' over a {ground}'}{when}"


View = Callable[[np.random.Generator], tuple[Scene, Size, Box]]


@dataclass
class Pool:
    """Latents (N, 4, cells, cells) in half precision with what the model is told about each; filled, then replaced."""

    view: View
    latents: Tensor
    ids: Tensor
    scenes: list[Scene]

    @classmethod
    def empty(cls, view: View, size: int, cells: int) -> Pool:
        return cls(view, torch.zeros(size, 4, cells, cells).half(), torch.zeros(size, 6), [])

    def refill(self, count: int, vae: nn.Module, scale: float, rng: np.random.Generator) -> None:
        """Draw and encode `count` new views: into free places, or over random ones once there are none."""
        have, size = len(self.scenes), len(self.latents)
        slots = list(range(have, min(have + count, size))) or rng.integers(size, size=count // 2).tolist()
        views = [self.view(rng) for _ in slots]
        pixels = np.stack([draw(drawn, canvas, box).transpose(2, 0, 1) for drawn, canvas, box in views])
        batch = torch.from_numpy(pixels * 2 - 1).to(next(vae.parameters()).device)
        with torch.no_grad():
            latents = vae.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist.mean * scale
        self.scenes += [views[0][0]] * (max(slots) + 1 - have)
        for slot, latent, (drawn, canvas, box) in zip(slots, latents.cpu().half(), views, strict=True):
            self.latents[slot], self.scenes[slot] = latent, drawn
            self.ids[slot] = torch.tensor([canvas.height, canvas.width, box.top, box.left, canvas.height, canvas.width])

    def sample(self, count: int, cells: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, list[Scene]]:
        """Random entries, or random crops of them where `cells` is smaller; crop offsets move along in the ids."""
        slots = rng.integers(len(self.scenes), size=count)
        offsets = rng.integers(self.latents.shape[-1] - cells + 1, size=(count, 2))
        crops = [self.latents[s, :, t : t + cells, u : u + cells] for s, (t, u) in zip(slots, offsets, strict=True)]
        ids = self.ids[torch.from_numpy(slots)].clone()
        ids[:, 2:4] += 8 * torch.from_numpy(offsets)
        return torch.stack(crops).float(), ids, [self.scenes[slot] for slot in slots]


def small_picture(rng: np.random.Generator) -> tuple[Scene, Size, Box]:
    """A whole picture at half the native size: what is where, learnt at a quarter of the cost."""
    return training_scene(rng), Size(4 * NATIVE_CELLS, 4 * NATIVE_CELLS), Box(0, 0, 4 * NATIVE_CELLS, 4 * NATIVE_CELLS)


def native_view(rng: np.random.Generator) -> tuple[Scene, Size, Box]:
    """A scene and a 256 px view of it: the whole picture (58 %), part of a wide or tall one (8 %), or a crop."""
    drawn, roll, side = training_scene(rng), rng.uniform(), 8 * NATIVE_CELLS
    if roll < 0.58:
        return drawn, Size(side, side), Box(0, 0, side, side)
    if roll < 0.66:
        wide = bool(rng.uniform() < 0.5)
        canvas = Size(side, side * 3 // 2) if wide else Size(side * 3 // 2, side)
        offset = 8 * int(rng.integers(side // 16 + 1))
        return drawn, canvas, Box(0 if wide else offset, offset if wide else 0, side, side)
    extent = 32 * round(side / 32 * 2 ** rng.uniform(0.4, 5.0))
    canvas = Size(extent, extent)
    box = interesting_box(drawn, canvas, side, rng)
    return drawn, canvas, Box(box.top // 8 * 8, box.left // 8 * 8, side, side)


def train_unet(args: argparse.Namespace) -> None:
    """First 16x16-cell batches (whole small pictures and crops) for `--small` of the time, then native ones."""
    from transformers import CLIPTokenizer

    device = torch.device(args.device)
    rng = np.random.default_rng(int(time.time()) if args.resume else 1)
    vae = make_vae().to(device).eval()
    vae.load_state_dict(load_state(args.out / "ae.pt")["ema"])
    scale = latent_scale(args.out, vae)
    tokenizer = CLIPTokenizer.from_pretrained(make_tokenizer(args.out / "tokenizer"))
    unet, text = make_unet().to(device), TextEncoders(len(tokenizer)).to(device)
    both = nn.ModuleDict({"unet": unet, "text": text})
    print(f"unet {count(unet):.2f} M, text {count(text):.2f} M, vae {count(vae):.2f} M, scale {scale:.4f}", flush=True)
    optimiser = torch.optim.AdamW(both.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = Ema(both, 0.9975)
    step, images, wall = 0, 0, 0.0
    checkpoint = args.out / "unet.pt"
    if args.resume and checkpoint.exists():
        state = load_state(checkpoint)
        both.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        ema.values, step, images, wall = state["ema"], state["step"], state["images"], state["wall"]
    elif args.start:
        warm_start(unet, args.start / "unet")
        warm_start(text.one, args.start / "text_encoder")
        warm_start(text.two, args.start / "text_encoder_2")
        ema = Ema(both, 0.9975)
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
        for group in optimiser.param_groups:
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
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
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
            state = {"model": both.state_dict(), "optimiser": optimiser.state_dict(), "ema": ema.values, "step": step}
            save_state(state | {"images": images, "wall": wall}, checkpoint)
            row = {"stage": "unet", "step": step, "images": images, "wall_s": round(wall), "loss": round(running, 4)}
            log.row(**row, metric="loss", value=round(running, 4), lr=f"{lr:.2e}", device=args.device)


def warm_start(module: nn.Module, folder: Path) -> None:
    """Take over what fits by name and shape from an exported component; the rest stays fresh."""
    wanted, found = module.state_dict(), read_weights(folder)
    fits = {key: value.float() for key, value in found.items() if key in wanted and value.shape == wanted[key].shape}
    module.load_state_dict(fits, strict=False)
    print(f"{folder}: {len(fits)} of {len(wanted)} tensors taken over", flush=True)


def denoising_loss(unet: nn.Module, text: nn.Module, tokenizer: Any, x0: Tensor, ids: Tensor, texts: list[str]) -> Tensor:
    """Mean squared error of F against v = cos(phi) eps - sin(phi) x0, tan(phi) = sigma: the EDM-v target of CosXL."""
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
    return F.mse_loss(output.float(), cos * noise - sin * x0)


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


DEFAULTS = {
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "steps": 24,
    "guidance": 3.0,
    "relay_sigma": 0.8,
    "relay_steps": 6,
    "relay_guidance": 1.0,
    "tile_px": 256,
    "overlap_px": 64,
    "enlarger": "pixel",
}


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights as a diffusers-style CosXL folder in half precision, ready to ship."""
    target: Path = args.to
    vae, unet = make_vae(), make_unet()
    decoder = args.out / "decoder.pt"
    vae.load_state_dict(load_state(decoder if decoder.exists() else args.out / "ae.pt")["ema"])
    vae.register_to_config(scaling_factor=latent_scale(args.out, vae))
    vocabulary = json.loads((args.out / "tokenizer" / "vocab.json").read_text())
    text = TextEncoders(len(vocabulary))
    both = nn.ModuleDict({"unet": unet, "text": text})
    if (args.out / "unet.pt").exists():
        both.load_state_dict(load_state(args.out / "unet.pt")["ema"])
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text.one), ("text_encoder_2", text.two)):
        shutil.rmtree(target / part, ignore_errors=True)
        module.half().save_pretrained(target / part, variant="fp16", safe_serialization=True)
        for file in (target / part).iterdir():
            file.chmod(0o644)
    for part in ("tokenizer", "tokenizer_2"):
        make_tokenizer(target / part)
    scheduler = {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": SIGMA_MIN,
        "sigma_max": SIGMA_MAX,
        "sigma_data": 1.0,
        "sigma_schedule": "karras",
        "prediction_type": "v_prediction",
    }
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EDMEulerScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (target / "scheduler").mkdir(parents=True, exist_ok=True)
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")
    (target / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    (target / "hires.json").write_text(json.dumps({"defaults": DEFAULTS}, indent=1) + "\n")
    total = sum(file.stat().st_size for file in target.rglob("*.safetensors"))
    assert total <= 32 * 2**20, f"{total / 2**20:.1f} MiB of weights are more than the 32 MiB the package may carry"
    print(f"{target}: {total / 2**20:.2f} MiB of weights")


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
