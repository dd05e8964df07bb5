"""`webuiapi`, the client package of A1111's API, against the running server; and what other tools send by hand."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import hires
from hires.images import infotext
from tests.support.server import Live

webuiapi: Any = pytest.importorskip("webuiapi", reason="webuiapi is not installed (extra `dev`)")


@pytest.fixture(scope="module")
def api(server: Live) -> Any:
    return webuiapi.WebUIApi(host="127.0.0.1", port=server.port, sampler="Euler a", steps=2)


@pytest.fixture(scope="module")
def picture(api: Any) -> Image.Image:
    return api.txt2img(prompt="a lake at dusk", seed=3, width=128, height=96).image


def encoded(picture: Image.Image) -> str:
    into = io.BytesIO()
    picture.save(into, format="PNG")
    return base64.b64encode(into.getvalue()).decode()


def plan_of(picture: Any) -> dict[str, Any]:
    picture.load()  # it stands after the pixels
    found: dict[str, Any] = json.loads(picture.text["hires:plan"])
    return found


def post(server: Live, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/sdapi/v1/{path}", json=body, timeout=120)


def test_txt2img_gives_the_exact_size_and_the_engines_picture(api: Any) -> None:
    result = api.txt2img(prompt="a lake at dusk", negative_prompt="fog", seed=11, width=200, height=136, cfg_scale=2.0)
    assert result.image.size == (200, 136)
    here = hires.render(
        "a lake at dusk", negative="fog", size="200x136", seed=11, steps=2, guidance=2.0, sampler="Euler a", vram="2GB"
    )
    assert np.array_equal(np.asarray(result.image), here.pixels)
    info = result.info
    assert (info["seed"], info["width"], info["height"], info["steps"]) == (11, 200, 136, 2)
    assert info["sampler_name"] == "Euler a" and info["cfg_scale"] == 2.0 and info["sd_model_name"] == "demo"
    assert result.parameters["prompt"] == "a lake at dusk"
    found = infotext.parsed(info["infotexts"][0])
    assert found["Prompt"] == "a lake at dusk" and found["Negative prompt"] == "fog" and found["Seed"] == "11"
    assert result.image.info["parameters"] == info["infotexts"][0]


def test_batches_have_following_seeds(api: Any) -> None:
    result = api.txt2img(prompt="a lake", seed=20, width=64, height=64, batch_size=2, n_iter=2)
    assert result.info["all_seeds"] == [20, 21, 22, 23] and len(result.images) == 4
    single = api.txt2img(prompt="a lake", seed=22, width=64, height=64)
    assert np.array_equal(np.asarray(result.images[2]), np.asarray(single.image))
    anything = api.txt2img(prompt="a lake", seed=-1, width=64, height=64)
    assert anything.info["seed"] >= 0


@pytest.mark.parametrize("side", [512, pytest.param(1024, marks=pytest.mark.slow)])
def test_1024_is_1024(api: Any, side: int) -> None:
    assert api.txt2img(prompt="a lake", seed=1, width=side, height=side, steps=1).image.size == (side, side)


def test_hires_fix_is_a_second_stage(api: Any) -> None:
    result = api.txt2img(
        prompt="a lake",
        seed=1,
        width=256,
        height=192,
        steps=4,
        enable_hr=True,
        hr_scale=2,
        denoising_strength=0.5,
        hr_second_pass_steps=4,
    )
    assert result.image.size == (512, 384)
    plan = plan_of(result.image)
    first, second = plan["stages"]
    assert (first["canvas"]["width"], second["canvas"]["width"]) == (256, 512)
    assert first["steps"] == 4 and second["steps"] == 2 and second["sigma_start"] < first["sigma_start"]


def test_img2img_and_the_modes_of_resizing(api: Any, picture: Image.Image) -> None:
    for mode in range(4):
        result = api.img2img(
            images=[picture], prompt="a lake", seed=2, width=160, height=160, denoising_strength=0.3, resize_mode=mode, steps=6
        )
        assert result.image.size == (160, 160)
        colours = np.asarray(result.image, dtype=float).mean(axis=(0, 1))
        assert np.abs(colours - np.asarray(picture, dtype=float).mean(axis=(0, 1))).max() < 40, mode
    nearly = api.img2img(images=[picture], seed=2, width=128, height=96, denoising_strength=0.0, steps=4)
    assert nearly.image.size == picture.size


def test_inpainting_leaves_the_rest_as_it_is(api: Any, picture: Image.Image) -> None:
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (64, 32, 120, 90))
    given = np.asarray(picture)
    for whole in (False, True):
        drawn = np.asarray(
            api.img2img(
                images=[picture], mask_image=mask, mask_blur=0, inpaint_full_res=whole, inpaint_full_res_padding=8,
                prompt="a sun", seed=5, width=128, height=96, denoising_strength=0.9, steps=4,
            ).image
        )  # fmt: skip
        assert drawn.shape == given.shape, whole
        outside = np.asarray(mask) == 0
        assert np.array_equal(drawn[outside], given[outside]), whole
        assert np.abs(drawn[~outside].astype(int) - given[~outside]).mean() > 2, whole


def test_extras_single_and_batch(api: Any, picture: Image.Image) -> None:
    one = api.extra_single_image(image=picture, upscaler_1="Lanczos", upscaling_resize=2.5)
    assert one.image.size == (320, 240)
    assert np.array_equal(np.asarray(one.image), hires.upscale(picture, scale=2.5).pixels)
    exact = api.extra_single_image(
        image=picture, upscaler_1="Nearest", resize_mode=1, upscaling_resize_w=256, upscaling_resize_h=256
    )
    assert exact.image.size == (256, 256)
    uncut = api.extra_single_image(
        image=picture, upscaler_1="Nearest", resize_mode=1, upscaling_resize_w=256, upscaling_resize_h=192, upscaling_crop=False
    )
    assert np.array_equal(np.asarray(uncut.image), np.asarray(picture.resize((256, 192), Image.Resampling.NEAREST)))
    many = api.extra_batch_images(images=[picture, picture.convert("L")], upscaler_1="Lanczos", upscaling_resize=2)
    assert [image.size for image in many.images] == [(256, 192), (256, 192)] and many.images[1].mode == "L"
    mixed = api.extra_single_image(
        image=picture, upscaler_1="Nearest", upscaler_2="Lanczos", extras_upscaler_2_visibility=0.25, upscaling_resize=2
    )
    nearest, lanczos = (
        np.asarray(api.extra_single_image(image=picture, upscaler_1=name, upscaling_resize=2).image, dtype=float)
        for name in ("Nearest", "Lanczos")
    )
    assert np.abs(np.asarray(mixed.image) - (0.75 * nearest + 0.25 * lanczos)).max() <= 1


def test_png_info_reads_what_was_written(api: Any, picture: Image.Image) -> None:
    found = api.png_info(picture)
    assert found.info.startswith("a lake at dusk\nSteps: 2, Sampler: Euler a")
    assert found.parameters["Seed"] == "3" and found.parameters["Size"] == "128x96"
    assert api.png_info(Image.new("RGB", (8, 8))).info == ""


def test_progress_rises_and_interrupt_stops(api: Any) -> None:
    with ThreadPoolExecutor() as pool:
        call = pool.submit(api.txt2img, prompt="a lake", seed=1, width=768, height=768, steps=120)
        seen, previews = [], []
        while (len(seen) < 12 or not seen[-1]) and not call.done():
            found = api.get_progress()
            if found["state"]["job_count"]:
                seen.append(found["progress"])
                assert found["eta_relative"] >= 0
                if found["current_image"]:
                    previews.append(Image.open(io.BytesIO(base64.b64decode(found["current_image"]))))
            time.sleep(0.15)
        begun = time.monotonic()
        api.interrupt()
        answered = time.monotonic() - begun
        result = call.result(30)
        freed = time.monotonic() - begun
    assert seen == sorted(seen) and 0 < seen[-1] < 1
    assert previews and previews[-1].size[0] >= 32
    assert answered < 1 and freed < 2, (answered, freed)
    assert result.images == [] and result.info["interrupted"] is True
    api.util_wait_for_ready(check_interval=0.05)
    idle = api.get_progress()
    assert idle["progress"] == 0 and idle["state"]["job_count"] == 0 and idle["current_image"] is None


def test_skip_goes_on_with_the_next_picture(api: Any) -> None:
    with ThreadPoolExecutor() as pool:
        call = pool.submit(api.txt2img, prompt="a lake", seed=1, width=384, height=384, steps=60, n_iter=2)
        while api.get_progress()["progress"] < 0.02:
            time.sleep(0.02)
        api.skip()
        while api.get_progress()["state"]["job_no"] == 0:
            time.sleep(0.02)
        api.skip()
        result = call.result(60)
    assert result.images == [] and result.info["interrupted"]


def test_options_choose_the_model_and_listings_list(api: Any) -> None:
    assert api.get_options()["sd_model_checkpoint"] == "demo"
    api.set_options({"sd_model_checkpoint": "demo"})
    assert api.util_get_model_names() == ["demo"]
    names = {sampler["name"] for sampler in api.get_samplers()}
    assert {"Euler a", "DPM++ 2M", "DDIM", "UniPC"} <= names
    assert {"karras", "exponential"} <= {schedule["name"] for schedule in api.get_schedulers()}
    assert [upscaler["name"] for upscaler in api.get_upscalers()] == ["None", "Lanczos", "Nearest"]
    assert api.get_memory()["ram"]["total"] > 2**30
    assert "ultimate sd upscale" in api.get_scripts()["img2img"]
    assert api.get_loras() == [] and api.get_sd_vae() == [] and api.get_cmd_flags()["api"] is True


@pytest.mark.slow
def test_every_listed_sampler_is_taken(api: Any) -> None:
    for sampler in api.get_samplers():
        if sampler["name"] not in ("TCD", "DPM adaptive"):  # of models with timesteps; of no fixed length
            api.txt2img(prompt="a lake", seed=1, width=32, height=32, steps=3, sampler_name=sampler["name"])


def test_scripts_of_other_tools(api: Any, picture: Image.Image) -> None:
    arguments = ["", 256, 256, 8, 32, 64, 0.35, 32, 1, True, 0, False, 8, 0, 2, 0, 0, 2.5]
    drawn = api.img2img(
        images=[picture],
        prompt="a lake",
        seed=4,
        denoising_strength=0.35,
        steps=4,
        script_name="Ultimate SD upscale",
        script_args=arguments,
    )
    assert drawn.image.size == (320, 240)
    small = np.asarray(drawn.image.resize(picture.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(small - np.asarray(picture)).mean() < 12, "structure and colours stay"
    clarity = {
        "Tiled Diffusion": {"args": [True, "MultiDiffusion", True, True, 1, 1, 32, 32, 8, 8, "Lanczos", 2, False, 0, 0.0, 3]},
        "Tiled VAE": {"args": [True, 2048, 128, True, True, True, True]},
        "controlnet": {"args": [{"enabled": True, "module": "tile_resample", "model": "control_v11f1e_sd15_tile"}]},
    }
    result = api.img2img(images=[picture], prompt="a lake", seed=4, denoising_strength=0.35, steps=4, alwayson_scripts=clarity)
    assert result.image.size == (256, 192)
    notes = " ".join(result.info["extra_generation_params"]["Notes"])
    assert "Tiled Diffusion" in notes and "Tiled VAE" in notes and "controlnet" in notes
    tiled = api.txt2img(
        prompt="a lake", seed=4, steps=2,
        alwayson_scripts={"Tiled Diffusion": {"args": [True, "Mixture of Diffusers", True, True, 512, 320, 32, 32, 8, 4]}},
    )  # fmt: skip
    plan = plan_of(tiled.image)
    assert (
        tiled.image.size == (512, 320)
        and plan["strategy"] == "tiled"
        and plan["latent_grid"]["tile"] == {"height": 32, "width": 32}
    )


def test_errors_as_a1111_gives_them(server: Live, picture: Image.Image) -> None:
    for path, body, status, reason in (
        ("txt2img", {"sampler_name": "Eulr"}, 400, "Sampler not found"),
        ("img2img", {"prompt": "a lake"}, 404, "Init image not found"),
        ("img2img", {"init_images": [encoded(picture)], "script_name": "nobody"}, 422, "Script 'nobody' not found"),
        ("txt2img", {"alwayson_scripts": {"ADetailer": {"args": [True]}}}, 422, "ADetailer"),
        ("txt2img", {"batch_size": 100, "n_iter": 100}, 422, "at most"),
        ("txt2img", {"width": 0}, 422, "greater than or equal to 1"),
        ("txt2img", {"width": 8}, 400, "at least"),
        ("txt2img", {"override_settings": {"sd_model_checkpoint": "nobody"}}, 400, "unknown model"),
        ("extra-single-image", {"image": encoded(picture), "upscaler_1": "R-ESRGAN 4x+"}, 400, "unknown upscaler"),
        ("extra-single-image", {"image": "http://127.0.0.1/a.png"}, 400, "addresses are not loaded"),
        ("extra-batch-images", {"imageList": []}, 422, "empty"),
        ("png-info", {"image": "!!"}, 400, "no base64"),
        ("options", {"sd_model_checkpoint": "nobody"}, 400, "unknown model"),
    ):
        answer = post(server, path, **body)
        assert answer.status_code == status and reason in answer.json()["detail"], (path, answer.text)


def test_unknown_fields_are_let_through_and_told(server: Live) -> None:
    answer = post(
        server, "txt2img", prompt="a lake <lora:nobody:0.5>", steps=2, width=64, height=64, tiling=True, invented=3, eta=1.0,
        subseed=-1, styles=["film"], sampler_index="Euler", cfg_scale=None,
        override_settings={"CLIP_stop_at_last_layers": 2, "eta_noise": 1},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    info = json.loads(answer.json()["info"])
    assert info["ignored"] == ["invented", "tiling", "override_settings.eta_noise", "styles"]
    assert "nobody" in info["extra_generation_params"]["Notes"][0] and info["clip_skip"] == 2
    assert "Clip skip: 2" in info["infotexts"][0]
    assert answer.json()["parameters"]["invented"] == 3


def test_saved_pictures_and_none_in_the_answer(server: Live) -> None:
    answer = post(server, "txt2img", prompt="a lake", seed=8, steps=2, width=64, height=64, save_images=True, send_images=False)
    info = json.loads(answer.json()["info"])
    assert answer.json()["images"] == [] and len(info["saved"]) == 1
    path = Path(info["saved"][0])
    assert path.parent == server.folder / "outputs" and Image.open(path).size == (64, 64)


def test_a_client_that_goes_away_takes_its_job_with_it(server: Live) -> None:
    body = {"prompt": "a lake", "steps": 200, "width": 1024, "height": 1024}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/sdapi/v1/txt2img", json=body, timeout=1.5)
    begun = time.monotonic()
    while httpx.get(f"{server.url}/health").json()["jobs"]:
        assert time.monotonic() - begun < 10
        time.sleep(0.05)
    assert list((server.folder / "incoming").iterdir()) == []


def test_many_clients_at_once_are_answered_in_turn(server: Live) -> None:
    order: list[int] = []
    lock = threading.Lock()

    def call(seed: int) -> int:
        answer = post(server, "txt2img", prompt="a lake", seed=seed, steps=1, width=32, height=32)
        with lock:
            order.append(seed)
        found: int = json.loads(answer.json()["info"])["seed"]
        return found

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(call, range(8))) == list(range(8))
    assert sorted(order) == list(range(8))
